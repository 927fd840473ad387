"""What Transformers is told of our classes: no earlier than an Auto class is asked for something.

Importing them takes as long as importing all of Transformers' generation. Nor could it be done in the middle of an
import, which may be that of one of our own modules.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from dspark_hf.lazy import when_imported

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"


def register_when_asked() -> None:
    """Let `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` find our classes; calling it again is harmless."""
    when_imported(_CONFIGS, _await_configs)
    when_imported(_MODELS, _await_models)


def _await_configs(module: ModuleType) -> None:
    for name in ("from_pretrained", "for_model"):
        method = getattr(module.AutoConfig, name)
        # what is of ours already goes on from there
        if not hasattr(method, "is_dspark") and not hasattr(method, "is_waiting"):
            setattr(module.AutoConfig, name, staticmethod(_with_configs(module.AutoConfig, name, method)))


def _with_configs(auto: Any, name: str, method: Any) -> Any:
    @functools.wraps(method)
    def register_first(*args: Any, **kwargs: Any) -> Any:
        if register_configs.cache_info().currsize:
            return method(*args, **kwargs)
        register_configs()
        # which may have put something before this
        return getattr(auto, name)(*args, **kwargs)

    # mypy knows no attributes of functions
    register_first.is_waiting = True  # type: ignore[attr-defined]
    return register_first


@functools.cache
def register_configs() -> None:
    """Let `AutoConfig` know our configurations, and drafters in foreign packagings; once."""
    from transformers import AutoConfig

    from dspark_hf.modeling.configuration_dspark import DSparkConfig
    from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
    from dspark_hf.modeling.formats.auto import register_packagings

    for config in (DSparkConfig, DeepseekV4DSparkConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    register_packagings()


def _await_models(module: ModuleType) -> None:
    for auto in (module.AutoModel, module.AutoModelForCausalLM):
        for name in ("from_pretrained", "from_config"):
            method = getattr(auto, name)
            if not getattr(method, "is_waiting", False):
                setattr(auto, name, classmethod(_registering(method.__func__)))


def _registering(function: Any) -> Any:
    @functools.wraps(function)
    def register_first(cls: Any, *args: Any, **kwargs: Any) -> Any:
        register_models()
        return function(cls, *args, **kwargs)

    # mypy knows no attributes of functions
    register_first.is_waiting = True  # type: ignore[attr-defined]
    return register_first


@functools.cache
def register_models() -> None:
    """Let the Auto classes know our models; once."""
    register_configs()
    from transformers import AutoModel, AutoModelForCausalLM

    from dspark_hf.modeling.configuration_dspark import DSparkConfig
    from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
    from dspark_hf.modeling.deepseek_v4.modeling import DeepseekV4DSparkForCausalLM, DeepseekV4DSparkModel
    from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel

    AutoModel.register(DSparkConfig, DSparkAssistantModel, exist_ok=True)
    AutoModelForCausalLM.register(DSparkConfig, DSparkAssistantModel, exist_ok=True)
    AutoModel.register(DeepseekV4DSparkConfig, DeepseekV4DSparkModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekV4DSparkConfig, DeepseekV4DSparkForCausalLM, exist_ok=True)
