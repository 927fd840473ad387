"""The public names are pinned."""

from __future__ import annotations

import dspark_hf


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
        "LookupAssistant",
        "Request",
        "RequestQueue",
        "SpeculationStatistics",
        "generate_stream",
        "install",
        "uninstall",
    ]
    assert all(hasattr(dspark_hf, name) for name in dspark_hf.__all__)
