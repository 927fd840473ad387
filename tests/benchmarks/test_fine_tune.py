"""The fine-tune that an adapted drafter is shown on."""

from __future__ import annotations

import json

import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import benchmarks.fine_tune as benchmark
from dspark_hf.demo.tiny import write_tiny_pair


def test_answers_are_learnt_and_questions_are_not(tmp_path, monkeypatch):
    """The fine-tune learns to ask, or changes nothing, or its folder is no target."""
    path, _ = write_tiny_pair(tmp_path)
    monkeypatch.setattr(benchmark, "converted_target", lambda name: path)
    lines = [{"question": "baba", "answer": "dufo fodu"}, {"question": "duba", "answer": "foba"}]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    app = typer.Typer()
    app.command()(benchmark.main)
    given = ["--answers", str(answers), "--output", str(tmp_path / "tuned"), "--max-steps", "2"]
    assert CliRunner().invoke(app, [*given, "--learning-rate", "0.01"], catch_exceptions=False).exit_code == 0
    tuned, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "tuned", path))
    assert not tuned.lm_head.weight.float().equal(before.lm_head.weight.float())
    tokenizer = benchmark.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    first, second = benchmark.read_answers(answers, tokenizer, 9)
    learnt = [token for token in first["labels"] if token >= 0]
    assert tokenizer.decode(learnt, skip_special_tokens=True).strip() == "dufo fodu"
    assert len(first["labels"]) == len(first["input_ids"])
    assert benchmark.read_answers(answers, tokenizer, 1) == [first] != [second]


def test_an_interrupted_fine_tune_goes_on(tmp_path, monkeypatch):
    """An hour of steps is lost when the machine runs out of memory at the last one."""
    path, _ = write_tiny_pair(tmp_path)
    monkeypatch.setattr(benchmark, "converted_target", lambda name: path)
    monkeypatch.setattr(benchmark, "_SAVE_EVERY", 1)
    (tmp_path / "answers.jsonl").write_text('{"question": "baba", "answer": "dufo fodu"}\n', encoding="utf-8")
    original, steps = benchmark.Trainer.training_step, []

    def step(self, *arguments, **options):
        if self.state.global_step == 2 and not steps.count("stopped"):
            steps.append("stopped")
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return original(self, *arguments, **options)

    monkeypatch.setattr(benchmark.Trainer, "training_step", step)
    app = typer.Typer()
    app.command()(benchmark.main)
    given = ["--answers", str(tmp_path / "answers.jsonl"), "--output", str(tmp_path / "tuned"), "--max-steps", "3"]
    assert CliRunner().invoke(app, given).exit_code
    CliRunner().invoke(app, given, catch_exceptions=False)
    assert steps == [0, 1, "stopped", 2]
    assert (tmp_path / "tuned" / "config.json").is_file()
