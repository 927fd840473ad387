"""Targets whose class in Transformers cannot take tokens back, while a class of ours for the same checkpoint can."""

from __future__ import annotations

from transformers import PreTrainedModel

# model type of Transformers' class -> our class, by name: models stand above generation
_TWINS = {"deepseek_v4": "DeepseekV4DSparkForCausalLM"}


def check_class(model: PreTrainedModel) -> None:
    """Raise a `ValueError` that names our class if `model` is one of Transformers' that has such a twin."""
    ours = _TWINS.get(getattr(model.config, "model_type", ""))
    if ours is not None:
        raise ValueError(
            "`assistant_model` must assist a target whose cache can be rolled back, for this model type a "
            f"{ours}, got {type(model).__name__!r}. Load the checkpoint with `dspark_hf.{ours}.from_pretrained`."
        )
