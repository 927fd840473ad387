"""A whole evaluation on tiny models: what is measured, in which order, and what survives an early end."""

from __future__ import annotations

import json

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.evaluation.measuring import PLAIN, Measuring
from dspark_hf.evaluation.results import to_json
from dspark_hf.evaluation.run import evaluate, num_trials
from dspark_hf.evaluation.settings import EvaluationSettings
from dspark_hf.evaluation.tables import headline, remarks
from tests.evaluation.examples import tiny_models, tiny_sets
from tests.thinning import slow
from tests.tiny import tiny_target

SHORT = {"max_new_tokens": 7, "repeats": 2}


def test_everything_is_measured_and_greedy_outputs_are_identical():
    """A set, a drafter, a temperature or a batch is missing from the result, or a text is not the plain one."""
    models, sets = tiny_models(("one", "two")), tiny_sets(left=3, right=1)
    settings = EvaluationSettings(temperatures=(0.0, 1.0), batch_size=2, max_new_tokens=4, repeats=1)
    names: list[str] = []
    evaluation = evaluate(models, sets, settings, advance=names.append)
    assert len(names) == num_trials(sets, settings) == 2 * (3 + 2 + 1 + 1)
    expected = [("left", 0.0, 3), ("right", 0.0, 1), ("left", 1.0, 3), ("right", 1.0, 1)]
    assert [(one.name, one.temperature, one.num_prompts) for one in evaluation.sets] == expected
    for one_set in evaluation.sets:
        assert [result.drafter for result in one_set.drafters] == ["one", "two"]
        for result in one_set.drafters:
            measured = [(speed.scheduler, speed.batch_size) for speed in result.speeds]
            assert measured == [("adaptive", 1), ("adaptive", 2), ("fixed", 1), ("fixed", 2)]
            assert result.sweep is not None and result.reliability is not None
            for speed in result.speeds:
                assert speed.num_outputs == one_set.num_prompts
                assert speed.num_identical == (one_set.num_prompts if one_set.is_greedy else None)
    assert evaluation.ended_by is None
    assert not evaluation.has_mismatch


def test_greedy_rounds_count_once_and_sampled_rounds_all():
    """Repeats of one greedy answer make the intervals narrow, or sampled answers are thrown away."""
    models, sets = tiny_models(), tiny_sets(only=2)
    evaluation = evaluate(models, sets, EvaluationSettings(temperatures=(0.0, 1.0), **SHORT))
    greedy, sampled = (one.drafters[0] for one in evaluation.sets)
    # every answer has one token of the prefill
    assert greedy.acceptance.num_committed == 2 * 6
    assert sampled.acceptance.num_committed == 2 * 2 * 6


def test_acceptance_is_that_of_whole_blocks():
    """A scheduler that verifies little makes a drafter look good, or its confidence unmeasured."""
    models, sets = tiny_models(), tiny_sets(only=2)
    whole = evaluate(models, sets, EvaluationSettings(schedulers=("fixed",), **SHORT)).sets[0].drafters[0]
    other = (
        evaluate(models, sets, EvaluationSettings(schedulers=("threshold", "adaptive"), **SHORT)).sets[0].drafters[0]
    )
    assert other.acceptance == whole.acceptance
    assert other.reliability == whole.reliability
    assert [speed.scheduler for speed in other.speeds] == ["threshold", "adaptive", "fixed"]
    assert [speed.scheduler for speed in whole.speeds] == ["fixed"]


def test_the_headline_tells_the_speed_that_users_get():
    """A page promises the speed of whole blocks, which nobody gets who says nothing."""
    evaluation = evaluate(tiny_models(), tiny_sets(only=1), EvaluationSettings(**SHORT))
    speed = evaluation.sets[0].drafters[0].speeds[0]
    assert speed.scheduler == "adaptive"
    assert f"{speed.ratio:.2f}x of plain speed" in headline(evaluation)


def test_sampled_answers_differ_between_repeats_and_agree_between_runs():
    """All repeats sample the same text, or an evaluation cannot be done again."""
    models, sets = tiny_models(), tiny_sets(only=1)
    settings = EvaluationSettings(temperatures=(1.0,), **SHORT)
    texts = []
    for _ in range(2):
        measuring = Measuring(models.target, models.drafters, sets, settings)
        measuring.run(lambda name: None)
        texts.append(
            [
                answer.token_ids
                for variant in (PLAIN, "dspark")
                for answer in measuring.measurements[0].trials[0][variant]
            ]
        )
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_variants_take_turns(monkeypatch):
    """Plain decoding always goes first, on a cold or on a warm machine."""
    models, sets, order = tiny_models(("one", "two")), tiny_sets(only=2), []
    answer = Measuring._answer

    def record(self, prompts, variant, *args, **kwargs):
        order.append(variant)
        return answer(self, prompts, variant, *args, **kwargs)

    monkeypatch.setattr(Measuring, "_answer", record)
    evaluate(models, sets, EvaluationSettings(schedulers=("fixed",), **SHORT))
    warm_up, rounds = order[:3], [order[start : start + 3] for start in range(3, len(order), 3)]
    assert sorted(warm_up) == ["one", "plain", "two"]
    assert rounds == [
        ["plain", "one", "two"],
        ["one", "two", "plain"],
        ["two", "plain", "one"],
        ["plain", "one", "two"],
    ]


