"""What a training run shows while it runs, and when it stops for now."""

from __future__ import annotations

from time import monotonic
from typing import Any

from transformers import IntervalStrategy, ProgressCallback, TrainerCallback

_SHOWN = {"loss": "loss", "expected_tau": "tau", "accept_rate_1": "first", "eval_expected_tau": "held-out tau"}


class LiveProgress(ProgressCallback):
    """Show loss, tau and the first draft's accept rate in the bar; print evaluations above it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._newest: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not state.is_world_process_zero:
            return
        logs = logs or {}
        self._newest.update({name: float(logs[key]) for key, name in _SHOWN.items() if key in logs})
        self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in self._newest.items()})
        if "eval_expected_tau" in logs:
            rates = [value for key, value in logs.items() if key.startswith("eval_accept_rate_")]
            shown = " ".join(f"{rate:.2f}" for rate in rates)
            tau = logs["eval_expected_tau"]
            self.training_bar.write(f"step {state.global_step}: held-out tau {tau:.3f}, accept rates {shown}")


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
