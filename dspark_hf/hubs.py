"""Names on hubs: `modelscope://AUTHOR/MODEL` becomes a folder, and Hugging Face's hub has to be within reach."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub import constants, get_session, try_to_load_from_cache

_MODELSCOPE = "modelscope://"
# seconds in which a hub answers a question without content
_PATIENCE = 5.0
# hubs that have answered
_REACHED: set[str] = set()


def hub_options(name: Any, given: Mapping[str, Any], file: str = "config.json") -> dict[str, Any]:
    """Return what to add to the hub options `given` for a name: where its hub is out of reach, the cache is taken.

    Every look-up of a file would find that out by itself, after five attempts. Nothing is asked for a folder, offline,
    or of a hub that has answered before.

    Args:
        name: a folder, or a name on Hugging Face's hub.
        given: `cache_dir`, `revision`, `local_files_only` and others, as in Transformers.
        file: one that every model of the kind has.

    Raises:
        ConnectionError: if the hub is out of reach, and the model is not in the cache.

    Example:

        >>> hub_options(".", {})
        {}
    """
    is_settled = given.get("local_files_only") or given.get("proxies") or constants.HF_HUB_OFFLINE
    if name is None or os.path.exists(name) or is_elsewhere(str(name)) or is_settled or _is_reached():
        return {}
    where = {option: given.get(option) for option in ("cache_dir", "revision")}
    subfolder = given.get("subfolder")
    cached = try_to_load_from_cache(str(name), f"{subfolder}/{file}" if subfolder else file, **where)
    if isinstance(cached, str):
        # imported here, since an estimate reads a hub's configuration without waiting for Transformers
        from transformers.utils import logging

        logging.get_logger(__name__).warning_once(
            f"{constants.ENDPOINT} cannot be reached: {str(name)!r} is taken from the cache. HF_HUB_OFFLINE=1 says so "
            "from the start."
        )
        return {"local_files_only": True}
    raise ConnectionError(
        f"{str(name)!r} must be a folder here, or within reach: {constants.ENDPOINT} cannot be reached, and it "
        "is not in the cache. Name a folder, or fetch it with `hf download` where there is a network; with "
        "HF_HUB_OFFLINE=1 the cache alone is looked into."
    )


def _is_reached() -> bool:
    if constants.ENDPOINT not in _REACHED:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
        # versions of huggingface_hub differ in whose errors these are
        except Exception:
            return False
        _REACHED.add(constants.ENDPOINT)
    return True


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
