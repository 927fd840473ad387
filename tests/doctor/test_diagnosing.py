"""`diagnose` names what is wrong with a pair, and gives a good one a clean bill."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console

from dspark_hf import DSparkAssistantModel
from dspark_hf.doctor import Diagnosis, diagnose, diagnosing
from dspark_hf.doctor.drafting import Outcome
from dspark_hf.doctor.results import EXIT_STATUS, Trial
from dspark_hf.doctor.trials import Gain
from dspark_hf.doctor.verdicts import judge
from tests.doctor import world
from tests.thinning import slow


@pytest.fixture(scope="module")
def target() -> Any:
    return world.make_target()


def _diagnose(target: Any, drafter: DSparkAssistantModel, **options: Any) -> Diagnosis:
    options = {"prompts": world.prompts(), "max_new_tokens": 22, "measures_costs": False, **options}
    return diagnose(target, drafter, **options)


def _cause(target: Any, drafter: DSparkAssistantModel, **options: Any) -> str:
    found = _diagnose(target, drafter, **options)
    assert found.verdict.exit_status == EXIT_STATUS[found.verdict.cause] > 0
    return found.verdict.cause


def test_a_good_pair_gets_a_clean_bill(target: Any) -> None:
    """A user is sent to look for a fault that is not there."""
    found = _diagnose(target, world.make_drafter(target), tokenizer=world.make_tokenizer())
    assert found.verdict.cause == "fits" and found.verdict.exit_status == 0, found.verdict
    assert found.is_identical
    assert [check.name for check in found.checks if check.is_right is False] == []
    assert found.trials[0].tau > world.BLOCK_SIZE
    # no other reading is as good, so that the test below can tell them apart
    others = [trial for trial in found.trials[1:] if trial.cause != "mask"]
    assert len(others) == 6 and max(trial.tau for trial in others) < 0.8 * found.trials[0].tau


def test_acceptance_is_what_generate_accepts(target: Any) -> None:
    """Teacher-forced acceptance is another number than the one that users see."""
    drafter = world.make_drafter(target, target_layer_ids=[1])
    drafted = {"assistant_model": drafter, "scheduler": "fixed", "drafts": "model", "do_sample": False}
    rounds = [0, 0]
    for prompt in world.prompts(4):
        target.generate(prompt[None], max_new_tokens=22, **drafted)
        statistics = drafter.last_statistics
        assert statistics is not None
        rounds[0] += statistics.verified_by_position[0]
        rounds[1] += statistics.accepted_by_position[0]
    trial = _diagnose(target, drafter, prompts=world.prompts(4)).trials[0]
    expected, error = rounds[1] / rounds[0], 0.5 / rounds[0] ** 0.5
    assert 0.1 < expected < 0.9
    assert abs(trial.accept_rates[0] - expected) < 3 * error


@pytest.mark.parametrize(
    ("cause", "fields", "settings"),
    [
        ("slots", {"sample_from_anchor": False, "block_size": 3}, {"sample_from_anchor": True, "block_size": 4}),
        ("taps", {"target_layer_ids": [1]}, {"target_layer_ids": [0]}),
        pytest.param("taps", {"target_layer_ids": [-1]}, {"target_layer_ids": [0]}, marks=pytest.mark.slow),
        ("rotation", {"rope_interleaved": True}, {"rope_interleaved": False}),
        ("mask", {"mask_token_id": 0}, {"mask_token_id": world.MASK}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_misread_drafter_is_told_how_to_be_read(
    target: Any, cause: str, fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    """A file that says the wrong convention, taps, rotation or mask is taken for a bad drafter."""
    drafter = world.make_drafter(target, **fields)
    found = _diagnose(target, drafter, tokenizer=world.make_tokenizer())
    assert found.verdict.cause == cause, found.verdict
    best = max(found.trials, key=lambda trial: trial.tau)
    assert best.settings == settings
    assert all(f"{name}={value}" in found.verdict.sentence for name, value in settings.items())
    # nothing of the drafter was changed
    assert {name: getattr(drafter.config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("cause", "fields"), [("mask", {"mask_token_id": 0}), slow("taps", {"target_layer_ids": [1]}), ("weak", {})]
)
def test_what_little_text_leaves_open_is_looked_at_again(target: Any, cause: str, fields: dict[str, Any]) -> None:
    """A misread drafter gets the verdict of one read rightly where the first few blocks cannot tell the two apart."""
    # of eight answers the drafter is of use in one alone: few blocks show what a reading is worth
    others = world.walking(7, torch.Generator().manual_seed(4), 10)
    said: list[str] = []
    found = _diagnose(
        target,
        world.make_drafter(target, **fields),
        tokenizer=world.make_tokenizer(),
        prompts=[*world.prompts(1), *others],
        max_new_tokens=8,
        say=said.append,
    )
    assert found.verdict.cause == cause, found.verdict
    # a drafter that is read rightly takes no second look
    assert any("again" in step for step in said) == bool(fields)
    assert found.is_identical


def _outcome(*texts: list[int]) -> Outcome:
    return Outcome(torch.tensor([count for text in texts for count in text]), None, world.BLOCK_SIZE)


def test_the_error_of_a_gain_is_that_of_its_mean() -> None:
    """Blocks that overlap pass for so many blocks of their own, and chance for a fault of the file."""
    generator = torch.Generator().manual_seed(1)
    # what happens at a token decides four blocks in a row
    means, errors, naive = [], [], []
    for _ in range(200):
        steps = torch.randn(103, generator=generator)
        sums = steps.unfold(0, 4, 1).sum(-1)
        gain = Gain.of(Outcome(sums, None, 4), Outcome(torch.zeros(100), None, 4))
        means.append(gain.mean)
        errors.append(gain.error)
        naive.append(float(sums.std()) / 10)
    spread = float(torch.tensor(means).std())
    assert 0.75 < float(torch.tensor(errors).mean()) / spread < 1.25
    assert float(torch.tensor(naive).mean()) < 0.6 * spread


def test_what_a_gain_tells() -> None:
    """A mild misreading is passed over for its size, or a reading is dropped for blocks that show nothing."""
    usual = [1, 2, 0, 1] * 32
    mild = [count + (place % 10 == 0) for place, count in enumerate(usual)]
    gain = Gain.of(_outcome(mild), _outcome(usual))
    assert gain.mean == pytest.approx(0.1, abs=0.01) and gain.is_sure() and not gain.is_surely_none()
    same = Gain.of(_outcome(usual), _outcome(usual))
    assert not same.is_sure() and not same.is_possible()
    # of eight blocks that are the same nothing follows
    assert not Gain.of(_outcome(usual[:8]), _outcome(usual[:8])).is_surely_none()
    worse = Gain.of(_outcome([0] * 32), _outcome(usual[:32]))
    assert worse.is_surely_none() and not worse.is_possible()
    assert Gain.of(_outcome([1]), _outcome([0])).error == float("inf")


@pytest.mark.parametrize("gain", [0.1, 0.8])
def test_the_verdict_states_gain_and_error(gain: float) -> None:
    """A pair that is mildly misread gets a clean bill, or the verdict does not say how sure it is."""
    usual = Trial("as configured", "fits", {}, (100, 80), (80, 60))
    better = Trial("taps", "taps", {"target_layer_ids": [1]}, (100, 80), (85, 65), gain, 0.02)
    says = {"prefers_thinking": None, "is_identical": True, "is_fp32": True}
    verdict = judge([], usual, better, None, **says)
    assert verdict.cause == "taps" and f"{gain:.2f} ± 0.02 drafts a block" in verdict.sentence
    assert ("costs little" in verdict.sentence) == (gain < 0.15)
    doubt = judge([], usual, usual, None, doubtful=better, **says)
    assert doubt.cause == "fits" and f"it may be better, by {gain:.2f} ± 0.02" in doubt.sentence


def test_a_second_look_fits_into_half_a_minute(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A doubtful pair on a slow machine is looked at for minutes, or the doubt is not told."""
    others = world.walking(7, torch.Generator().manual_seed(4), 10)
    options = {"prompts": [*world.prompts(1), *others], "max_new_tokens": 8}
    said: list[str] = []
    monkeypatch.setattr(diagnosing, "_SECONDS", 0.0)
    found = _diagnose(target, world.make_drafter(target, mask_token_id=0), **options, say=said.append)
    assert not any("again" in step for step in said)
    assert "it may be better, by" in found.verdict.sentence


