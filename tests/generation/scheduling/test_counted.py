"""The schedule of sampled text, which goes by counts: a seed gives the same text again."""

from __future__ import annotations

from itertools import count
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation import decoding
from dspark_hf.generation.scheduling import Batch, RoundOutcome
from dspark_hf.generation.scheduling.choosing import SCHEDULERS
from dspark_hf.generation.scheduling.interface import CallInfo
from tests.generation.frequencies import PROMPT, small_target, smallest_p_value, untrained_drafter
from tests.reference.sampling import SMALLEST_P_VALUE, text_probabilities
from tests.tiny import tiny_target

NUM_SAMPLES = 2000
NEW_TOKENS = 5
NO_CALL: Any = None


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


def _drafts_of(accepts: Any, num_rounds: int, most: int = 7) -> list[int]:
    """Return how many drafts each round makes if `accepts(round)` of them are accepted."""
    schedule = SCHEDULERS["counted"]().start(NO_CALL)
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


def test_calls_do_not_need_a_target() -> None:
    """A schedule by counts looks at the machine or at earlier calls."""
    fields = dict.fromkeys(CallInfo.__dataclass_fields__)
    assert SCHEDULERS["counted"]().start(CallInfo(**fields)).num_drafts(Batch(limits=(5,), num_live=1)) > 0  # type: ignore[arg-type]
