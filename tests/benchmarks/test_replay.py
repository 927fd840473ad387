"""The benchmark that replays recorded drafts: its rounds are those of `generate`, and its page tells of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import replay as benchmark
from benchmarks.loading import Packaged
from benchmarks.loads import make_load, random_prompts
from benchmarks.recordings import CONTEXT, Clock, Draft, Text, Written, fewer_right, record, replay
from benchmarks.simulation import random_target
from dspark_hf import DSparkAssistantModel, LookupAssistant
from dspark_hf.generation.scheduling import CallInfo, FixedScheduler
from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.generation.drafters import BLOCK_SIZE, ScriptedDrafter
from tests.thinning import slow

LENGTH = 24
PROMPTS = random_prompts(3, 256, seed=0)
GREEDY = {"do_sample": False, "eos_token_id": None}


def _costs() -> CostTable:
    points = [(rows, CONTEXT, size) for rows in (1, 4) for size in range(1, 9)]
    return CostTable(
        CostCurves({point: 1.0 + 0.1 * point[0] * point[2] for point in points}),
        CostCurves(dict.fromkeys(points, 0.2)),
    )


@pytest.fixture(scope="module")
def target() -> Any:
    return random_target("tiny", torch.float32, "cpu")


@pytest.fixture(scope="module")
def drafter(target: Any) -> ScriptedDrafter:
    """Always right, but for every fourth token of the first row, every third of the second, the second of the last."""
    load = make_load(PROMPTS, 0, target.device, GREEDY)
    options = {"attention_mask": load.attention_mask, "max_new_tokens": LENGTH + BLOCK_SIZE + 1, **load.options}
    script = target.generate(load.token_ids, **options)
    for row in range(3):
        script[row, load.token_ids.shape[1] + 4 - row :: 4 - row] += 1
    return ScriptedDrafter(target, script % 256, (load.attention_mask == 0).sum(1).tolist(), accuracy=1.0)


def test_recorded_blocks_are_right_as_far_as_the_text_goes(target, drafter):
    """Drafts are compared with tokens of another position, or right ones behind a wrong one count."""
    texts = record(target, drafter, PROMPTS, LENGTH)
    assert [len(text.blocks) for text in texts] == [LENGTH] * 3
    for row, text in enumerate(texts):
        gap = 4 - row
        right = [min(gap - 1 - place % gap, BLOCK_SIZE) for place in range(LENGTH)]
        assert [one.num_right for one in text.blocks] == right
        assert all(len(one.margins) == BLOCK_SIZE for one in text.blocks)


@pytest.mark.parametrize("num_drafts", [slow(1), 2, 5])
def test_replayed_rounds_are_those_of_generate(num_drafts, target, drafter):
    """What is simulated is not what `generate` does: where texts end, when rows leave, how much is verified."""
    texts = record(target, drafter, PROMPTS, LENGTH)
    load = make_load(PROMPTS, 0, target.device, GREEDY)
    drafter.widths.clear()
    target.generate(
        load.token_ids,
        attention_mask=load.attention_mask,
        max_new_tokens=LENGTH,
        assistant_model=drafter,
        scheduler="fixed",
        num_assistant_tokens=num_drafts,
        **load.options,
    )
    real = drafter.last_statistics
    schedule = FixedScheduler().start(CallInfo(TargetAdapter(target, []), drafter, 3, num_drafts))
    clock = Clock(_costs(), 0.0, random.Random(0))
    written = replay(schedule, texts, LENGTH, clock, num_drafts)
    assert len(written.rounds) == real.num_target_passes - 1
    assert written.num_tokens == 3 * LENGTH
    assert [drafts for drafts, _ in written.rounds if drafts] == drafter.widths


def test_rounds_cost_what_the_table_says():
    """Speeds are those of other costs, or rows that have left still cost."""
    texts = [Text((Draft(count, (1.0,) * 5),) * 4) for count in (2, 0)]
    schedule = FixedScheduler().start(
        CallInfo(TargetAdapter(random_target("tiny", torch.float32, "cpu"), []), None, 2, 2)
    )
    written = replay(schedule, texts, 4, Clock(_costs(), 0.0, random.Random(0)), 2)
    # both rows, then the second alone, with room for one draft, and then for none
    assert written.rounds == [(2, 2), (1, 1), (0, 0)]
    assert written.seconds == pytest.approx(0.2 + (1 + 0.1 * 6) + 0.2 + (1 + 0.1 * 2) + (1 + 0.1))
    assert replay(schedule, texts, 4, Clock(_costs(), 0.0, random.Random(0)), 0) == Written(
        8, pytest.approx(3.6), [(0, 0)] * 3
    )


def test_blocks_are_made_wrong_and_look_as_before():
    """A worst case gives itself away by its margins, or is none."""
    texts = [Text(tuple(Draft(3, (float(place),) * 5) for place in range(300)))]
    assert fewer_right(texts, 1.0) == texts
    [fewer] = fewer_right(texts, 1 / 3)
    assert 70 < sum(one.num_right == 3 for one in fewer.blocks) < 130
    assert [one.margins for one in fewer.blocks] == [one.margins for one in texts[0].blocks]
    assert not any(one.num_right for one in fewer_right(texts, 0.0)[0].blocks)


def test_a_page_is_written(target, tmp_path, monkeypatch):
    """The page misses a batch size or a case, or a hopeless drafter looks like a good one."""
    model = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=7)
    packaged = Packaged("A target", target, None, model)
    monkeypatch.setattr(benchmark, "load_packaged", lambda name, dtype: packaged)
    monkeypatch.setattr(benchmark, "encode_prompt", lambda prompt, tokenizer: PROMPTS[0])
    monkeypatch.setattr(benchmark, "costs_here", lambda *args: _costs())
    app = typer.Typer()
    app.command()(benchmark.main)
    page = tmp_path / "page.md"
    few = ["--rows", "1,2", "--length", "10", "--batches", "1", "--sessions", "2", "--num-prompts", "2"]
    result = CliRunner().invoke(app, [*few, "--output", str(page)], catch_exceptions=False)
    assert result.exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("\n| 1 |") == text.count("\n| 2 |") == 4
    hopeless = text[text.index("All drafts are wrong") :].splitlines()[4]
    # seven drafts cost most, and nothing is accepted
    three, five, seven = (float(cell) for cell in hopeless.split("|")[2:5])
    assert 1 > three > five > seven


def test_replayed_lookups_are_those_of_generate(target, drafter):
    """What is simulated looks up other tokens than `generate` does, or reads the text too early or too late."""
    prompts = [torch.cat([prompt, prompt]) for prompt in PROMPTS[:1]]
    [text] = record(target, drafter, prompts, LENGTH)
    assistant = LookupAssistant()
    target.generate(
        prompts[0][None],
        max_new_tokens=LENGTH,
        assistant_model=assistant,
        scheduler="fixed",
        pad_token_id=0,
        **GREEDY,
    )
    schedule = FixedScheduler().start(CallInfo(TargetAdapter(target, []), assistant, 1, 15))
    clock = Clock(_costs(), 0.0, random.Random(0))
    written = replay(schedule, [text], LENGTH, clock, 0, longest_lookup=15)
    real = [round_.num_verified[0] for round_ in assistant.last_statistics.rounds]
    assert any(real)
    assert [verified for _, verified in written.rounds] == real
