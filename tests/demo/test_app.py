"""The demo on a tiny pair: four kinds of prompts, one table, and a verdict that follows from the texts."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from transformers import AutoConfig, LlamaConfig

from dspark_hf.demo import app
from dspark_hf.demo.app import DemoOptions, run_demo
from dspark_hf.demo.comparison import Answer, Comparison, summarize
from dspark_hf.demo.dtypes import choose_dtype, measure_bf16
from dspark_hf.demo.prompts import DEMO_PROMPTS
from dspark_hf.demo.tiny import write_tiny_pair
from dspark_hf.generation.statistics import SpeculationStatistics


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny target and its drafter, as folders."""
    return write_tiny_pair(tmp_path_factory.mktemp("pair"))


def _shown(pair, **options) -> tuple[str, bool]:
    target, drafter = map(str, pair)
    file = io.StringIO()
    given = {"dtype": "fp32", "max_new_tokens": 5, "num_runs": 1, **options}
    is_right = run_demo(DemoOptions(target=target, drafter=drafter, **given), Console(file=file, width=80))
    return file.getvalue(), is_right


def test_four_kinds_end_in_a_table(pair):
    """A kind of prompt is not asked, or the table does not tell its gain."""
    shown, is_right = _shown(pair)
    assert is_right and "Identical text" in shown
    table = shown.partition("with and without drafts")[2]
    for kind in (*DEMO_PROMPTS, "all"):
        assert re.search(rf"^ *{kind} +yes .*\d\.\d\dx *$", table, re.MULTILINE), kind
    assert len(DEMO_PROMPTS) == 4
    # the drafter's own positions, seven at most, and not those of longer lookups
    assert "draft 8" not in shown


def test_a_text_that_parts_is_shown(pair, monkeypatch):
    """In fp32 a text that parts passes for right; or nobody is told where it parted, and between what."""
    answer = app.answer

    def other(target, inputs, **options):
        given = answer(target, inputs, **options)
        if "assistant_model" in options and given.token_ids[3:]:
            given.token_ids[3] = 9
        return given

    monkeypatch.setattr(app, "answer", other)
    shown, is_right = _shown(pair)
    assert not is_right and "must not happen in fp32" in shown
    assert "They part after 3 tokens, where the target's two best were" in " ".join(shown.split())
    shown, is_right = _shown(pair, dtype="bf16")
    assert is_right and "Texts can differ here" in " ".join(shown.split())


def test_dtype_is_measured(pair, monkeypatch):
    """`auto` is one dtype whatever the machine, or nobody is told which."""
    monkeypatch.setattr(app, "measure_bf16", lambda config: 2.0)
    assert "bf16 (bf16 passes are 2.00 times as fast" in _shown(pair, dtype="auto", max_new_tokens=2)[0]
    assert [choose_dtype(gain) for gain in (0.5, 1.0, 1.5)] == ["fp32", "fp32", "bf16"]
    config = AutoConfig.from_pretrained(pair[0])
    assert isinstance(config, LlamaConfig) and 0 < measure_bf16(config, seconds=0.0) < float("inf")


def test_acceptance_by_position_is_the_drafters():
    """Looked-up drafts lengthen and lift the drafter's acceptance by position."""
    statistics = SpeculationStatistics()
    statistics.add_round(num_drafted=3, num_verified=3, num_accepted=1, num_committed=2)
    statistics.add_round(num_drafted=9, num_verified=9, num_accepted=9, num_committed=10, source="lookup")
    comparison = Comparison("code", None, [Answer([1, 2], 1.0, 2, None)], [Answer([1, 2], 0.5, 1, statistics)])
    summary = summarize([comparison])
    assert summary.accept_rates == [1.0, 0.0, 0.0]
    assert (summary.num_looked_up, summary.lookup_rate) == (9, 1.0)


@pytest.mark.parametrize("num_prompts", [0, 4])
def test_more_prompts_than_there_are_is_told(num_prompts):
    """A number that cannot be served is cut without a word."""
    with pytest.raises(ValueError, match=r"must lie in \[1, 3\]"):
        DemoOptions(num_prompts=num_prompts)
