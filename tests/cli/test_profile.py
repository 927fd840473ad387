"""`dspark-hf profile` from the command line to what `generate` finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from dspark_hf import DeepseekV4DSparkForCausalLM, DSparkAssistantModel
from dspark_hf.cli.main import app
from dspark_hf.demo.tiny import write_tiny_pair
from dspark_hf.generation.scheduling import CallInfo
from dspark_hf.generation.scheduling.costs import profile, workload
from dspark_hf.generation.scheduling.costs.profile import online_costs
from dspark_hf.generation.scheduling.costs.workload import StepTimer
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.deepseek_v4.tiny import write_tiny_checkpoint
from tests.thinning import slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pair."""
    folder = tmp_path_factory.mktemp("profile")
    write_tiny_pair(folder)
    return folder


def _run(folder: Path, *arguments: str) -> tuple[int, str]:
    given = {
        "--target": str(folder / "target"),
        "--repeats": "1",
        "--rows": "2",
        "--contexts": "16",
        "--device": "cpu",
    }
    options = [part for pair in given.items() if pair[0] not in arguments for part in pair]
    # wide and without colours, so that messages can be found
    result = CliRunner().invoke(app, ["profile", *options, *arguments], env={"COLUMNS": "500", "NO_COLOR": "1"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_generate_finds_what_was_measured(folder, profiles, tmp_path, monkeypatch):
    """The command measures for nothing: `generate` measures again, or does not look there."""
    figure = tmp_path / "new" / "curve.png"
    code, output = _run(folder, "--drafter", str(folder / "drafter"), "--contexts", "16,64", "--figure", str(figure))
    assert code == 0, output
    [path] = profiles.iterdir()
    assert f"Profile: {path}" in output
    assert "Target, 64 tokens of context: ms per pass" in output
    assert "Drafter, 16 tokens of context: ms per block" in output
    assert "1 row" in output and "2 rows" in output
    assert figure.read_bytes().startswith(b"\x89PNG")
    fields = json.loads(path.read_text(encoding="utf-8"))
    assert [curve["rows"] for curve in fields["verify"]["curves"]] == [1, 1, 2, 2]
    assert list(fields["verify"]["curves"][0]["seconds_by_width"]) == list("12345678")
    assert fields["verify"]["measured"]["target"] == str(folder / "target")
    monkeypatch.setattr(profile, "_TABLES", {})
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype="auto")
    drafter = DSparkAssistantModel.from_pretrained(folder / "drafter", dtype="auto")
    call = CallInfo(TargetAdapter(target, drafter.target_layer_ids), drafter, 2, 7, 30)
    assert online_costs(call).profile is not None

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(profile, "measure_costs", fail)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "do_sample": False, "max_new_tokens": 8}
    plain = target.generate(**inputs)
    for scheduler in ("hardware_aware", "asynchronous", None):
        assert torch.equal(target.generate(**inputs, assistant_model=drafter, scheduler=scheduler), plain)


