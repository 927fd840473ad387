"""The schedule of sampled text, which goes by counts: a seed gives the same text again."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation import decoding
from dspark_hf.generation.drafting.lookup import Offer
from dspark_hf.generation.scheduling import Batch, RoundOutcome
from dspark_hf.generation.scheduling.choosing import SCHEDULERS
from dspark_hf.generation.scheduling.interface import CallInfo, Choice
from tests.generation.frequencies import PROMPT, small_target, smallest_p_value, untrained_drafter
from tests.reference.sampling import SMALLEST_P_VALUE, text_probabilities
from tests.tiny import tiny_target

NUM_SAMPLES = 2000
NEW_TOKENS = 5


def _call(rates: list[float] | None = None, dtype: torch.dtype = torch.bfloat16) -> CallInfo:
    fields = dict.fromkeys(CallInfo.__dataclass_fields__)
    drafter = SimpleNamespace(accept_rates=rates)
    target = SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu"), dtype=dtype))
    return CallInfo(**fields | {"drafter": drafter, "target": target})  # type: ignore[arg-type]


def _default(drafter: DSparkAssistantModel) -> DSparkAssistantModel:
    drafter.scheduler, drafter.drafts = None, "both"
    return drafter


def _write(scheduler: str | None, seconds: float, drafter: DSparkAssistantModel, target: Any) -> Tensor:
    """Sample with a clock that ticks `seconds` more each time it is asked."""
    torch.manual_seed(0)
    ticks = count()
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": True, "scheduler": scheduler}
    with patch.object(decoding, "perf_counter", lambda: seconds * next(ticks) ** 2):
        return target.generate(torch.tensor([[5, 6, 7, 5, 6]]), assistant_model=drafter, **options)


def test_a_seed_gives_the_same_text_again() -> None:
    """With sampling, the default gives another text for the same seed when the machine is slow, or the second time."""
    target = tiny_target("llama")
    drafter = _default(untrained_drafter(target))
    texts = [_write(None, seconds, drafter, target) for seconds in (1e-6, 1e-6, 1.0)]
    assert drafter.last_statistics is not None and drafter.last_statistics.scheduler == "counted"
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "sampling": "invariant"}])
def test_what_repeats_anyway_goes_by_the_clock(options: dict[str, Any]) -> None:
    """Greedy and invariant texts pay for a repetition that they have for nothing."""
    target = tiny_target("llama")
    drafter = _default(untrained_drafter(target))
    target.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, assistant_model=drafter, **options)
    assert drafter.last_statistics is not None and drafter.last_statistics.scheduler == "adaptive"


@pytest.mark.slow
def test_the_text_follows_the_target() -> None:
    """Sampled text under the default is not the target's."""
    target = small_target()
    drafter = _default(untrained_drafter(target))
    samples = target.generate(
        PROMPT.expand(NUM_SAMPLES, -1), max_new_tokens=NEW_TOKENS, do_sample=True, assistant_model=drafter
    )[:, len(PROMPT) :]
    statistics = drafter.last_statistics
    assert statistics is not None and 0.1 < statistics.num_accepted / statistics.num_verified < 0.95
    assert smallest_p_value(samples, text_probabilities(target, PROMPT, NEW_TOKENS)) > SMALLEST_P_VALUE


def _drafts_of(accepts: Any, num_rounds: int, most: int = 7, call: CallInfo | None = None) -> list[int]:
    """Return how many drafts each round makes if `accepts(round)` of them are accepted."""
    schedule = SCHEDULERS["counted"]().start(call or _call())
    batch, made = Batch(limits=(most,), num_live=1), []
    for number in range(num_rounds):
        num_drafts = schedule.num_drafts(batch)
        made.append(num_drafts)
        schedule.observe(RoundOutcome(batch, num_drafts, [num_drafts], [min(accepts(number), num_drafts)]))
    return made


def test_counts_decide_how_far_is_drafted() -> None:
    """A hopeless drafter is asked again and again, a good one too little, or none is tried again."""
    assert _drafts_of(lambda number: 7, 100)[-1] == 7
    hopeless = _drafts_of(lambda number: 0, 400)
    tried = [number for number, num_drafts in enumerate(hopeless) if num_drafts]
    assert len(tried) < 24 and tried[-1] > 100
    assert _drafts_of(lambda number: 1, 100)[-1] in (1, 2)
    # it gets better after all
    assert _drafts_of(lambda number: 0 if number < 100 else 7, 400)[-1] > 1


def test_a_call_starts_from_what_the_drafter_has_shown() -> None:
    """Every call drafts too far until it has counted anew what is known of the drafter."""
    modest = _drafts_of(lambda number: 0, 1, call=_call([0.4, 0.3, 0.3]))
    assert modest < _drafts_of(lambda number: 0, 1) <= _drafts_of(lambda number: 0, 1, call=_call([0.9]))
    # a drafter that was never right is tried for all that, and believed once it is
    assert _drafts_of(lambda number: 7, 400, call=_call([0.0] * 7))[-1] > 4


def _choice(offer: Offer, call: CallInfo, *, most: int = 7) -> Choice:
    """Return what one row's first round chooses, where a drafter may make `most` drafts and 15 may be looked up."""
    return SCHEDULERS["counted"]().start(call).choose(Batch(limits=(most,), num_live=1, rooms=(15,)), [offer])


def _offer(*chances: float) -> Offer:
    return Offer(tuple(range(len(chances))), chances)


def test_lookups_are_weighed_against_what_passes_cost() -> None:
    """Sampled calls in fp32 on a CPU look up whatever has a fair chance, and lose time by it."""
    hopeless, in_fp32 = _call([0.1]), _call([0.1], dtype=torch.float32)
    assert _choice(_offer(0.3, 0.3), in_fp32) == Choice(0)
    assert _choice(_offer(0.3, 0.3), hopeless) == Choice(0, (1,))
    assert _choice(_offer(0.9, 0.9), in_fp32) == Choice(0, (2,))
    # no drafter at all
    assert _choice(_offer(0.35), in_fp32, most=0) == Choice(0)
    assert _choice(_offer(0.9, 0.9), in_fp32, most=0) == Choice(0, (2,))
    # a pass is as wide for rows that have no offer
    pair = Batch(limits=(7,) * 2, num_live=2, rooms=(15,) * 2)
    for offers, looked_up in (([_offer(0.5), _offer()], ()), ([_offer(0.5)] * 2, (1, 1))):
        assert SCHEDULERS["counted"]().start(in_fp32).choose(pair, offers) == Choice(0, looked_up)


def test_wide_passes_are_dear_in_fp32() -> None:
    """On a CPU, sampled calls in fp32 pay for drafts that are not worth their passes there."""
    in_fp32 = _call(dtype=torch.float32)
    assert _drafts_of(lambda number: 0, 1, call=in_fp32) < _drafts_of(lambda number: 0, 1)
    hopeful, plain = (_drafts_of(lambda number: number % 3 == 0, 100, call=call) for call in (_call(), in_fp32))
    assert sum(plain) < sum(hopeful)
