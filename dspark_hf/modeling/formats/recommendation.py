"""The knobs that a drafter recommends, in the `generation_config.json` of its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from dspark_hf.generation.compat import KNOBS, is_set


def read_recommendation(folder: str | os.PathLike[str] | None, hub_options: Mapping[str, Any]) -> Any:
    """Return the generation configuration beside a drafter's weights, or None if there is none that sets a knob."""
    if folder is None:
        return None
    # as weights and configuration, it may be in a hub's cache that cannot be reached now
    lenient = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
    found = cached_file(folder, GENERATION_CONFIG_NAME, **hub_options, **lenient)
    config = None if found is None else GenerationConfig.from_pretrained(os.path.dirname(found))
    return config if config is not None and any(is_set(config, name) for name in KNOBS) else None
