"""The public names are pinned."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import dspark_hf
from tests.tiny import tiny_target


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
        "diagnose",
        "generate_stream",
        "install",
        "load_drafter_for",
        "register_drafter",
        "uninstall",
    ]
    assert all(hasattr(dspark_hf, name) for name in dspark_hf.__all__)


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("training", ("DSparkTrainer", "DSparkTrainingArguments", "build_drafter", "read_conversations")),
        ("evaluation", ("EvaluationSettings", "evaluate", "load_models", "write_evaluation")),
        ("calibration", ("calibrate", "collect_observations", "save_temperatures")),
        ("profiling", ("CostTable", "load_profile", "profile_key", "save_profile")),
        ("data", ("DataOptions", "collect")),
        ("doctor", ("Diagnosis", "diagnose", "print_diagnosis")),
        ("generation.scheduling", ("AdaptiveScheduler", "Scheduler", "ThresholdScheduler", "reset_learned_state")),
        ("generation.drafting", ("DraftContext", "DraftedBlock", "Drafter")),
        ("loading", ("load_drafter", "load_target", "load_tokenizer")),
        ("prompts", ("Prompt", "encode_prompt", "read_prompts")),
        ("modeling.formats", ("export",)),
        ("modeling.deepseek_v4", ("write_tiny_checkpoint",)),
        ("modeling.deepseek_v4.chat", ("encode_messages", "parse_response", "set_chat_template")),
        ("modeling.deepseek_v4.estimation", ("EstimationSettings", "make_report")),
    ],
)
def test_folders_offer_their_names(folder, names):
    """What a user needs in Python is found in a file whose name may change only."""
    package = importlib.import_module(f"dspark_hf.{folder}")
    assert set(names) <= set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_one_file_does_not_load_its_whole_folder(monkeypatch):
    """Reading conversations loads the trainer, which takes a second."""
    package = importlib.import_module("dspark_hf.training")
    monkeypatch.delitem(sys.modules, "dspark_hf.training.trainer", raising=False)
    importlib.reload(package)
    assert "dspark_hf.training.trainer" not in sys.modules


_IMPORT = """
import sys
from transformers import GenerationMixin

before = set(sys.modules)
import dspark_hf

more = {name for name in set(sys.modules) - before if name.split(".")[0] != "dspark_hf"}
assert more <= set(sys.stdlib_module_names), more
from transformers import AutoConfig, AutoModel

assert type(AutoConfig.from_pretrained(sys.argv[1])) is dspark_hf.DSparkConfig
assert type(AutoModel.from_pretrained(sys.argv[1])) is dspark_hf.DSparkAssistantModel
assert dspark_hf.generate_stream is dspark_hf.generation.requests.stream.generate_stream
"""


@pytest.mark.slow
def test_importing_costs_what_generation_costs(tmp_path):
    """`import dspark_hf` takes a second for models and SciPy; or the Auto classes then know nothing of ours."""
    drafter = dspark_hf.DSparkAssistantModel.from_target(tiny_target(), num_hidden_layers=1, markov_rank=4)
    drafter.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
