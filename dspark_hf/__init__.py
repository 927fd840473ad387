"""DSpark speculative decoding for Transformers: a faster `generate()` with the same output."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dspark_hf.generation.call.names import serve_names
from dspark_hf.generation.call.outputs import DSparkGenerateOutput
from dspark_hf.generation.integration import install, install_unless_refused, uninstall
from dspark_hf.generation.lookup_assistant import LookupAssistant
from dspark_hf.generation.requests.request import FinishedRequest, Request, RequestQueue
from dspark_hf.generation.requests.stream import generate_stream
from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
from dspark_hf.modeling.deepseek_v4.modeling import DeepseekV4DSparkForCausalLM, DeepseekV4DSparkModel
from dspark_hf.modeling.formats.auto import register_packagings
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.moved import install_old_names
from dspark_hf.registry.finding import assistant_named, load_drafter_for, register_drafter
from dspark_hf.version import __version__ as __version__

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
    "generate_stream",
    "install",
    "load_drafter_for",
    "register_drafter",
    "uninstall",
]

AutoConfig.register(DSparkConfig.model_type, DSparkConfig, exist_ok=True)
AutoModel.register(DSparkConfig, DSparkAssistantModel, exist_ok=True)
AutoModelForCausalLM.register(DSparkConfig, DSparkAssistantModel, exist_ok=True)
AutoConfig.register(DeepseekV4DSparkConfig.model_type, DeepseekV4DSparkConfig, exist_ok=True)
AutoModel.register(DeepseekV4DSparkConfig, DeepseekV4DSparkModel, exist_ok=True)
AutoModelForCausalLM.register(DeepseekV4DSparkConfig, DeepseekV4DSparkForCausalLM, exist_ok=True)
register_packagings()
install_old_names()
serve_names(assistant_named)
install_unless_refused()