def test_the_target_alone(folder, profiles, tmp_path):
    """A drafter is needed to measure a target; or it goes elsewhere than asked."""
    code, output = _run(folder, "--output", str(tmp_path / "mine"), "--widths", "4", "--attention", "eager")
    assert code == 0, output
    assert f"DSPARK_HF_PROFILES={tmp_path / 'mine'}" in output
    assert not profiles.exists()
    [path] = (tmp_path / "mine").iterdir()
    fields = json.loads(path.read_text(encoding="utf-8"))
    assert (fields["attention"], fields["drafters"]) == ("eager", {})
    assert list(fields["verify"]["curves"][0]["seconds_by_width"]) == ["1", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", "1,x"), "`--rows` must be positive integers separated by commas, got '1,x'. Try 1,2,4."),
        (("--widths", "0"), "`--widths` must be positive integers"),
        (
            ("--contexts", "600"),
            "`--contexts` must leave room for a pass of 8 in the target's 512 positions, got 600.",
        ),
        (("--target", "{folder}/nowhere"), "`--target` must be the folder or hub name"),
        (("--drafter", "{folder}/nowhere"), "`--drafter` must be the folder or hub name of a DSpark drafter"),
        (("--output", "{folder}/target/config.json"), "`--output` must be a folder, got the file"),
        (("--figure", "{folder}/curve.jpg"), "`--figure` must be a file that ends in .png"),
        (("--figure", "{folder}"), "`--figure` must be a file that ends in .png"),
        (("--repeats", "0"), "Invalid value for '--repeats'"),
        (("--attention", "none"), "'none' is not one of"),
    ],
)
def test_mistakes_are_told_before_models_are_loaded(folder, monkeypatch, arguments, message):
    """A user waits for the models to load, or reads a traceback, before hearing of a typing error."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the models were loaded")

    monkeypatch.setattr("dspark_hf.loading.load_target", fail)
    code, output = _run(folder, *(one.format(folder=folder) for one in arguments))
    assert code == 2
    assert message in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "abacus"), "`--device` must be auto or a device PyTorch can use here, got 'abacus'"),
        (("--attention", "flash_attention_2"), "`--attention` must be one that the target can use here"),
        (("--drafter", "{folder}/other"), "`hidden_size`"),
        (("--output", "{folder}/target/config.json/below"), "`--output` must be a folder that can be written to"),
        (("--figure", "{folder}/target/config.json/curve.png"), "`--figure` must be a file that can be written"),
    ],
)
def test_what_cannot_be_is_told(folder, arguments, message):
    """A user reads a traceback."""
    if not (folder / "other").exists():
        fields = json.loads((folder / "drafter" / "config.json").read_text(encoding="utf-8"))
        other = DSparkAssistantModel(DSparkAssistantModel.config_class(**{**fields, "hidden_size": 32}))
        other.save_pretrained(folder / "other")
    code, output = _run(folder, *(one.format(folder=folder) for one in arguments))
    assert code == 2, output
    assert message in output


@pytest.mark.parametrize("with_drafter", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_deepseek_v4(profiles, tmp_path, monkeypatch, with_drafter):
    """A DeepSeek-V4 checkpoint is refused, or its costs are not those that `use_dspark=True` looks for."""
    write_tiny_checkpoint(tmp_path / "target")
    drafter = ("--drafter", str(tmp_path / "target")) if with_drafter else ()
    code, output = _run(tmp_path, "--contexts", "64", "--widths", "1,2", "--rows", "1", *drafter)
    assert code == 0, output
    assert "DeepseekV4DSparkForCausalLM, bfloat16" in output
    monkeypatch.setattr(profile, "_TABLES", {})
    target = DeepseekV4DSparkForCausalLM.from_pretrained(tmp_path / "target")
    call = CallInfo(TargetAdapter(target, target.dspark.target_layer_ids), target.dspark, 1, 5, 30)
    assert (online_costs(call).profile is not None) == with_drafter


def test_targets_that_cannot_be_assisted(profiles, tmp_path):
    """A target whose cache forgets is measured, ends in a traceback, or other sizes are said to help."""
    config = AutoConfig.for_model("rwkv", vocab_size=64, hidden_size=32, num_hidden_layers=2, context_length=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "target")
    code, output = _run(tmp_path)
    assert code == 2, output
    assert "`target` must have a cache that can be rolled back, got RwkvForCausalLM" in output
    assert "Lower" not in output


def test_ctrl_c_writes_nothing(folder, profiles, monkeypatch):
    """Ctrl-C leaves half a profile, or looks like success."""
    time, calls = workload.timed, []

    def interrupt(*args):
        calls.append(None)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return time(*args)

    monkeypatch.setattr("dspark_hf.generation.scheduling.costs.workload.timed", interrupt)
    code, output = _run(folder)
    assert code == 130
    assert "Nothing was written" in output
    assert not profiles.exists()


_OUT_OF_MEMORY = [
    torch.OutOfMemoryError("too much"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", [slow(_OUT_OF_MEMORY[0]), _OUT_OF_MEMORY[1]], ids=["accelerator", "CPU"])
def test_what_does_not_fit_into_memory_is_left_out(folder, profiles, monkeypatch, error):
    """One size too large loses all that was measured."""
    _run_out_of_memory(monkeypatch, error, lambda num_rows, context: (num_rows, context) in ((2, 64), (2, 1)))
    code, output = _run(folder, "--contexts", "16,64")
    assert code == 0, output
    assert "Left out for lack of memory: 2 rows on 64 tokens." in output
    [path] = profiles.iterdir()
    curves = json.loads(path.read_text(encoding="utf-8"))["verify"]["curves"]
    assert [(curve["rows"], curve["context"]) for curve in curves] == [(1, 16), (1, 64), (2, 16)]


@pytest.mark.parametrize("error", _OUT_OF_MEMORY, ids=["accelerator", "CPU"])
def test_memory_for_nothing_is_told(folder, profiles, monkeypatch, error):
    """A user whose memory does not suffice for a single size reads a traceback."""
    _run_out_of_memory(monkeypatch, error, lambda num_rows, context: context > 1)
    code, output = _run(folder)
    assert code == 2, output
    assert "`--contexts` must leave the smallest size enough memory, got 16 tokens of one row. Lower it." in output
    assert not profiles.exists()


def _run_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError, is_too_large: Callable[[int, int], bool]
) -> None:
    verify = StepTimer.verify_seconds

    def run_out(self: StepTimer, num_rows: int, context_length: int, width: int) -> float:
        if is_too_large(num_rows, context_length):
            raise error
        return verify(self, num_rows, context_length, width)

    monkeypatch.setattr(StepTimer, "verify_seconds", run_out)


def test_the_folder_that_is_named_is_blamed(folder, monkeypatch, tmp_path):
    """An option that was not given is said to be wrong."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSPARK_HF_PROFILES", str(tmp_path / "file" / "below"))
    code, output = _run(folder, "--contexts", "16", "--repeats", "1")
    assert code == 2
    assert "`DSPARK_HF_PROFILES` or the cache must be a folder that can be written to" in output
    assert "None" not in output
