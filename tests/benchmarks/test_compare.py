"""The benchmark of all ways side by side: what it counts, that it goes on where it was, and its page and figure."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import compare as benchmark
from benchmarks import compare_report
from benchmarks.compare import ASSISTED, FIXED, LOOKUP, PROMPT_LOOKUP, UNDRAFTED, Settings, measure_case
from benchmarks.compare_report import AGAIN, Case, Results, draw, spread
from benchmarks.loading import Packaged
from benchmarks.loads import DEFAULT, random_prompts
from benchmarks.provenance import describe_run
from benchmarks.simulation import random_target
from dspark_hf import DSparkAssistantModel
from tests.thinning import slow

NUM_PROMPTS, LENGTH = 2, 12
SETTINGS = Settings("prompts.jsonl", NUM_PROMPTS, LENGTH, False, "")


@pytest.fixture(scope="module")
def packaged() -> Packaged:
    target: Any = random_target("tiny", torch.float32, "cpu")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=7)
    return Packaged("A target", target, None, drafter)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, packaged):
    monkeypatch.setattr(benchmark, "load_packaged", lambda name, dtype: packaged)
    monkeypatch.setattr(benchmark, "prompts_of", lambda *args: random_prompts(NUM_PROMPTS, 256, seed=0))
    # a process of its own for each would take a minute
    monkeypatch.setattr(benchmark, "measure_fresh", measure_case)


@pytest.mark.parametrize("temperature", [0.0, slow(1.0)])
def test_a_pass_of_plain_gives_a_token(temperature):
    """Passes or tokens of the warm-up count, or prefills make a round longer than it is."""
    found = measure_case(Case("smollm2", "fp32", temperature, "chat", AGAIN, 0), SETTINGS)
    assert found["tau"] == 1.0 and found["passes_per_token"] == 1.0
    assert len(found["ratios"]) == len(found["speeds"]) == 2
    assert found["parts"] == [0.0, 0.0, 0.0]
    assert found["identical"][1] == 2 * NUM_PROMPTS
    assert temperature or found["identical"][0] == 2 * NUM_PROMPTS


@pytest.mark.parametrize("way", [PROMPT_LOOKUP, slow(DEFAULT), FIXED, slow(LOOKUP), UNDRAFTED])
def test_ways_are_counted_over_cold_and_warm_runs(way, packaged):
    """A way's passes are another's, or its text is not compared with plain's."""
    found = measure_case(Case("smollm2", "fp32", 0.0, "chat", way, 0), SETTINGS)
    num_tokens = 2 * NUM_PROMPTS * LENGTH
    num_passes = round(found["passes_per_token"] * num_tokens)
    assert found["identical"] == [2 * NUM_PROMPTS] * 2
    prefills = 2 * NUM_PROMPTS
    assert found["tau"] == pytest.approx((num_tokens - prefills) / (num_passes - prefills))
    assert (sum(found["parts"]) > 0) == (way != PROMPT_LOOKUP)
    if way == FIXED:
        statistics = packaged.drafter.last_statistics
        assert statistics.scheduler == "fixed"
        assert not statistics.by_source["lookup"].num_drafted
    weights = {weight.data_ptr(): weight.nbytes for weight in packaged.target.parameters()}
    assert found["weight_bytes"] == sum(weights.values()) < found["peak_bytes"]


def test_a_small_model_of_transformers_drafts(tmp_path, packaged):
    """Transformers' own assisted generation is left out where a small model is at hand."""
    packaged.target.save_pretrained(tmp_path)
    settings = replace(SETTINGS, draft_model=str(tmp_path))
    found = measure_case(Case("smollm2", "fp32", 0.0, "chat", ASSISTED, 0), settings)
    assert found["identical"] == [2 * NUM_PROMPTS] * 2
    # it is the target itself, and always right
    assert found["tau"] > 2


