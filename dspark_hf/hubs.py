"""Names on hubs other than Hugging Face's: `modelscope://AUTHOR/MODEL` is fetched, and becomes a folder."""

from __future__ import annotations

import os
from typing import Any

_MODELSCOPE = "modelscope://"


def is_elsewhere(name: str) -> bool:
    """Return whether a name is on another hub than Hugging Face's."""
    return name.startswith(_MODELSCOPE)


def local_name(name: Any, *, revision: str | None = None) -> Any:
    """Return the folder of a model on ModelScope, fetched unless it is there; every other name as it is.

    Args:
        name: `"modelscope://AUTHOR/MODEL"`, a folder, or a name on Hugging Face's hub.
        revision: branch, tag or commit on ModelScope.

    Raises:
        ValueError: if the name is no `AUTHOR/MODEL`, it cannot be fetched, or the package `modelscope` is missing.

    Example:

        >>> local_name("Qwen/Qwen3-4B")
        'Qwen/Qwen3-4B'
    """
    if not isinstance(name, str) or not name.startswith(_MODELSCOPE):
        return name
    model_id = name.removeprefix(_MODELSCOPE).strip("/")
    if model_id.count("/") != 1:
        raise ValueError(
            f"`{_MODELSCOPE}` must be followed by AUTHOR/MODEL, got {name!r}. Copy the name from the model's page."
        )
    try:
        # an extra of ours, and slow to import
        from modelscope import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"`modelscope` must be installed to read {name!r}, got no such package. Run `pip install "
            "'dspark-hf[modelscope]'`."
        ) from error
    options = {} if revision is None else {"revision": revision}
    try:
        return os.fspath(snapshot_download(model_id, **options))
    # its errors have no common class but this: no such model, no network, a damaged file
    except Exception as error:
        raise ValueError(
            f"{name!r} cannot be fetched from ModelScope. Check the name and the network. ({error})"
        ) from error
