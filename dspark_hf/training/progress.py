"""The newest numbers of a training run in its progress bar."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback

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
