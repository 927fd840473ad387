"""`dspark-hf eval` from the command line to the files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dspark_hf.cli.evaluate import evaluate
from dspark_hf.demo.tiny import write_tiny_pair
from dspark_hf.evaluation import run, writing

app = typer.Typer()
app.command("eval")(evaluate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pair, a second drafter and two prompt files."""
    folder = tmp_path_factory.mktemp("eval")
    write_tiny_pair(folder)
    shutil.copytree(folder / "drafter", folder / "other")
    for name, words in (("first", ("baba dufo", "kali mone raba")), ("second", ("nera moli", "foka"))):
        lines = [json.dumps({"turns": [text]}) for text in words]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _run(folder: Path, *arguments: str, prompts: tuple[str, ...] = ("first.jsonl",)) -> tuple[int, str]:
    paths = [str(folder / name) for name in prompts]
    given = {"--target": str(folder / "target"), "--drafter": str(folder / "drafter"), "--max-new-tokens": "8"}
    given |= {"--repeats": "1", "--output": str(folder / "result")}
    options = [part for pair in given.items() if pair[0] not in arguments for part in pair]
    # wide and without colours, so that messages can be found
    result = CliRunner().invoke(app, [*options, *arguments, *paths], env={"COLUMNS": "500", "NO_COLOR": "1"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def measured(folder: Path) -> tuple[int, str]:
    """The exit code and the output of one run with nearly every option, whose figures take long to draw."""
    return _run(
        folder,
        *("--baseline", str(folder / "other"), "--temperature", "0"),
        *("--batch-size", "2", "--num-prompts", "2", "--num-drafts", "3", "--device", "cpu", "--dtype", "fp32"),
        prompts=("first.jsonl", "second.jsonl"),
    )


def test_measures_and_writes(folder, measured):
    """The command does not do what its help says."""
    code, output = measured
    assert code == 0, output
    assert "tokens per target pass on first and second" in output
    assert "4 of 4 outputs identical" in output
    fields = json.loads((folder / "result" / "evaluation.json").read_text(encoding="utf-8"))
    assert fields["is_complete"]
    assert [one["name"] for one in fields["drafters"]] == ["drafter", "other"]
    assert [one["temperature"] for one in fields["sets"]] == [0, 0]
    assert len(fields["sets"][0]["drafters"][0]["acceptance"]["rate_by_position"]) <= 3
    assert (folder / "result" / "report.html").is_file()
    # each drafter has figures of its own
    for name in ("drafter", "other"):
        for kind in ("threshold_sweep", "survival_by_position", "reliability"):
            assert (folder / "result" / f"{kind}_{name}_temperature_0.png").is_file()


def test_same_text_for_the_same_drafter(folder, measured):
    """Two copies of one drafter get different numbers: drafters are not measured on the same terms."""
    fields = json.loads((folder / "result" / "evaluation.json").read_text(encoding="utf-8"))
    for one in fields["sets"]:
        ours, theirs = one["drafters"]
        assert ours["acceptance"] == theirs["acceptance"]
        assert ours["reliability"] == theirs["reliability"]


@pytest.mark.parametrize(
    ("arguments", "prompts", "message"),
    [
        ((), ("absent.jsonl",), "`PROMPT_FILES` must be files"),
        ((), (), "`--prompts` must name a prompt set at least, got none"),
        (("--prompts", "{folder}/absent.jsonl"), (), "`PROMPT_FILES` must be files"),
        ((), ("first.jsonl", "first.jsonl"), "`PROMPT_FILES` must be given once per value"),
        ((), ("target/config.json",), "must hold one JSON object a line"),
        (("--drafter", "{folder}/nowhere"), ("first.jsonl",), "must be the folder or hub name of a DSpark drafter"),
        (("--drafter", "{folder}/target"), ("first.jsonl",), "must hold a DSpark drafter"),
        (("--baseline", "{folder}/drafter"), ("first.jsonl",), "`--drafter and --baseline` must be given once"),
        (("--num-drafts", "99"), ("first.jsonl",), "`--num-drafts` must lie in [1, 7] for drafter"),
        (("--temperature", "0", "--temperature", "0"), ("first.jsonl",), "`--temperature` must be given once"),
        (("--output", "{folder}/first.jsonl"), ("first.jsonl",), "`--output` must be a folder, got the file"),
    ],
)
def test_mistakes_are_told_before_models_are_loaded(folder, monkeypatch, arguments, prompts, message):
    """A user waits for the models to load, or reads a traceback, before hearing of a typing error."""

    def fail(*args, **kwargs):
        raise AssertionError("the models were loaded")

    monkeypatch.setattr(run, "load_models", fail)
    code, output = _run(folder, *(one.format(folder=folder) for one in arguments), prompts=prompts)
    assert code == 2
    assert message in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "{folder}/nowhere"), "`--target` must be the folder or hub name"),
        (("--device", "abacus"), "`--device` must be auto or a device PyTorch can use here, got 'abacus'"),
        (("--max-new-tokens", "600"), "prompts must leave room for `--max-new-tokens` in the target's 512 positions"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_measured(folder, arguments, message):
    """A user reads a traceback, or garbage is measured."""
    code, output = _run(folder, *(one.format(folder=folder) for one in arguments))
    assert code == 2
    assert message in output


@pytest.fixture
def no_figures(monkeypatch):
    """Write pages without figures, which take longer to draw than tiny models to measure."""
    monkeypatch.setattr(writing, "draw_figures", lambda evaluation: ())


def test_an_early_end_writes_what_was_measured(folder, monkeypatch, no_figures):
    """Ctrl-C leaves nothing, or looks like success."""
    from dspark_hf.evaluation import measuring

    run, calls = measuring.Measuring._trial, []

    def interrupt(self, *args):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(measuring.Measuring, "_trial", interrupt)
    code, output = _run(folder, "--output", str(folder / "partial"))
    assert code == 1
    assert "partial result" in output
    fields = json.loads((folder / "partial" / "evaluation.json").read_text(encoding="utf-8"))
    assert (fields["is_complete"], fields["ended_by"]) == (False, "Ctrl-C")
    assert fields["sets"][0]["num_prompts"] == 1
    assert "partial result" in (folder / "partial" / "report.html").read_text(encoding="utf-8")


def test_a_stopped_run_goes_on(folder, monkeypatch, no_figures):
    """Hours of answers are lost to a kill, or answers of other settings are taken for those asked for."""
    from dspark_hf.evaluation import measuring

    run, calls = measuring.Measuring._trial, []

    def kill(self, *args):
        calls.append(args)
        if len(calls) == 2:
            # nothing catches it, as nothing catches a kill
            raise MemoryError
        return run(self, *args)

    arguments = ("--output", str(folder / "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(measuring.Measuring, "_trial", kill)
        assert _run(folder, *arguments)[0] == 1
    (recorded,) = (folder / "stopped").glob("measured-*.jsonl")
    first = json.loads(recorded.read_text(encoding="utf-8"))
    assert not (folder / "stopped" / "evaluation.json").exists()

    calls.clear()
    monkeypatch.setattr(measuring.Measuring, "_trial", lambda self, *args: calls.append(args) or run(self, *args))
    # another evaluation finds nothing, and leaves the file alone
    code, output = _run(folder, *arguments, "--max-new-tokens", "7")
    assert code == 0 and len(calls) == 2 and "Going on" not in output
    assert recorded.exists()
    calls.clear()
    code, output = _run(folder, *arguments)
    assert code == 0, output
    assert len(calls) == 1 and "Going on after 1 trials" in output
    fields = json.loads((folder / "stopped" / "evaluation.json").read_text(encoding="utf-8"))
    prompt = fields["sets"][0]["drafters"][0]["prompts"][0]
    assert prompt["plain_seconds"] == [first["answers"]["plain"][0]["seconds"]]
    # nothing is left but what belongs to the evaluation that was not gone on with
    assert not [path for path in (folder / "stopped").iterdir() if "measured" in path.name]


def test_a_confidence_that_is_no_number_is_refused_at_once(folder, tmp_path):
    """A damaged drafter is measured for hours, and then there is no result."""
    shutil.copytree(folder / "drafter", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["confidence_head.proj.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    code, output = _run(folder, "--drafter", str(tmp_path / "broken"))
    assert code == 2
    assert "must have a confidence in [0, 1], got NaN from broken" in output


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX")
def test_odd_names_cost_no_result(folder, tmp_path):
    """After hours the file's name breaks the writing of the numbers, the figures or the last line."""
    prompts = os.fsdecode(bytes(tmp_path) + b"/x$_$ [bold] \xff\x1b.jsonl")
    shutil.copy(folder / "first.jsonl", prompts)
    output_folder = tmp_path / "[" / "x] [bold]"
    code, output = _run(folder, "--output", str(output_folder), "--temperature", "1", prompts=(prompts,))
    assert code == 0, output
    assert "\x1b" not in output and "[bold]/report.html" in output
    fields = json.loads((output_folder / "evaluation.json").read_text(encoding="utf-8"))
    assert [one["temperature"] for one in fields["sets"]] == [1]
    assert fields["sets"][0]["name"] == "x$_$ [bold] \ufffd\ufffd"
    assert (output_folder / "report.html").is_file()