def test_readings_that_are_surely_worse_are_looked_at_briefly(target: Any) -> None:
    """Every reading drafts at all places, though a few tell that it is of no use: a diagnosis takes so much longer."""
    found = _diagnose(target, world.make_drafter(target), prompts=world.prompts(4), max_new_tokens=22)
    full = found.trials[0].num_reached[0]
    assert found.verdict.cause == "fits"
    assert all(trial.num_reached[0] < full for trial in found.trials[1:] if trial.cause != "mask")
    assert all(trial.gain < 0 for trial in found.trials[1:] if trial.cause != "mask")


@pytest.mark.slow
def test_two_mistakes_are_found_together(target: Any) -> None:
    """A file that is mistaken twice seems to be beyond help, since no single correction helps much."""
    drafter = world.make_drafter(target, mask_token_id=0, target_layer_ids=[1])
    best = max(_diagnose(target, drafter, tokenizer=world.make_tokenizer()).trials, key=lambda trial: trial.tau)
    assert best.settings == {"target_layer_ids": [0], "mask_token_id": world.MASK}
    assert best.tau > world.BLOCK_SIZE


def test_positions_off_by_one_are_found(target: Any) -> None:
    """A drafter trained with its blocks one place further on is taken for an untrained one."""
    found = _diagnose(target, world.make_drafter(target, "shifted"))
    assert found.verdict.cause == "positions", found.verdict
    assert "position_shift=1" in found.verdict.sentence


