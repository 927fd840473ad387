"""From what the user said, in the call or on the drafter, to a scheduler."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.call.knobs import read_options
from dspark_hf.generation.scheduling import (
    AdaptiveScheduler,
    AsynchronousScheduler,
    FixedScheduler,
    HardwareAwareScheduler,
    Schedule,
    Scheduler,
    ThresholdScheduler,
)
from dspark_hf.generation.scheduling.choosing import choose_scheduler
from tests.generation.prompts import ragged_prompts
from tests.generation.schedulers import EveryThirdRound
from tests.generation.scheduling.fakes import ListedCosts, new_drafter
from tests.tiny import tiny_target

KINDS = {
    "fixed": FixedScheduler,
    "threshold": ThresholdScheduler,
    "hardware_aware": HardwareAwareScheduler,
    "asynchronous": AsynchronousScheduler,
    "adaptive": AdaptiveScheduler,
}


class _Seen(Scheduler):
    """Say which call it was started for."""

    name = "seen"

    def __init__(self):
        self.calls = []

    def start(self, call) -> Schedule:
        self.calls.append(call)
        return FixedScheduler().start(call)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def _generate(target, num_rows=1, **options):
    settings = {"max_new_tokens": 4, "do_sample": False, **options}
    return target.generate(**ragged_prompts(num_rows), **settings)


def _drafter(target):
    return DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)


@pytest.mark.parametrize("name", KINDS)
def test_names(name):
    """A documented name leads to another scheduler, or to none."""
    assert type(choose_scheduler(name, None)) is KINDS[name]


def test_objects_are_taken_as_they_are():
    """Settings of a scheduler, or a scheduler of the user's own, are lost."""
    for scheduler in (ThresholdScheduler(0.7), HardwareAwareScheduler(costs=ListedCosts([1.0])), EveryThirdRound()):
        assert choose_scheduler(scheduler, None) is scheduler


def test_what_is_chosen_if_nothing_was():
    """The default is not the adaptive scheduler, or a threshold does not lead to its own."""
    assert type(choose_scheduler(None, None)) is AdaptiveScheduler
    chosen = choose_scheduler(None, 0.6)
    assert isinstance(chosen, ThresholdScheduler)
    # a user who says a threshold means the head's confidence
    assert (chosen.threshold, chosen.confidence) == (0.6, "head")
    assert type(choose_scheduler(None, 0.0)) is FixedScheduler


def test_threshold_by_name_takes_the_call_s_threshold():
    """A threshold beside the name of its scheduler is ignored."""
    assert choose_scheduler("threshold", 0.6).threshold == 0.6
    assert choose_scheduler("threshold", 0.0).threshold == 0.0
    assert choose_scheduler("threshold", None).threshold == 0.4
    assert choose_scheduler(ThresholdScheduler(0.6), 0.6).threshold == 0.6


def test_unknown_name():
    """A misspelt name is taken for the default."""
    expected = r"`scheduler` must be one of fixed, threshold, .*adaptive, got 'adaptativ'\. Did you mean 'adaptive'\?"
    with pytest.raises(ValueError, match=expected):
        choose_scheduler("adaptativ", None)


@pytest.mark.parametrize("chosen", [3, AdaptiveScheduler])
def test_neither_name_nor_scheduler(chosen):
    """A class instead of an object fails deep in the decoding loop."""
    with pytest.raises(TypeError, match=r"`scheduler` must be a name or a Scheduler, got (int|ABCMeta)\. Names are"):
        choose_scheduler(chosen, None)


@pytest.mark.parametrize("chosen", ["fixed", "adaptive", "hardware_aware", ThresholdScheduler(0.4)])
def test_threshold_against_the_scheduler(chosen):
    """One of two choices that contradict each other is ignored."""
    expected = r"`assistant_confidence_threshold` must agree with the scheduler, got 0\.6 with .*\. Leave one of"
    with pytest.raises(ValueError, match=expected):
        choose_scheduler(chosen, 0.6)


def test_threshold_against_a_scheduler_without_a_name():
    """A scheduler of the user's own fails with an AttributeError instead of the reason."""

    class Mine(FixedScheduler):
        pass

    class Nameless(Scheduler):
        def start(self, call) -> Schedule:
            return FixedScheduler().start(call)

    for scheduler in (Mine(), Nameless()):
        expected = rf"must agree with the scheduler, got 0\.6 with '{type(scheduler).__name__}'"
        with pytest.raises(ValueError, match=expected):
            choose_scheduler(scheduler, 0.6)


