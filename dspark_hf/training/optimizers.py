"""Muon for the hidden matrices and AdamW for the rest, as one optimiser (the paper series' choice)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Step hidden matrices with Muon and everything else with AdamW, under one schedule and one state.

    Muon's updates are scaled to AdamW's size, so both take the same learning rate.

    Args:
        hidden: 2-D weights inside the network.
        rest: all other parameters.
        lr: learning rate of both.
        weight_decay: decay of both.
        betas: AdamW's.
    """

    def __init__(
        self,
        hidden: Iterable[nn.Parameter],
        rest: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        muon = Muon(list(hidden), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = AdamW(list(rest), lr=lr, weight_decay=weight_decay, betas=betas)
        self._parts: tuple[Optimizer, Optimizer] = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._link()

    def _link(self) -> None:
        """Let both parts work on this optimiser's groups and state: schedulers and checkpoints see one optimiser."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._link()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable hidden matrices of a drafter or of a target, and its other trainable parameters."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_hidden = parameter.ndim == 2 and ("layers" in name.split(".") or name == "fc.weight")
            (hidden if is_hidden else rest).append(parameter)
    return hidden, rest