def test_another_target_is_told(target: Any) -> None:
    """A drafter of another model of the same shape is taken for an untrained one."""
    drafter = world.make_drafter(target)
    assert _cause(world.make_target(None), drafter) == "target"


def test_a_slightly_different_target_is_told(target: Any) -> None:
    """A drafter of the base model, or of another revision, seems to fit, or is taken for a stranger."""
    drafter = world.make_drafter(target)
    revised = world.make_target()
    with torch.no_grad():
        for parameter in revised.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    found = _diagnose(revised, drafter)
    assert found.verdict.cause == "revision", found.verdict
    assert found.trials[0].accept_rates[0] > 0.3


def test_a_quantised_target_is_suspected(target: Any) -> None:
    """A target of four bits or fewer is not mentioned where drafts for it fail."""
    drafter, coarse = world.make_drafter(target), world.make_target()
    with torch.no_grad():
        for layer in coarse.model.layers:
            for weight in layer.parameters():
                if weight.ndim == 2:
                    scale = weight.abs().amax(1, keepdim=True) / 1.5
                    weight.copy_((weight / scale).round() * scale)
    found = _diagnose(coarse, drafter)
    assert found.verdict.cause == "quantised", found.verdict


def test_an_untrained_drafter_is_told(target: Any) -> None:
    """A fresh drafter is taken for one of another target."""
    assert _cause(target, world.make_drafter(target, None)) == "untrained"


