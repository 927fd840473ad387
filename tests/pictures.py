"""What tests see of a picture."""

from __future__ import annotations

from pathlib import Path


def drawn_share(path: Path) -> float:
    """Return the share of a picture's pixels that are not white, in [0, 1]."""
    from PIL import Image

    picture = Image.open(path).convert("L")
    return 1 - picture.histogram()[255] / (picture.width * picture.height)