@pytest.mark.parametrize("threshold", [-0.1, 1.5])
def test_threshold_that_is_no_probability(threshold):
    """A threshold in percent rejects every draft."""
    with pytest.raises(ValueError, match=rf"`threshold` must lie in \[0, 1\], got {threshold}\. It is compared"):
        ThresholdScheduler(threshold)


def test_tensor_parallelism():
    """Processes that run a target together decide by clocks of their own, and wait for each other for ever."""
    assert type(choose_scheduler(None, None, is_tensor_parallel=True)) is FixedScheduler
    assert type(choose_scheduler("threshold", None, is_tensor_parallel=True)) is ThresholdScheduler
    for name in ("hardware_aware", "asynchronous", "adaptive"):
        expected = (
            rf"`scheduler` must be 'fixed' or 'threshold' under tensor parallelism, got '{name}'\. The processes'"
        )
        with pytest.raises(ValueError, match=expected):
            choose_scheduler(name, None, is_tensor_parallel=True)
        with pytest.raises(ValueError, match=expected):
            choose_scheduler(KINDS[name](), None, is_tensor_parallel=True)


def test_a_tensor_parallel_target_is_noticed(target, monkeypatch):
    """The default runs on a target that several processes share."""
    monkeypatch.setattr(type(target), "tp_size", 2, raising=False)
    assert type(read_options(GenerationConfig(), new_drafter(), target, None).scheduler) is FixedScheduler


def test_the_call_goes_before_the_drafter(target):
    """A scheduler in the call is overruled by the drafter's, which was chosen for all calls."""
    drafter, ours = _drafter(target), _Seen()
    drafter.scheduler = "adaptive"
    _generate(target, assistant_model=drafter, scheduler=ours)
    _generate(target, custom_generate=drafter.decode, scheduler=ours)
    assert len(ours.calls) == 2
    # nothing of the call stays
    drafter.scheduler = theirs = _Seen()
    _generate(target, assistant_model=drafter)
    assert (len(theirs.calls), len(ours.calls)) == (1, 2)


def test_a_threshold_in_the_call_goes_before_the_drafter(target):
    """A threshold in the call is refused, or ignored, since the drafter has a scheduler."""
    drafter = _drafter(target)
    drafter.scheduler = theirs = _Seen()
    _generate(target, assistant_model=drafter, assistant_confidence_threshold=0.5)
    _generate(target, assistant_model=drafter, assistant_confidence_threshold=0.0)
    assert not theirs.calls


def test_conflicts_are_found_before_any_work(target, monkeypatch):
    """A call that contradicts itself fails after the prompt was processed."""
    drafter = _drafter(target)

    def refuse(*args, **kwargs):
        raise AssertionError("the target ran before the request was refused")

    monkeypatch.setattr(target.model, "forward", refuse)
    with pytest.raises(ValueError, match="must agree with the scheduler"):
        _generate(target, assistant_model=drafter, assistant_confidence_threshold=0.5, scheduler="fixed")
    with pytest.raises(ValueError, match="`scheduler` must be one of"):
        _generate(target, assistant_model=drafter, scheduler="none")
    drafter.scheduler = "none"
    with pytest.raises(ValueError, match="`scheduler` must be one of"):
        _generate(target, assistant_model=drafter)


def test_scheduler_without_a_drafter(target):
    """A scheduler that nothing schedules is silently ignored."""
    with pytest.raises(ValueError, match=r"`scheduler` must be left out unless a DSpark drafter assists, got 'fixed'"):
        _generate(target, scheduler="fixed")


@pytest.mark.parametrize("do_sample", [False, True])
def test_schedulers_know_the_call(target, do_sample):
    """A scheduler measures, or remembers, for another batch than the one that is decoded."""
    drafter, seen = _drafter(target), _Seen()
    _generate(target, 3, assistant_model=drafter, scheduler=seen, num_assistant_tokens=2, do_sample=do_sample)
    [call] = seen.calls
    assert (call.num_rows, call.max_drafts, call.prompt_length) == (3, 2, 17)
    assert (call.drafter, call.target.model, call.is_sampling) == (drafter, target, do_sample)
