"""DSpark speculative decoding for Transformers: a faster `generate()` with the same output.

Importing this costs little more than Transformers' `GenerationMixin`: names are loaded when they are asked for.
"""

from typing import TYPE_CHECKING

from dspark_hf.evaluation.harness_name import offer_to_harness
from dspark_hf.generation.integration import install, install_unless_refused, uninstall
from dspark_hf.lazy import lazy_names
from dspark_hf.modeling.registration import register_when_asked
from dspark_hf.moved import install_old_names
from dspark_hf.registry.serving import serve_drafters
from dspark_hf.version import __version__ as __version__

if TYPE_CHECKING:
    from dspark_hf.doctor.diagnosing import diagnose
    from dspark_hf.generation.call.outputs import DSparkGenerateOutput
    from dspark_hf.generation.lookup_assistant import LookupAssistant
    from dspark_hf.generation.requests.request import FinishedRequest, Request, RequestQueue
    from dspark_hf.generation.requests.stream import generate_stream
    from dspark_hf.generation.statistics import SpeculationStatistics
    from dspark_hf.modeling.configuration_dspark import DSparkConfig
    from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
    from dspark_hf.modeling.deepseek_v4.modeling import DeepseekV4DSparkForCausalLM, DeepseekV4DSparkModel
    from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
    from dspark_hf.registry.finding import load_drafter_for, register_drafter

__all__ = [
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
    "diagnose",
    "generate_stream",
    "install",
    "load_drafter_for",
    "register_drafter",
    "uninstall",
]

_PLACES = {
    "DSparkAssistantModel": "modeling.modeling_dspark",
    "DSparkConfig": "modeling.configuration_dspark",
    "DSparkGenerateOutput": "generation.call.outputs",
    "DeepseekV4DSparkConfig": "modeling.deepseek_v4.configuration",
    "DeepseekV4DSparkForCausalLM": "modeling.deepseek_v4.modeling",
    "DeepseekV4DSparkModel": "modeling.deepseek_v4.modeling",
    "FinishedRequest": "generation.requests.request",
    "LookupAssistant": "generation.lookup_assistant",
    "Request": "generation.requests.request",
    "RequestQueue": "generation.requests.request",
    "SpeculationStatistics": "generation.statistics",
    "diagnose": "doctor.diagnosing",
    "generate_stream": "generation.requests.stream",
    "load_drafter_for": "registry.finding",
    "register_drafter": "registry.finding",
}
__getattr__ = lazy_names(__name__, _PLACES)

register_when_asked()
install_old_names()
serve_drafters()
offer_to_harness()
install_unless_refused()
