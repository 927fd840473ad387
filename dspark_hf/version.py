"""The version of this package, as its metadata says."""

from __future__ import annotations

from importlib import metadata

try:
    __version__ = metadata.version("dspark-hf")
except metadata.PackageNotFoundError:
    # run from a folder that was never installed: no release, and lower than all of them
    __version__ = "0+unknown"
