"""What a training run says of itself: the tau and the speed-up that it may bring, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import monotonic
from typing import Any

from transformers import TrainerCallback

from dspark_hf.generation.packing import forget_packed
from dspark_hf.generation.scheduling.costs.profile import measure_calls
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.training.conversations import Conversation
from dspark_hf.training.expectation import Curve, range_of

# the first steps run the target, choose kernels, and may compile
_STEPS_AWAITED, _STEPS_LEFT_OUT = 20, 5
_CONTEXT = 128
# from so many on they tell more than runs of others do
_EVALUATIONS = 2
_TAU, _BEFORE = "eval_expected_tau", "tau_before"


class Forecast(TrainerCallback):
    """Tell before a run what to expect of it, again once it is known how fast it is, and from its evaluations.

    Args:
        drafter: the drafter that is trained.
        target: its target.
        conversations: the text that it is trained on.
        say: takes a line.
        max_minutes: the run's limit, or None.
        start: held-out tau of the drafter before the run, which is noted in the run's log; None for a fresh one.
    """

    def __init__(
        self,
        drafter: DSparkAssistantModel,
        target: TargetAdapter,
        conversations: Sequence[Conversation],
        say: Callable[[str], None],
        *,
        max_minutes: float | None = None,
        start: float | None = None,
    ):
        self._drafter = drafter
        self._target = target
        self._masks = [one.loss_mask for one in conversations]
        self._num_tokens = int(sum(mask.sum() for mask in self._masks))
        self._say = say
        self._max_minutes = max_minutes
        self._start = start
        self._break_even: float | None = None
        self._first_step = 0
        self._num_steps = 0
        self._times: list[float] = []
        #: what was expected before there were evaluations, in tokens per round
        self.tau: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or args.confidence_only:
            return
        self._first_step, self._times = state.global_step, []
        if self._start is not None and tau_before(state.log_history) is None:
            state.log_history.insert(0, {"step": 0, _BEFORE: self._start})
        self._break_even = measure_break_even(self._drafter, self._target)
        self._tell(args, state.max_steps, "")
        if self._max_minutes is not None:
            self._say(f"How many steps fit into {self._max_minutes:g} minutes is known after {_STEPS_AWAITED}.")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if len(self._times) <= _STEPS_AWAITED:
            self._times.append(monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_known = len(self._times) == _STEPS_AWAITED and state.global_step - self._first_step == _STEPS_AWAITED
        if not is_known or not state.is_world_process_zero or args.confidence_only:
            return
        times = [*self._times[_STEPS_LEFT_OUT:], monotonic()]
        seconds = median(later - sooner for sooner, later in zip(times, times[1:], strict=False))
        steps, left = state.max_steps, state.max_steps - state.global_step
        if self._max_minutes is not None:
            fitting = int((60 * self._max_minutes - (times[-1] - self._times[0])) / seconds)
            steps = state.global_step + max(min(fitting, left), 0)
        minutes = (steps - state.global_step) * seconds / 60
        self._tell(args, steps, f"{seconds:.2g} s a step, {minutes:.3g} minutes to go: ")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # those before an interruption are told as well
        seen = {one["step"]: one[_TAU] for one in state.log_history if _TAU in one and one["step"] > 0}
        is_over = state.global_step >= self._num_steps
        if len(seen) < _EVALUATIONS or is_over or not state.is_world_process_zero or args.confidence_only:
            return
        per_step = self._blocks_per_step(args)
        pairs = [(step * per_step, tau) for step, tau in seen.items()]
        tau = Curve().tau_seen(
            pairs, self._num_steps * per_step, num_tokens=self._num_tokens, block_size=self._drafter.block_size
        )
        self._say(
            f"By its evaluations so far: held-out tau {tau:.2f}{self._speed(tau)} after {self._num_steps:,} steps."
        )

    def _speed(self, tau: float) -> str:
        return "" if self._break_even is None else f", about {tau / self._break_even:.2f} times plain speed"

    def _tell(self, args: Any, steps: int, opening: str) -> None:
        self.tau, self._num_steps = self._expected(args, steps), steps
        text = {"num_tokens": self._num_tokens, "layers": len(self._drafter.layers)}
        blocks = steps * self._blocks_per_step(args)
        self._say(
            f"{opening}expected held-out tau {self.tau:.2f}{self._speed(self.tau)} after {steps:,} steps "
            f"({blocks:,.0f} blocks of {self._num_tokens:,} tokens of text)."
        )
        beyond = range_of(blocks, **text)
        if beyond is not None and not opening:
            self._say(f"A guess: no run that this rests on had {beyond}.")

    def _expected(self, args: Any, steps: int) -> float:
        text = {"num_tokens": self._num_tokens, "layers": len(self._drafter.layers)}
        blocks, size = steps * self._blocks_per_step(args), self._drafter.block_size
        if self._start is None:
            return Curve().tau(blocks, block_size=size, **text)
        return Curve().tau_after(self._start, blocks, block_size=size, **text)

    def _blocks_per_step(self, args: Any) -> float:
        counts = [min(int((mask[:-1] & mask[1:]).sum()), args.num_anchors) for mask in self._masks]
        sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return sequences * sum(counts) / max(len(counts), 1)


def tau_before(log_history: Sequence[dict[str, Any]]) -> float | None:
    """Return the held-out tau that the drafter of a run began with, by its log; None if it was a fresh one."""
    return next((one[_BEFORE] for one in log_history if _BEFORE in one), None)


def measure_break_even(drafter: DSparkAssistantModel, target: TargetAdapter) -> float | None:
    """Return the tau at which whole blocks are as fast as plain steps, or None where it cannot be measured.

    One row after 128 tokens, a moment's measurement beside whatever else runs: `dspark-hf profile` is thorough.
    """
    size = drafter.block_size
    passes = [(1, _CONTEXT, width) for width in (1, size + 1)]
    try:
        table = measure_calls(target, drafter, passes, [(1, _CONTEXT, size)], repeats=3)
    except (ValueError, NotImplementedError):
        # targets that take no such number of tokens, or none back
        return None
    finally:
        # training changes the drafter's weights, and needs the memory
        forget_packed(target.model, drafter)
    plain, whole = (table.verify_seconds(1, width, _CONTEXT) for _, _, width in passes)
    return (whole + table.draft_seconds(1, size, _CONTEXT)) / plain
