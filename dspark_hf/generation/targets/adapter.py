"""The target as the drafter and the decoding loop see it: any Transformers causal LM, unmodified.

B batch, T tokens, V vocab, D hidden, M tapped layers.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dspark_hf.generation.targets.layers import find_decoder_layers
from dspark_hf.generation.wrappers import unwrap

# the id of what the first decoder layer receives, where layers are counted from 0
EMBEDDING = -1


class TargetAdapter:
    """Tap a causal LM's decoder layers and lend out its embedding and its output head.

    Use it as a context manager: the hooks on the tapped layers exist only inside, and see only passes of the thread
    that entered.

    Args:
        model: any decoder-only causal LM of Transformers, or the language part of a vision-language model; what
            `torch.compile` or PEFT wrapped around it is taken off.
        layer_ids: decoder layers whose outputs are captured; the output of layer i, so for the last layer the state
            before the final norm, and for -1 what the first layer receives.
    """

    def __init__(self, model: PreTrainedModel, layer_ids: Sequence[int] = ()):
        self.model: PreTrainedModel = unwrap(model)
        self.config = self.model.config.get_text_config(decoder=True)
        self.layer_ids = list(layer_ids)
        self._layers = find_decoder_layers(self.model, self.config.num_hidden_layers)
        self._captured: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        self._thread: int | None = None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self._layers

    @property
    def device(self) -> torch.device:
        """Where token ids go; the first weights may be kept elsewhere."""
        return input_device(self.model)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    def accepts(self, argument: str) -> bool:
        """Return whether the model's forward pass names this argument."""
        return argument in inspect.signature(self.model.forward).parameters

    def __enter__(self) -> TargetAdapter:
        self._thread = threading.get_ident()
        self._tap()
        return self

    def _tap(self) -> None:
        self._handles = [
            self._layers[layer_id].register_forward_hook(self._capture_hook(layer_id))
            for layer_id in self.layer_ids
            if layer_id != EMBEDDING
        ]
        if EMBEDDING in self.layer_ids:
            self._handles.append(self._layers[0].register_forward_pre_hook(self._capture_input, with_kwargs=True))

    def _untap(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def untapped(self) -> Iterator[None]:
        """Take the hooks off for a pass that gives the hidden states itself, which `select_context` takes."""
        self._untap()
        try:
            yield
        finally:
            self._tap()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._untap()
        self._captured.clear()

    def _capture_hook(self, layer_id: int) -> Any:
        def capture(module: nn.Module, args: Any, output: Any) -> None:
            self._capture(layer_id, output[0] if isinstance(output, tuple | list) else output)

        return capture

    def _capture_input(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._capture(EMBEDDING, args[0] if args else kwargs["hidden_states"])

    def _capture(self, layer_id: int, states: Tensor) -> None:
        # hooks are the module's, and other threads may run it
        if threading.get_ident() != self._thread:
            return
        self._captured[layer_id] = self._one_stream(states)

    def _one_stream(self, states: Tensor) -> Tensor:
        """Return what drafters read of a layer's output, `(B, T, D)`."""
        if states.ndim == 3 and states.shape[-1] > self.hidden_size:
            # Qwen 4 has its streams side by side, (B, T, n * D)
            return states.unflatten(-1, (-1, self.hidden_size)).mean(2)
        if states.ndim < 4:
            return states
        # of hyper-connections' (B, T, n, D), the mean
        return states[self.config.altup_active_idx] if self.has_streams_first else states.mean(2)

    @property
    def has_streams_first(self) -> bool:
        """Whether layers give `(n, B, T, D)`: AltUp (Gemma 3n) has its streams first, and one of them active."""
        return getattr(self.config, "altup_active_idx", None) is not None

    def rows_first(self, hidden_states: Sequence[Tensor] | None) -> tuple[Tensor, ...] | None:
        """Return a model's own hidden states with rows and tokens first, `(B, T, D)` or `(B, T, n, D)`."""
        if hidden_states is None:
            return None
        if not self.has_streams_first:
            return tuple(hidden_states)
        return tuple(states if states.ndim < 4 else states.movedim(0, 2) for states in hidden_states)

    def pop_context_hidden_states(self, positions: Tensor | None = None) -> Tensor:
        """Return the tapped hidden states `(B, T, M * D)` of the forward pass that just ran, and forget them.

        Where nothing is tapped, `positions` `(B, T)` say for how many tokens there are states of no width.
        """
        if not self.layer_ids:
            return torch.empty(*(0, 0) if positions is None else positions.shape, 0)
        missing = [layer_id for layer_id in self.layer_ids if layer_id not in self._captured]
        if missing:
            raise ValueError(
                f"`target_layer_ids` must be layers that every pass runs, got {missing} of "
                f"{type(self.model).__name__}, which were left out. Make a drafter that reads others."
            )
        device = self._captured[self.layer_ids[-1]].device
        states = torch.cat([self._captured[layer_id].to(device) for layer_id in self.layer_ids], dim=-1)
        self._captured.clear()
        return states

    def select_context(self, hidden_states: Sequence[Tensor] | None, positions: Tensor) -> Tensor:
        """Return of a model's own `hidden_states` `(B, T, D)`, first layer's input first, those that are tapped.

        They are a copy, `(B, T, M * D)`; without any, `positions` `(B, T)` say for how many tokens.
        """
        if not self.layer_ids or hidden_states is None:
            return torch.empty(*positions.shape, 0)
        device = hidden_states[self.layer_ids[-1] + 1].device
        return torch.cat([hidden_states[layer_id + 1].to(device) for layer_id in self.layer_ids], dim=-1)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the token embeddings `(*, D)` as the first decoder layer receives them, without a gradient."""
        embedding = self.model.get_input_embeddings()
        with torch.no_grad():
            states = embedding(token_ids.to(device_of(embedding)))
        # Granite and its kin scale outside the embedding module; Gemma inside
        return states * getattr(self.config, "embedding_multiplier", 1.0)

    def embed_bare(self, token_ids: Tensor) -> Tensor:
        """Return the rows `(*, D)` of the embedding's matrix, without the target's own scale, without a gradient."""
        embedding = self.model.get_input_embeddings()
        with torch.no_grad():
            states = embedding(token_ids.to(device_of(embedding)))
        # modules that scale say by what: the weights themselves may lie elsewhere, or be stored in fewer bits
        scale = getattr(embedding, "embed_scale", None)
        return states if scale is None else states / torch.as_tensor(scale).to(states)

    def head(self, hidden_states: Tensor) -> Tensor:
        """Return the logits `(*, V)` of normed hidden states `(*, D)`, as the target itself scales and caps them."""
        return self.finish_logits(self.head_bare(hidden_states))

    def head_bare(self, hidden_states: Tensor) -> Tensor:
        """Return what the head gives `(*, V)` for normed hidden states `(*, D)`, neither scaled nor capped."""
        head = self.model.get_output_embeddings()
        return head(hidden_states.to(device=device_of(head), dtype=_compute_dtype(head, self.model)))

    def head_rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return the output head's weight rows and biases for `token_ids`, or None if the head is quantised."""
        head = self.model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if type(head) is not nn.Linear or weight is None or not weight.is_floating_point() or weight.is_meta:
            return None
        rows = token_ids.to(weight.device)
        with torch.no_grad():
            return weight[rows], None if head.bias is None else head.bias[rows]

    @property
    def logit_factor(self) -> float:
        """What the target multiplies its head's output by (Cohere multiplies, Granite divides)."""
        return getattr(self.config, "logit_scale", None) or 1.0 / (getattr(self.config, "logits_scaling", None) or 1.0)

    @property
    def logit_cap(self) -> float | None:
        """The target's final logit soft cap (Gemma), or None."""
        return getattr(self.config, "final_logit_softcapping", None)

    def finish_logits(self, logits: Tensor) -> Tensor:
        """Return `logits` scaled and soft-capped as the target does after its head."""
        factor = self.logit_factor
        # a product with 1 would copy the whole vocabulary
        return cap_logits(logits if factor == 1.0 else logits * factor, self.logit_cap)


def cap_logits(logits: Tensor, cap: float | None) -> Tensor:
    """Return `logits` softly capped to `(-cap, cap)`, or as they are if `cap` is None."""
    return logits if not cap else torch.tanh(logits / cap) * cap


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a module runs on."""
    # accelerate's offload keeps weights on the meta device and runs the module elsewhere; one hook may hold several
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def input_device(model: PreTrainedModel) -> torch.device:
    """Return where a model takes its token ids, which `model.device` is not where the first weights are offloaded."""
    return device_of(model.get_input_embeddings())


def _compute_dtype(module: nn.Module, model: PreTrainedModel) -> torch.dtype:
    dtype = next(module.parameters()).dtype
    return dtype if dtype.is_floating_point else model.dtype
