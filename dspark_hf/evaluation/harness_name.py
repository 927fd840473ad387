"""The name under which lm-evaluation-harness finds this package's model."""

from __future__ import annotations

from types import ModuleType

from dspark_hf.lazy import when_imported

NAME = "dspark-hf"
_PLACE = "dspark_hf.evaluation.harness:DSparkLM"


def offer_to_harness() -> None:
    """Let lm-evaluation-harness find the model `"dspark-hf"`, once it is imported in this process."""
    when_imported("lm_eval.models", _offer)


def _offer(_: ModuleType) -> None:
    from lm_eval.api import registry

    # lm_eval before 0.4.10 has no place for names whose models are loaded later
    models = getattr(registry, "model_registry", None)
    if models is not None and NAME not in models:
        models.register(NAME, target=_PLACE)
