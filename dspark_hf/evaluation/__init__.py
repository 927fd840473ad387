"""Evaluation of drafters: accepted length, speed, and what their confidence is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark_hf.lazy import lazy_names

if TYPE_CHECKING:
    from dspark_hf.evaluation.loading import Models, encode_sets, load_models, read_prompt_sets
    from dspark_hf.evaluation.results import Evaluation
    from dspark_hf.evaluation.run import evaluate
    from dspark_hf.evaluation.settings import EvaluationSettings
    from dspark_hf.evaluation.terminal import print_evaluation
    from dspark_hf.evaluation.writing import write_evaluation

__all__ = [
    "Evaluation",
    "EvaluationSettings",
    "Models",
    "encode_sets",
    "evaluate",
    "load_models",
    "print_evaluation",
    "read_prompt_sets",
    "write_evaluation",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Evaluation": "results",
        "EvaluationSettings": "settings",
        "Models": "loading",
        "encode_sets": "loading",
        "evaluate": "run",
        "load_models": "loading",
        "print_evaluation": "terminal",
        "read_prompt_sets": "loading",
        "write_evaluation": "writing",
    },
)