@pytest.mark.parametrize("option", ["--models", "--dtypes", "--sets", "--ways"])
def test_unknown_names_are_refused_first(option, monkeypatch):
    """A misspelt name comes to light after hours."""
    monkeypatch.setattr(benchmark, "measure_fresh", lambda *args: pytest.fail("measured"))
    app = typer.Typer()
    app.command()(benchmark.main)
    result = CliRunner().invoke(app, [option, "nonsense"])
    assert result.exit_code == 2 and "nonsense" in result.output


def test_a_single_run_has_no_error():
    """An error is made up, or cold and warm are mixed."""
    runs = [{"ratios": [1.0, 2.0]}, {"ratios": [3.0, 2.0]}]
    assert spread(runs, "cold") == (2.0, pytest.approx(1.0))
    assert spread(runs, "warm") == (2.0, 0.0)
    assert spread(runs[:1], "cold") == (1.0, None)


def test_a_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
    """What was measured is measured again, other settings' measurements are taken for it, or the page misses a way."""
    measured: list[Case] = []

    def count(case: Case, settings: Settings) -> dict[str, Any]:
        measured.append(case)
        return measure_case(case, settings)

    monkeypatch.setattr(benchmark, "measure_fresh", count)
    monkeypatch.setattr(benchmark, "READ", 2**20)
    monkeypatch.setattr(benchmark, "converted_target", lambda name: None)
    monkeypatch.setattr(benchmark, "check_plotting", lambda: None)
    monkeypatch.setattr(benchmark, "draw", lambda results: b"a figure")
    app = typer.Typer()
    app.command()(benchmark.main)
    page, journal = tmp_path / "compare.md", tmp_path / "compare.jsonl"

    def run(*options: str) -> str:
        few = ["--models", "smollm2", "--dtypes", "fp32", "--sets", "chat", "--temperatures", "0", "--runs", "1"]
        few += ["--max-new-tokens", "4", "--output", str(page), "--journal", str(journal), *options]
        assert CliRunner().invoke(app, few, catch_exceptions=False).exit_code == 0
        return page.read_text(encoding="utf-8")

    run("--ways", f"{AGAIN},{LOOKUP}")
    assert len(measured) == 2
    text = run()
    assert "one process each" in text
    ways = [case.way for case in measured]
    assert ways == [AGAIN, LOOKUP, PROMPT_LOOKUP, DEFAULT, FIXED, UNDRAFTED]
    assert all(text.count(f"\n| chat | {way} |") == 1 for way in ways)
    assert text.rstrip().splitlines()[-1].startswith("- A target, fp32, greedy, chat: ")
    assert page.with_suffix(".png").read_bytes() == b"a figure"
    run("--num-prompts", "3", "--ways", AGAIN)
    assert len(measured) == 7
    assert len([json.loads(line) for line in Path(journal).read_text(encoding="utf-8").splitlines()]) == 7


def test_the_command_of_a_page_can_be_pasted(monkeypatch):
    """A name of two words falls apart when the command is run again."""
    monkeypatch.setattr(sys, "argv", ["benchmarks/compare.py", "--sets", "writing code", "--runs", "1"])
    assert describe_run()[-1] == "- again: `python -m benchmarks.compare --sets 'writing code' --runs 1`"


def test_a_figure_is_drawn():
    """There is no figure where a set lacks a way, or there was a single run."""
    pytest.importorskip("matplotlib")
    few = [{"ratios": [1.1, 1.2], "title": "A target"}]
    sets = {"chat": {AGAIN: few, LOOKUP: few * 2}, "copying": {DEFAULT: few}}
    assert draw(Results({("smollm2", "fp32", 0.0): sets})).startswith(b"\x89PNG")


def test_every_panel_shows_all_its_points(monkeypatch):
    """Points that lie above those of the first panel are cut off."""
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr(compare_report, "to_png", figures.append)
    found = {
        ("smollm2", dtype, 0.0): {"chat": {DEFAULT: [{"ratios": [ratio, ratio], "title": "A target"}]}}
        for dtype, ratio in (("bf16", 1.5), ("fp32", 4.5))
    }
    draw(Results(found))
    (figure,) = figures
    assert all(panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > 4.5 for panel in figure.axes if panel.axison)
