"""The target as the drafter and the decoding loop see it: any Transformers causal LM, unmodified.

B batch, T tokens, V vocab, D hidden, M tapped layers.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class TargetAdapter:
    """Tap a causal LM's decoder layers and lend out its embedding and its output head.

    Use it as a context manager: the hooks on the tapped layers exist only inside, and see only passes of the thread
    that entered.

    Args:
        model: any decoder-only causal LM of Transformers, or the language part of a vision-language model.
        layer_ids: decoder layers whose outputs are captured; the output of layer i, so for the last layer the state
            before the final norm.
    """

    def __init__(self, model: PreTrainedModel, layer_ids: Sequence[int] = ()):
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.layer_ids = list(layer_ids)
        self._layers = _decoder_layers(model, self.config.num_hidden_layers)
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
        self._handles = [
            self._layers[layer_id].register_forward_hook(self._capture_hook(layer_id)) for layer_id in self.layer_ids
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._captured.clear()

    def _capture_hook(self, layer_id: int) -> Any:
        def capture(module: nn.Module, args: Any, output: Any) -> None:
            # hooks are the module's, and other threads may run it
            if threading.get_ident() != self._thread:
                return
            states = output[0] if isinstance(output, tuple) else output
            # hyper-connections keep several streams (B, T, n, D); drafters read their mean
            self._captured[layer_id] = states.mean(2) if states.ndim == 4 else states

        return capture

    def pop_context_hidden_states(self, positions: Tensor | None = None) -> Tensor:
        """Return the tapped hidden states `(B, T, M * D)` of the forward pass that just ran, and forget them.

        Where nothing is tapped, `positions` `(B, T)` say for how many tokens there are states of no width.
        """
        if not self.layer_ids:
            return torch.empty(*(0, 0) if positions is None else positions.shape, 0)
        device = self._captured[self.layer_ids[-1]].device
        states = torch.cat([self._captured[layer_id].to(device) for layer_id in self.layer_ids], dim=-1)
        self._captured.clear()
        return states

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the token embeddings `(*, D)` as the first decoder layer receives them, without a gradient."""
        embedding = self.model.get_input_embeddings()
        with torch.no_grad():
            states = embedding(token_ids.to(device_of(embedding)))
        # Granite and its kin scale outside the embedding module; Gemma inside
        return states * getattr(self.config, "embedding_multiplier", 1.0)

    def head(self, hidden_states: Tensor) -> Tensor:
        """Return the logits `(*, V)` of normed hidden states `(*, D)`, as the target itself scales and caps them."""
        head = self.model.get_output_embeddings()
        device, dtype = device_of(head), _compute_dtype(head, self.model)
        return self.finish_logits(head(hidden_states.to(device=device, dtype=dtype)))

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


def _decoder_layers(model: PreTrainedModel, num_layers: int) -> nn.ModuleList:
    decoder = model.get_decoder()
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(
        f"`target` must hold its {num_layers} decoder layers in one ModuleList, got {type(model).__name__} without "
        "one. Use a decoder-only causal LM of Transformers."
    )


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a module runs on."""
    # accelerate's offload keeps weights on the meta device and runs the module elsewhere; one hook may hold several
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def _compute_dtype(module: nn.Module, model: PreTrainedModel) -> torch.dtype:
    dtype = next(module.parameters()).dtype
    return dtype if dtype.is_floating_point else model.dtype
