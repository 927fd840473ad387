"""The public names are pinned, and the examples in their docstrings run."""

from __future__ import annotations

import doctest

import dspark_hf
from dspark_hf.generation.requests import stream as request_stream
from dspark_hf.modeling import configuration_dspark, modeling_dspark
from dspark_hf.modeling.deepseek_v4 import cache, configuration, modeling

MODULES = (request_stream, configuration_dspark, modeling_dspark, configuration, modeling, cache)


def test_public_names():
    """A public name disappears, or an internal one becomes public by accident."""
    assert dspark_hf.__all__ == [
        "DSparkAssistantModel",
        "DSparkConfig",
        "DSparkGenerateOutput",
        "DeepseekV4DSparkConfig",
        "DeepseekV4DSparkForCausalLM",
        "DeepseekV4DSparkModel",
        "FinishedRequest",
        "Request",
        "RequestQueue",
        "SpeculationStatistics",
        "generate_stream",
        "install",
        "uninstall",
    ]
    assert all(hasattr(dspark_hf, name) for name in dspark_hf.__all__)


def test_docstring_examples():
    """An example in the documentation does not run."""
    results = [doctest.testmod(module) for module in MODULES]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0
