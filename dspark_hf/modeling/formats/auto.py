"""Let `AutoConfig`, and what asks it, know drafters whose `config.json` gives them out for something else.

Foreign packagings carry the target's `model_type`, or none: `AutoModel` and the Pipeline would build a plain model, or
refuse. Only what `formats/choosing.py` recognises is read here; everything else goes to Transformers as before.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from dspark_hf.hubs import hub_options
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.formats.choosing import find_packaging
from dspark_hf.modeling.formats.tensors import HUB_OPTIONS


def register_packagings() -> None:
    """Let `AutoConfig.from_pretrained` return a `DSparkConfig` for drafters in foreign packagings.

    Code that such a folder brings (`auto_map`) is not run, with `trust_remote_code=True` neither: as for every class
    registered with Transformers, the installed one goes before. Calling it again is harmless.
    """
    original = AutoConfig.from_pretrained
    if getattr(original, "is_dspark", False):
        return

    @functools.wraps(original)
    def from_pretrained(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        if not _is_foreign_drafter(pretrained_model_name_or_path, kwargs):
            return original(pretrained_model_name_or_path, **kwargs)
        for name in ("trust_remote_code", "code_revision"):
            kwargs.pop(name, None)
        return DSparkConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)

    # mypy knows no attributes of functions
    from_pretrained.is_dspark = True  # type: ignore[attr-defined]
    AutoConfig.from_pretrained = staticmethod(from_pretrained)  # type: ignore[method-assign]


def _is_foreign_drafter(name_or_path: str | os.PathLike, options: dict[str, Any]) -> bool:
    given = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
    try:
        given |= hub_options(name_or_path, given)
        fields, _ = PreTrainedConfig.get_config_dict(name_or_path, **given)
    except (OSError, ValueError, TypeError):
        # Transformers says it in its own words
        return False
    return isinstance(fields, dict) and find_packaging(fields) is not None
