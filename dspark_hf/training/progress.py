"""What a training run shows while it runs, and when it stops for now."""

from __future__ import annotations

from time import monotonic
from typing import Any

from transformers import IntervalStrategy, TrainerCallback

from dspark_hf.console import Steps

# what stands behind the bar; taus here are teacher-forced
_SHOWN = {"loss": "loss", "expected_tau": "tau", "accept_rate_1": "first", "eval_expected_tau": "held-out"}


class LiveProgress(TrainerCallback):
    """Show loss, tau and the first draft's accept rate behind a bar of the steps; print evaluations above it."""

    def __init__(self) -> None:
        self._bar: Steps | None = None
        self._newest: dict[str, float] = {}

    def close(self) -> None:
        """Take away what is shown, however the run ended."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.close()
            self._bar = Steps("training", state.max_steps, completed=state.global_step).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.reach(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._bar is None:
            return
        logs = logs or {}
        self._newest.update({name: float(logs[key]) for key, name in _SHOWN.items() if key in logs})
        self._bar.describe("training", ", ".join(f"{name} {value:.2f}" for name, value in self._newest.items()))
        if "eval_expected_tau" in logs:
            rates = [value for key, value in logs.items() if key.startswith("eval_accept_rate_")]
            shown = " ".join(f"{rate:.2f}" for rate in rates)
            tau = logs["eval_expected_tau"]
            self._bar.say(f"step {state.global_step}: held-out tau {tau:.3f} (teacher-forced), accept rates {shown}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()


class TimeLimit(TrainerCallback):
    """Evaluate, write a checkpoint and stop once the time is up.

    Args:
        minutes: time from the first step of this run.
    """

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if monotonic() - self._start >= self._seconds:
            control.should_evaluate = args.eval_strategy != IntervalStrategy.NO
            control.should_save = control.should_training_stop = True
