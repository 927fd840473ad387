"""A drafter's folder is named in `target.generate(custom_generate=...)`, by people who import nothing of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dspark_hf
from dspark_hf import DSparkAssistantModel
from dspark_hf.modeling.formats.writing import export
from dspark_hf.registry.finding import assistant_named
from tests.generation.call.test_criteria import character_tokenizer
from tests.tiny import tiny_target

REPOSITORY = Path(dspark_hf.__file__).parents[1]

# what a user writes who has neither imported nor, in the second case, installed the package
_USE = """
import sys

{before}
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

target_folder, folder = sys.argv[1:]
target = AutoModelForCausalLM.from_pretrained(target_folder)
prompt = torch.tensor([[5, 6, 7, 8, 5, 6]])
options = {{"max_new_tokens": 16, "do_sample": False}}
ours = {{"custom_generate": folder, "trust_remote_code": True}}
plain = target.generate(prompt, **options)


class Kept(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.seen.append("end")


streamer = Kept()
assert not any(name.startswith("dspark_hf") for name in sys.modules)
assert torch.equal(target.generate(prompt, streamer=streamer, **options, **ours), plain)
assert streamer.seen == [*plain[0].tolist(), "end"]
tokenizer = AutoTokenizer.from_pretrained(target_folder)
options |= {{"stop_strings": [tokenizer.convert_ids_to_tokens(int(plain[0, 10]))], "tokenizer": tokenizer}}
stopped = target.generate(prompt, **options)
assert torch.equal(target.generate(prompt, **options, **ours), stopped)
assert stopped.shape[1] < plain.shape[1]
{after}
"""
_HIDE = """
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dspark_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
_COUNT = """
from dspark_hf.registry.finding import assistant_named
assert assistant_named(folder, target).last_statistics.num_rounds > 0
"""


def _run_python(code: str, home: Path, *arguments: str) -> None:
    """Run code in an environment of its own, without a network."""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """The folders of a tiny target with a tokenizer, and of a drafter of it."""
    target = tiny_target("llama", eos_token_id=2)
    target.save_pretrained(tmp_path / "target")
    character_tokenizer().save_pretrained(tmp_path / "target")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    drafter.save_pretrained(tmp_path / "drafter")
    return str(tmp_path / "target"), str(tmp_path / "drafter")


def test_a_folder_in_generate(folders: tuple[str, str]) -> None:
    """A drafter's folder cannot be named as `custom_generate`, or the drafter is not used then."""
    target = AutoModelForCausalLM.from_pretrained(folders[0])
    prompt, options = torch.tensor([[5, 6, 7, 8, 5, 6]]), {"max_new_tokens": 16, "do_sample": False}
    ours = {"custom_generate": folders[1], "trust_remote_code": True}
    plain = target.generate(prompt, **options)
    assert torch.equal(target.generate(prompt, **options, **ours), plain)
    drafter = assistant_named(folders[1], target)
    assert drafter.last_statistics.num_rounds > 0
    # scheduler and number of drafts go through
    target.generate(prompt, **options, **ours, scheduler="fixed", num_assistant_tokens=2)
    assert drafter.last_statistics.num_drafted <= 2 * drafter.last_statistics.num_rounds
    requirements = Path(folders[1], "custom_generate", "requirements.txt").read_text(encoding="utf-8")
    assert requirements == "dspark-hf\n"


@pytest.mark.slow
def test_without_an_import(folders: tuple[str, str], tmp_path: Path) -> None:
    """Without `import dspark_hf` a drafter cannot be used, or streamer and stop strings are lost on the way."""
    _run_python(_USE.format(before="", after=_COUNT), tmp_path, *folders)


@pytest.mark.slow
def test_without_the_package(folders: tuple[str, str], tmp_path: Path) -> None:
    """The folder that says that it needs no package does."""
    drafter = DSparkAssistantModel.from_pretrained(folders[1])
    export(drafter, "custom_generate", tmp_path / "alone")
    _run_python(_USE.format(before=_HIDE, after=""), tmp_path, folders[0], str(tmp_path / "alone"))
