"""Speeds predicted for other settings, against counts and times that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from dspark_hf.evaluation.plots import draw_figures
from dspark_hf.evaluation.prediction import best, speed_by_drafts, speed_by_threshold
from dspark_hf.evaluation.results import DrafterResult, Evaluation, PromptResult
from dspark_hf.evaluation.run import evaluate
from dspark_hf.evaluation.settings import EvaluationSettings
from dspark_hf.evaluation.tables import recommendation
from dspark_hf.evaluation.terminal import print_evaluation
from tests.evaluation.examples import BLOCK_SIZE, tiny_models, tiny_sets


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """A measured one, whose times are replaced where they matter."""
    settings = EvaluationSettings(max_new_tokens=16, repeats=1)
    return evaluate(tiny_models(), tiny_sets(one=2), settings)


def _timed(evaluation: Evaluation, round_seconds: float) -> DrafterResult:
    """Return the first result as if a plain step took a second and a whole block's round `round_seconds`."""
    result = evaluation.sets[0].drafters[0]
    prompts = []
    for one in result.prompts:
        seconds = round_seconds * sum(one.num_tokens) / result.acceptance.tau.value
        plain = float(sum(one.num_plain_tokens))
        prompts.append(replace(one, plain_seconds=(plain,), seconds=(seconds,)))
    return replace(result, prompts=tuple(prompts))


def test_settings_that_were_measured_are_predicted_as_measured(evaluation):
    """The prediction contradicts what it was made from, or counts other tokens than a run does."""
    result = _timed(evaluation, 2.0)
    tau = result.acceptance.tau.value
    # no threshold is whole blocks
    assert speed_by_threshold(result)[0].speed == pytest.approx(tau / 2)
    by_drafts = speed_by_drafts(result, BLOCK_SIZE)
    assert [one.setting for one in by_drafts] == [1, 2, 3, 4, 5]
    # one draft: a fifth of what whole blocks add, and as many tokens more as first drafts are accepted
    first = result.acceptance.rate_by_position[0].value
    assert by_drafts[0].speed == pytest.approx((1 + first) / 1.2)


def test_drafts_that_cost_nothing_are_all_made(evaluation):
    """The best setting is not the fastest one."""
    free = speed_by_drafts(_timed(evaluation, 1.0), BLOCK_SIZE)
    assert best(free).speed == max(one.speed for one in free) == free[-1].speed
    assert best(speed_by_drafts(_timed(evaluation, 50.0), BLOCK_SIZE)).setting == 1


def test_nothing_is_predicted_without_a_round(evaluation):
    """A drafter that never drafted breaks the figures."""
    result = evaluation.sets[0].drafters[0]
    nothing = replace(result, prompts=(PromptResult((1,), (1,), (0.1,), (0.1,), 0, 0, 0, 0),))
    nothing = replace(nothing, acceptance=replace(result.acceptance, tau=None))
    assert speed_by_drafts(nothing, BLOCK_SIZE) == speed_by_threshold(nothing) == ()


@pytest.mark.parametrize(("ratio", "advice"), [(1.4, "leave the scheduler out, 1.40x"), (0.7, "no drafter")])
def test_a_reader_is_told_what_to_set(evaluation, ratio, advice):
    """Pages of numbers, and none says what to do."""
    [one_set] = evaluation.sets
    [result] = one_set.drafters
    speeds = tuple(replace(speed, ratio=ratio if speed.scheduler == "adaptive" else 0.5) for speed in result.speeds)
    changed = replace(evaluation, sets=(replace(one_set, drafters=(replace(result, speeds=speeds),)),))
    told = recommendation(changed)
    assert told.startswith(f"Recommended here: {advice}")
    assert "num_assistant_tokens=" in told


def test_screens_fit_80_columns(evaluation):
    """Tables are cut off, or wrapped in the middle of a number, where a terminal is 80 columns wide."""
    long = replace(
        evaluation, sets=tuple(replace(one, name="a-long-name-of-a-prompt-file" * 2) for one in evaluation.sets)
    )
    for shown in (evaluation, long):
        console = Console(width=80, record=True, no_color=True)
        print_evaluation(shown, console)
        text = console.export_text()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 80
        assert "Recommended here:" in text


def test_figures_say_whose_they_are(evaluation):
    """A saved figure shows neither drafter nor target nor the number of prompts."""
    titles = [figure.title for figure in draw_figures(evaluation)]
    assert all("target LlamaForCausalLM, 2 prompts" in title for title in titles)
    assert all("greedy" in title for title in titles[1:])
