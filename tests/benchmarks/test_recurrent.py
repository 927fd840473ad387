"""The page of recurrent targets."""

from __future__ import annotations

import torch
import typer
from typer.testing import CliRunner

import benchmarks.recurrent as benchmark

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "vocab_size": 64,
    "num_attention_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}


def test_a_page_is_written(tmp_path, monkeypatch):
    """The page misses a width or a dtype, or passes are not those of a target that is rolled back."""
    monkeypatch.setattr(benchmark, "SHAPE", {**benchmark.SHAPE, **SMALL})
    app = typer.Typer()
    app.command()(benchmark.main)
    page = tmp_path / "page.md"
    few = ["--layers", "4", "--context", "5", "--repeats", "1", "--output", str(page)]
    assert CliRunner().invoke(app, few, catch_exceptions=False).exit_code == 0
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows] == ["width", "---:", "1", "2", "4", "8", "16"]
    assert rows[2].split()[3] == "1.00"


def test_half_of_a_pass_is_taken_back(monkeypatch):
    """What is timed keeps everything, which costs nothing."""
    adapter = benchmark.build(torch.float32, **SMALL, num_hidden_layers=4)
    lengths = []
    choose = benchmark.choose_target
    monkeypatch.setattr(
        benchmark, "choose_target", lambda *args, **options: lengths.append(choose(*args, **options)) or lengths[0]
    )
    benchmark.measure(adapter, 5, 1)
    kept = sum(max(width // 2, 1) for width in benchmark.WIDTHS)
    assert lengths[0]._length == 5 + 2 * kept
