"""Muon and AdamW as one optimiser: the same steps as both apart, one schedule, one state."""

from __future__ import annotations

import torch
from torch import nn

from dspark_hf.training.optimizers import MuonAdamW


def _parameters() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(6, 4))], [nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(9, 3))]


def _set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_steps_are_those_of_both_apart() -> None:
    """One of the two would not step, or with another learning rate than the schedule's."""
    hidden, rest = _parameters()
    together = MuonAdamW(hidden, rest, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(together, lambda step: 1 / (step + 1))
    hidden_apart, rest_apart = _parameters()
    muon = torch.optim.Muon(hidden_apart, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest_apart, lr=0.1, weight_decay=0.0)
    for step in range(3):
        for parameters in ([*hidden, *rest], [*hidden_apart, *rest_apart]):
            _set_gradients(parameters, step)
        together.step()
        schedule.step()
        for part in (muon, adamw):
            part.param_groups[0]["lr"] = 0.1 / (step + 1)
            part.step()
    for ours, theirs in zip([*hidden, *rest], [*hidden_apart, *rest_apart], strict=True):
        assert torch.equal(ours, theirs)


def test_a_loaded_state_goes_on(tmp_path) -> None:
    """A resumed run would begin with empty momenta, or step a state that no checkpoint sees."""
    hidden, rest = _parameters()
    whole = MuonAdamW(hidden, rest, lr=0.1)
    for step in range(2):
        _set_gradients([*hidden, *rest], step)
        whole.step()
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    hidden_again, rest_again = ([nn.Parameter(x.detach().clone()) for x in part] for part in (hidden, rest))
    resumed = MuonAdamW(hidden_again, rest_again, lr=0.5)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for step in range(2, 4):
        for optimizer, parameters in ((whole, [*hidden, *rest]), (resumed, [*hidden_again, *rest_again])):
            _set_gradients(parameters, step)
            optimizer.step()
    for ours, theirs in zip([*hidden, *rest], [*hidden_again, *rest_again], strict=True):
        assert torch.equal(ours, theirs)
    assert len(resumed.state_dict()["state"]) == 3
