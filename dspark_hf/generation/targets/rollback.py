"""Whether what a target remembers can be taken back: asked before training, before a call, and before measuring."""

from __future__ import annotations

import inspect

from transformers import PreTrainedModel

from dspark_hf.generation.compat import CACHE_KEY, is_stateful, makes_own_cache
from dspark_hf.generation.targets.recurrent_support import can_recompute, obstacle

# once their cache holds something, these take one token a pass, or reckon with all tokens from the start
_ONE_BY_ONE = ("cpmant", "prophetnet", "xlm")


def check_rollback(model: PreTrainedModel) -> None:
    """Raise a `ValueError` that says why, if rejected drafts would leave a trace in what `model` remembers.

    Asks what is known before a pass; a cache that only knows once it holds something is asked again then.
    """
    remedy = "No drafter can assist it: generate without `assistant_model`."
    if is_stateful(model) and not can_recompute(model):
        if model.config.model_type == "deepseek_v4":
            remedy = "Load it as a `DeepseekV4DSparkForCausalLM`."
        raise ValueError(
            f"`target` must have a cache that can be rolled back, got {type(model).__name__}, whose layers keep a "
            f"state: {obstacle(model)}. {remedy}"
        )
    inputs = inspect.signature(model.forward).parameters
    if CACHE_KEY not in inputs and "cache_params" in inputs:
        raise ValueError(
            f"`target` must take its cache as `{CACHE_KEY}`, got {type(model).__name__}, which takes it as "
            "`cache_params` before Transformers 5.24. Upgrade Transformers, or generate without `assistant_model`."
        )
    if makes_own_cache(model) or CACHE_KEY not in inputs:
        raise ValueError(
            "`target` must have a cache of Transformers, which can be rolled back, got "
            f"{type(model).__name__}, which has {'one of its own' if makes_own_cache(model) else 'none'}. {remedy}"
        )
    if model.config.model_type in _ONE_BY_ONE:
        raise ValueError(
            "`target` must take several tokens a pass where its cache holds some already, got "
            f"{type(model).__name__}. {remedy}"
        )
    # a cache for it keeps all tokens, not none: a single one sees them all, several of a pass only themselves
    if getattr(model.config.get_text_config(decoder=True), "sliding_window", None) == 1:
        raise ValueError(f"`sliding_window` of `target` must be at least 2, got 1. {remedy}")