def test_another_vocabulary_is_told(target: Any) -> None:
    """A drafter whose tokens are numbered otherwise, or are more, is taken for an untrained one."""
    tokenizers = {"tokenizer": world.make_tokenizer(), "drafter_tokenizer": world.make_tokenizer(is_reversed=True)}
    other = world.make_target()
    with torch.no_grad():
        for weight in (other.model.embed_tokens.weight, other.lm_head.weight):
            weight[world.FIRST_REPEATED :] = weight[world.FIRST_REPEATED :].flip(0)
    assert _cause(other, world.make_drafter(target), **tokenizers) == "tokenizer"
    larger = world.make_drafter(target)
    larger.resize_token_embeddings(64)
    found = _diagnose(target, larger)
    assert found.verdict.cause == "sizes" and "vocab_size" in found.verdict.sentence
    assert found.trials == ()


def test_text_with_thinking_is_told(target: Any) -> None:
    """A drafter for answers without thinking is blamed where the template lets the target think, or the reverse."""
    tokenizer = world.make_tokenizer()
    words = [" ".join(f"w{token}" for token in prompt.tolist()[1:]) for prompt in world.prompts()]
    found = _diagnose(target, world.make_drafter(target), tokenizer=tokenizer, prompts=words)
    assert found.verdict.cause == "fits"
    assert [trial.label for trial in found.thinking] == ["enable_thinking=False", "enable_thinking=True"]
    assert found.thinking[0].tau > 4 > 2 > found.thinking[1].tau
    # the same drafter, where thinking is what the template does unless it is told otherwise
    tokenizer.chat_template = tokenizer.chat_template.replace("is defined and enable_thinking", "is not false")
    found = _diagnose(target, world.make_drafter(target), tokenizer=tokenizer, prompts=words)
    assert found.verdict.cause == "thinking", found.verdict
    assert "enable_thinking=False" in found.verdict.sentence


def test_a_target_that_no_drafter_can_assist_is_named() -> None:
    """A diagnosis of a target that is refused ends in an error."""
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"vocab_size": 48, "d_model": 32, "num_heads": 2, "num_layers": 1, "d_ff": 32, "d_kv": 16}
    encoder_decoder = T5ForConditionalGeneration(T5Config(**shape))
    drafter = world.make_drafter(world.make_target())
    found = _diagnose(encoder_decoder, drafter)
    assert found.verdict.cause == "refused" and "encoder-decoder" in found.verdict.sentence


def test_costs_and_what_to_set_are_told(target: Any) -> None:
    """Nobody learns from which tau on drafting pays on this machine."""
    found = _diagnose(target, world.make_drafter(target), measures_costs=True)
    assert found.costs is not None
    assert set(found.costs.pass_ms) == {1, 2, 3, 5}
    assert set(found.costs.break_even) == set(found.costs.speed) == {1, 2, 4}
    assert found.advice
    taus = {count: speed * found.costs.break_even[count] for count, speed in found.costs.speed.items()}
    assert taus[4] == pytest.approx(found.trials[0].tau)


def test_a_diagnosis_is_shown_and_written(target: Any) -> None:
    """The display fails, or JSON holds what JSON cannot."""
    found = _diagnose(target, world.make_drafter(target), tokenizer=world.make_tokenizer())
    console = Console(width=100, record=True, file=StringIO())
    console.print(found)
    shown = console.export_text()
    assert found.verdict.sentence.split(":")[0] in shown and "as configured" in shown
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["verdict"] == {"cause": "fits", "sentence": found.verdict.sentence, "exit_status": 0}
    assert written["trials"][0]["tau"] == pytest.approx(found.trials[0].tau, abs=1e-3)


def test_what_cannot_be_diagnosed_is_refused(target: Any) -> None:
    """A diagnosis rests on no draft at all, or ends in an error that names nothing."""
    drafter = world.make_drafter(target)
    with pytest.raises(ValueError, match="`prompts` must lead to answers of more than 5 tokens"):
        _diagnose(target, drafter, max_new_tokens=4)
    with pytest.raises(ValueError, match="`tokenizer` must be given"):
        diagnose(target, drafter)
    with pytest.raises(TypeError, match="`drafter` must be a DSparkAssistantModel"):
        diagnose(target, target)
