"""The recurrences of Transformers' linear layers, token by token: what a verify pass runs, and a rollback again.

A forward pass looks these functions up in its own module on every call. They are wrapped there once, and behave as
before unless a thread watches its pass.

B batch, T tokens.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """What a recurrence was called with; `step` is the function of its module that goes token by token."""

    step: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# (call, state before it, how many of its tokens, which of these count `(B, T)`) -> outputs, state behind them
Advance = Callable[[Call, Tensor, int | None, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recurrence:
    """How a function of several tokens is run token by token.

    `step` names its one-token form; `forgets`: whether the function starts from zero whatever came before;
    `state_ndim`: the dimensions of its state, of which a layer may have a stack.
    """

    step: str
    advance: Advance
    forgets: bool = False
    state_ndim: int = 4

    def parts(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Return the states of single calls: Zamba runs each of a layer's heads alone."""
        stacks = (state.unbind(1) if state.ndim > self.state_ndim else (state,) for state in states)
        return [part for stack in stacks for part in stack]


def _advance_delta_rule(
    call: Call, state: Tensor, num_tokens: int | None, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    # no decay and no update where tokens do not count
    gates = {name: _masked(call.kwargs[name][:, :num_tokens], counts, 0.0) for name in ("g", "beta")}
    kwargs = {**call.kwargs, **gates, "initial_state": state, "output_final_state": True}
    outputs, state = call.step(*(states[:, :num_tokens] for states in call.args), **kwargs)
    return outputs, state


def _advance_mamba(call: Call, state: Tensor, num_tokens: int | None, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    inputs, dt, decay, b, c = call.args
    # no time passes where tokens do not count: softplus makes 0 of it
    dt = _masked(dt.transpose(1, 2), counts, float("-inf")).transpose(1, 2)
    skip, gate, bias = (call.kwargs.get(name) for name in ("D", "z", "delta_bias"))
    options = {"dt_bias": bias, "dt_softplus": call.kwargs.get("delta_softplus", False)}
    return _step_by_step(call, state, (inputs, dt, b, c, gate), decay, skip, options, num_tokens, dim=2)


def _advance_mamba2(call: Call, state: Tensor, num_tokens: int | None, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    inputs, dt, decay, b, c = call.args
    head_dim = inputs.shape[-1]
    dt = _masked(dt, counts, float("-inf"))[..., None].expand(*dt.shape, head_dim)
    decay = decay[:, None, None].expand(-1, head_dim, b.shape[-1])
    skip, bias = (call.kwargs.get(name) for name in ("D", "dt_bias"))
    skip, bias = (None if values is None else values[:, None].expand(-1, head_dim) for values in (skip, bias))
    # not its limits of the time step, which the one-token form does not know
    options = {"dt_bias": bias, "dt_softplus": call.kwargs.get("dt_softplus", False)}
    return _step_by_step(
        call, state, (inputs, dt, b, c, call.kwargs.get("z")), decay, skip, options, num_tokens, dim=1
    )


def _step_by_step(
    call: Call,
    state: Tensor,
    per_token: tuple[Any, ...],
    decay: Tensor,
    skip: Tensor | None,
    options: dict[str, Any],
    num_tokens: int | None,
    *,
    dim: int,
) -> tuple[Tensor, Tensor]:
    # the step writes into it
    state, outputs = state.clone(), []
    for t in range(per_token[0].shape[dim] if num_tokens is None else num_tokens):
        inputs, dt, b, c, gate = (None if states is None else states.select(dim, t) for states in per_token)
        outputs.append(call.step(state, inputs, dt, decay, b, c, skip, z=gate, **options))
    return torch.stack(outputs, dim=dim), state


def _masked(values: Tensor, counts: Tensor | None, fill: float) -> Tensor:
    """Return `values` `(B, T, *)` with `fill` where tokens do not count; tokens behind those of `counts` stay."""
    if counts is None:
        return values
    counts = nn.functional.pad(counts, (0, values.shape[1] - counts.shape[1])).to(values.device)
    return values.masked_fill(~counts.view(*counts.shape, *[1] * (values.ndim - 2)), fill)


RECURRENCES = {
    "torch_chunk_gated_delta_rule": Recurrence("torch_recurrent_gated_delta_rule", _advance_delta_rule),
    "chunk_kimi_delta_attention": Recurrence("recurrent_kimi_delta_attention", _advance_delta_rule),
    "mamba2_chunk_scan": Recurrence("mamba2_selective_state_update", _advance_mamba2),
    # transformers 5.24: this one takes no state to begin with
    "mamba_selective_scan": Recurrence("mamba_selective_state_update", _advance_mamba, forgets=True, state_ndim=3),
}


@dataclass
class Watch:
    """One pass of the target: the layers' `states` before it, in order, and of drafts the `calls` that followed."""

    states: Sequence[Tensor]
    are_drafts: bool
    calls: list[Call] = field(default_factory=list)
    recurrence: Recurrence | None = None
    num_calls: int = 0

    def run(self, recurrence: Recurrence, function: Callable[..., Any], call: Call) -> Any:
        """Return what `function` gives for `call`, drafts and what it would forget token by token."""
        if not self.are_drafts and not (recurrence.forgets and self.states):
            return function(*call.args, **call.kwargs)
        self.recurrence = recurrence
        state = recurrence.parts(self.states)[self.num_calls]
        self.num_calls += 1
        if self.are_drafts:
            self.calls.append(call)
        return recurrence.advance(call, state, None, None)


# a context is a thread's own: other threads run the same functions unwatched
_watch: ContextVar[Watch | None] = ContextVar("dspark_hf_watch", default=None)


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Let this thread's recurrences run by `watch`."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def wrap_recurrences(model: nn.Module) -> bool:
    """Wrap the known recurrences of all modules that `model` is made of; return whether there are any."""
    modules = {sys.modules.get(type(part).__module__) for part in model.modules()}
    found = [(module, name) for module in modules if module for name in RECURRENCES if hasattr(module, name)]
    for module, name in found:
        if not hasattr(getattr(module, name), "is_watched"):
            setattr(module, name, _wrapped(module, name))
    return bool(found)


def _wrapped(module: ModuleType, name: str) -> Callable[..., Any]:
    function, recurrence = getattr(module, name), RECURRENCES[name]

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        watch = _watch.get()
        if watch is None:
            return function(*args, **kwargs)
        return watch.run(recurrence, function, Call(getattr(module, recurrence.step), args, kwargs))

    # mypy knows no attributes of functions
    run.is_watched = True  # type: ignore[attr-defined]
    return run
