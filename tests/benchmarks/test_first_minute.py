"""The benchmark of the first minute: its page tells of every set and way, and recordings are kept."""

from __future__ import annotations

from typing import Any

import torch
import typer
from typer.testing import CliRunner

from benchmarks import first_minute as benchmark
from benchmarks.loading import Packaged
from benchmarks.loads import random_prompts
from benchmarks.recordings import Draft, Text, load_texts, save_texts
from benchmarks.simulation import random_target
from dspark_hf import DSparkAssistantModel


class _Tokenizer:
    eos_token_id, vocab_size = None, 256


def test_recordings_come_back_as_they_were(tmp_path):
    """A second run replays something else than the first."""
    texts = [Text((Draft(2, (1.5, 0.5), (3, 4)), Draft(0, (0.1, 0.2), (5, 6))), (7, 8), (3, 4, 9))]
    save_texts(texts, tmp_path / "texts.json")
    assert load_texts(tmp_path / "texts.json") == texts


def test_rates_are_given_those_before():
    """A rate counts drafts behind a wrong one."""
    texts = [Text(tuple(Draft(count, ()) for count in (0, 1, 1, 2)))]
    assert benchmark.rates_of({"a": texts}, 2) == [0.75, 0.333]


def test_a_page_is_written(tmp_path, monkeypatch):
    """The page misses a set, or a drafter that is always wrong looks like a good one."""
    target: Any = random_target("tiny", torch.float32, "cpu")
    model = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=7)
    packaged = Packaged("A target", target, _Tokenizer(), model)
    monkeypatch.setattr(benchmark.loading, "load_packaged", lambda name, dtype: packaged)
    sets = {"questions": random_prompts(5, 256, seed=0)}
    monkeypatch.setattr(benchmark, "make_sets", lambda *args: dict(sets))
    monkeypatch.setattr(benchmark, "LENGTH", 10)
    app = typer.Typer()
    app.command()(benchmark.main)
    page = tmp_path / "page.md"
    few = ["--recordings", str(tmp_path), "--sessions", "2", "--num-prompts", "5", "--costs", "fp32", "--noises", "0"]
    result = CliRunner().invoke(app, [*few, "--dtype", "fp32", "--output", str(page)], catch_exceptions=False)
    assert result.exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert all(f"\n| {name} |" in text for name in ("questions", "random tokens", benchmark.HOPELESS))
    hopeless = next(line for line in text.splitlines() if line.startswith(f"| {benchmark.HOPELESS}"))
    assert all(float(cell) < 1 for cell in hopeless.split("|")[2:5])
    assert len(list(tmp_path.glob("*.json"))) == 3