@pytest.mark.parametrize(
    ("error", "reason"), [slow(KeyboardInterrupt(), "Ctrl-C"), (RuntimeError("out of memory"), "out of memory")]
)
def test_an_early_end_keeps_what_was_measured(error, reason):
    """Hours of measuring are lost, or half a result looks like a whole one."""
    names: list[str] = []

    def stop_in_the_second_set(name: str) -> None:
        names.append(name)
        if len(names) == 4:
            raise error

    sets = tiny_sets(left=3, right=2)
    evaluation = evaluate(tiny_models(), sets, EvaluationSettings(**SHORT), advance=stop_in_the_second_set)
    assert [(one.name, one.num_prompts, one.num_wanted) for one in evaluation.sets] == [
        ("left", 3, 3),
        ("right", 1, 2),
    ]
    assert reason in evaluation.ended_by
    assert "partial" in remarks(evaluation)[0]
    assert json.loads(to_json(evaluation))["is_complete"] is False


def test_an_end_before_the_first_answer_is_an_error(monkeypatch):
    """An empty report is written."""

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Measuring, "_answer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_models(), tiny_sets(only=1), EvaluationSettings(**SHORT))


def test_a_drafter_for_another_target_is_refused_at_once():
    """A drafter that does not fit is found after hours, or measured."""
    models = tiny_models()
    other = DSparkAssistantModel.from_target(tiny_target(vocab_size=96), num_hidden_layers=1, markov_rank=8)
    models.drafters["other"] = other.eval()
    with pytest.raises(ValueError, match="must have the target's `vocab_size`"):
        evaluate(models, tiny_sets(only=1), EvaluationSettings(**SHORT))


def test_a_mismatch_is_told(monkeypatch):
    """A text that differs in fp32 is reported like any other."""
    answer = Measuring._answer

    def spoil(self, prompts, variant, *args, **kwargs):
        given = answer(self, prompts, variant, *args, **kwargs)
        changed = ((*given.token_ids[0][:-1], -1),)
        return given if variant == PLAIN else type(given)(changed, given.seconds, given.rounds)

    monkeypatch.setattr(Measuring, "_answer", spoil)
    evaluation = evaluate(tiny_models(), tiny_sets(only=2), EvaluationSettings(**SHORT))
    assert evaluation.has_mismatch
    assert "0 of 2 outputs identical" in headline(evaluation)
    assert "must not happen" in remarks(evaluation)[0]


def test_rows_end_where_they_end():
    """Padding after a row's end counts as tokens, which makes batches look fast."""
    models = tiny_models()
    text = models.target.generate(torch.tensor([[5, 9, 23]]), max_new_tokens=10, do_sample=False)[0, 3:].tolist()
    models.target.generation_config.eos_token_id = [text[4]]
    models.target.generation_config.pad_token_id = 0
    sets = {"only": [torch.tensor([[5, 9, 23]]), torch.tensor([[7, 30, 2, 11]])]}
    measuring = Measuring(models.target, models.drafters, sets, EvaluationSettings(batch_size=2, **SHORT))
    measuring.run(lambda name: None)
    rows = [row for trial in measuring.measurements[0].batched_trials for row in trial[PLAIN][0].token_ids]
    assert list(rows[0]) == text[: text.index(text[4]) + 1]
    for row, trial in zip(rows, measuring.measurements[0].trials, strict=True):
        assert row == trial[PLAIN][0].token_ids[0]


def test_an_answer_of_one_token_has_no_tau():
    """A set whose answers end at once crashes the evaluation or invents a tau."""
    models = tiny_models()
    models.target.generation_config.pad_token_id = 0
    prompt = torch.tensor([[5, 9, 23]])
    models.target.generation_config.eos_token_id = int(models.target.generate(prompt, max_new_tokens=1)[0, -1])
    evaluation = evaluate(models, {"only": [prompt]}, EvaluationSettings(**SHORT))
    assert evaluation.sets[0].drafters[0].acceptance.tau is None
    assert "no round" in headline(evaluation)
    json.loads(to_json(evaluation))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 1),
        ("temperatures", ()),
        ("temperatures", (-1.0,)),
        ("temperatures", (1.0, 1.0)),
        ("repeats", 0),
        ("batch_size", 0),
        ("num_drafts", 0),
        ("schedulers", ("quick",)),
        ("schedulers", ("fixed", "fixed")),
    ],
)
def test_settings_are_checked(field, value):
    """A wrong setting is found after the models are loaded, or never."""
    with pytest.raises(ValueError, match="must be"):
        EvaluationSettings(**{field: value})
