"""Thresholds worked out from full rounds, against walks over drafts and against real runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dspark_hf.evaluation.acceptance import summarize_acceptance
from dspark_hf.evaluation.records import RoundRecord, round_records
from dspark_hf.evaluation.sweep import THRESHOLDS, cut_rounds, sweep_thresholds
from dspark_hf.generation.drafting.interface import DraftedBlock
from tests.evaluation.examples import is_falling, random_rounds, tiny_models
from tests.generation.altered import AlteredDrafter
from tests.generation.drafters import ScriptedDrafter
from tests.thinning import slow
from tests.tiny import VOCAB_SIZE, tiny_target

PROMPT = torch.tensor([[5, 9, 23, 8]])


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_cuts_agree_with_a_walk_over_every_draft(threshold):
    """A round accepts drafts behind its cut, or keeps tokens that the cut took away."""
    rounds = random_rounds(3, num_rounds=50)
    for full, cut in zip(rounds, cut_rounds(rounds, threshold), strict=True):
        verified = accepted = 0
        for position, confidence in enumerate(full.confidence or ()):
            if confidence < threshold:
                break
            verified += 1
            accepted += position < full.num_accepted
        assert (cut.num_verified, cut.num_accepted) == (verified, accepted)
        # the tokens of the shorter round, up to where the full one stopped
        assert cut.num_committed == min(accepted + 1, full.num_committed)


def test_no_threshold_is_the_run_itself():
    """The sweep's first point disagrees with the measured tau."""
    prompts = [random_rounds(seed) for seed in range(4)]
    acceptance, first = summarize_acceptance(prompts), sweep_thresholds(prompts)[0]
    assert first.threshold == 0
    assert (first.tau, first.verify_rate) == (acceptance.tau, acceptance.verify_rate)
    assert first.verified_share.value == 1


def test_higher_thresholds_verify_less():
    """The sweep's direction is turned round."""
    points = sweep_thresholds([random_rounds(seed) for seed in range(4)])
    assert [point.threshold for point in points] == list(THRESHOLDS)
    assert is_falling([point.tau.value for point in points])
    assert is_falling([point.verified_share.value for point in points])


def test_confidence_at_the_threshold_is_verified_as_in_a_run():
    """0.9 in fp32 lies below 0.9 in fp64: the sweep cuts what a run verifies."""
    confidence = tuple(torch.tensor([0.9, 0.3]).tolist())
    (cut,) = cut_rounds([RoundRecord(2, 2, 1, 2, confidence)], 0.9)
    assert cut.num_verified == 1


def test_rounds_that_were_cut_already_are_refused():
    """What the target makes of a draft it never saw is made up."""
    with pytest.raises(ValueError, match="`rounds` must have verified every draft, got 1 of 2"):
        cut_rounds([RoundRecord(2, 1, 1, 2, (0.9, 0.1))], 0.5)


def test_no_confidence_no_sweep():
    """A drafter without a confidence head gets a sweep of nothing."""
    assert sweep_thresholds([[RoundRecord(2, 2, 1, 2)]]) is None


def _scripted(target: torch.nn.Module) -> AlteredDrafter:
    """Return a drafter that is wrong at every fifth position, with a confidence that depends on the draft before."""
    script = target.generate(PROMPT, max_new_tokens=64, do_sample=False)
    script[:, ::5] = (script[:, ::5] + 1) % VOCAB_SIZE

    def alter(block: DraftedBlock) -> DraftedBlock:
        previous = torch.nn.functional.pad(block.token_ids[:, :-1], (1, 0), value=1)
        return replace(block, confidence=(previous * 37 % 101) / 100)

    return AlteredDrafter(ScriptedDrafter(target, script, [0], 1.0), alter)


def _rounds(target: torch.nn.Module, drafter: object, prompt: Tensor, threshold: float) -> tuple[RoundRecord, ...]:
    told = {"assistant_model": drafter, "assistant_confidence_threshold": threshold, "drafts": "model"}
    target.generate(prompt, max_new_tokens=24, do_sample=False, **told)
    return round_records(drafter.last_statistics)


@pytest.mark.parametrize(
    ("threshold", "kind"),
    [
        (0.3, "scripted"),
        slow(0.5, "scripted"),
        (0.8, "scripted"),
        slow(0.3, "untrained"),
        slow(0.5, "untrained"),
        slow(0.8, "untrained"),
    ],
)
def test_every_round_is_what_a_real_run_does_from_its_anchor(kind, threshold):
    """The sweep tells of rounds that no run with that threshold would have."""
    target = tiny_target()
    drafter = _scripted(target) if kind == "scripted" else tiny_models().drafters["dspark"]
    text = target.generate(PROMPT, max_new_tokens=64, do_sample=False)
    rounds = _rounds(target, drafter, PROMPT, 0.0)
    cut = cut_rounds(rounds, threshold)
    assert any(one.num_verified < full.num_verified for one, full in zip(cut, rounds, strict=True))
    length = PROMPT.shape[1]
    for expected, full in zip(cut, rounds[:-1], strict=False):
        # the prefill commits this round's anchor, so that the run's first round is this one
        real = _rounds(target, drafter, text[:, :length], threshold)[0]
        assert (real.num_verified, real.num_accepted) == (expected.num_verified, expected.num_accepted)
        length += full.num_committed
