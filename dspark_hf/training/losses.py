"""The paper's training objective (Eq. 8-12), with vocabulary-sized tensors never larger than one chunk.

P slots, V proposable tokens, D hidden, R markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from dspark_hf.generation.targets.adapter import cap_logits

# lower temperatures, 0 among them, are as this one: argmax, but of logits that are equal up to rounding
_COLDEST = 1e-3


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three terms (Eq. 12) and of the slots (Eq. 9).

    `ce`, `tv` and `confidence` are the paper's 0.1, 0.9 and 1.0. Slot k weighs `exp(-k / decay)`; the paper writes the
    block size for `decay`, the released configurations use 4.0.
    """

    ce: float = 0.1
    tv: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0


def slot_weights(valid: Tensor, decay: float) -> Tensor:
    """Return the weight `(N, K)`, fp32, of every slot: `exp(-k / decay)` where `valid`, else 0 (Eq. 9)."""
    slots = torch.arange(valid.shape[-1], device=valid.device)
    return valid * torch.exp(-slots / decay)


@dataclass
class TargetHead:
    """A head over the proposable tokens: `weight` `(V, D)`, `bias` `(V,)` or None, factor and soft cap.

    The target's, or what a drafter has in its place: a matrix of its own, or the target's without factor and cap.
    """

    weight: Tensor
    bias: Tensor | None
    factor: float = 1.0
    cap: float | None = None

    def products(self, hidden_states: Tensor) -> Tensor:
        """Return the products `(P, V)` of hidden states `(P, D)` with the head's weight, in its dtype."""
        return hidden_states.to(self.weight.dtype) @ self.weight.T

    def finish(self, products: Tensor) -> Tensor:
        """Return fp32 logits `(P, V)`: the products with bias, factor and soft cap."""
        raw = products.float() if self.bias is None else products.float() + self.bias
        return cap_logits(raw * self.factor if self.factor != 1.0 else raw, self.cap)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return fp32 logits `(P, V)` of hidden states `(P, D)`."""
        return self.finish(self.products(hidden_states))


@dataclass
class Slots:
    """What the loss needs to know of P slots.

    `labels` `(P,)` is the true token as a draft id, or -1 where the drafter cannot propose it; `target_rows` `(P,)`
    is the row of `target_states` `(T, D)` whose distribution predicts that token; `target_lse` `(T,)`, fp32, is that
    row's log-sum-exp over the target's whole vocabulary; `weights` `(P,)`, fp32.
    """

    labels: Tensor
    target_rows: Tensor
    target_states: Tensor
    target_lse: Tensor
    weights: Tensor


class _DraftLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        latents: Tensor | None,
        markov_weight: Tensor | None,
        head: TargetHead,
        draft_head: TargetHead,
        slots: Slots,
        loss_weights: LossWeights,
        temperature: float,
        chunk_size: int,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = head.weight.dtype
        chunk_terms = _compiled_chunk_terms() if compiled else _chunk_terms
        grads = (torch.empty_like(hidden_states), _empty_like(latents), _zeros_like(markov_weight))
        transition = None if markov_weight is None else markov_weight.to(dtype)
        cross_entropy = hidden_states.new_zeros(len(hidden_states), dtype=torch.float32)
        distance = torch.zeros_like(cross_entropy)
        for start in range(0, len(hidden_states), chunk_size):
            part = slice(start, start + chunk_size)
            states = hidden_states[part].to(dtype)
            latent = None if latents is None else latents[part].to(dtype)
            bias = None if latent is None or transition is None else latent @ transition.T
            cross_entropy[part], distance[part], grad_bias, grad_products = chunk_terms(
                draft_head.products(states),
                bias,
                *_target_terms(head, slots, part),
                head,
                draft_head,
                loss_weights,
                temperature,
            )
            grads[0][part] = (grad_products @ draft_head.weight).to(hidden_states.dtype)
            if latent is not None and transition is not None and grads[1] is not None and grads[2] is not None:
                grads[1][part] = (grad_bias @ transition).to(grads[1].dtype)
                grads[2].add_(grad_bias.T @ latent)
        ctx.save_for_backward(*[grad for grad in grads if grad is not None])
        ctx.has_markov = latents is not None
        ctx.mark_non_differentiable(cross_entropy, distance)
        total = slots.weights.sum().clamp_min(1e-6)
        loss = (slots.weights * (loss_weights.ce * cross_entropy + loss_weights.tv * distance)).sum() / total
        return loss, cross_entropy, distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = [grad * grad_loss for grad in ctx.saved_tensors]
        return (grads[0], *(grads[1:] if ctx.has_markov else (None, None)), *(None,) * 7)


def _target_terms(head: TargetHead, slots: Slots, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return one chunk's target products by position, log-sum-exps, positions by slot, labels and weights."""
    # neighbouring blocks look at the same positions: compute each position's target distribution once
    rows, inverse = torch.unique(slots.target_rows[part], return_inverse=True)
    weights = slots.weights[part] / slots.weights.sum().clamp_min(1e-6)
    return head.products(slots.target_states[rows]), slots.target_lse[rows], inverse, slots.labels[part], weights


def _chunk_terms(
    products: Tensor,
    bias: Tensor | None,
    target_products: Tensor,
    target_lse: Tensor,
    inverse: Tensor,
    labels: Tensor,
    weights: Tensor,
    head: TargetHead,
    draft_head: TargetHead,
    loss_weights: LossWeights,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return one chunk's cross-entropy, L1 distance, and the loss's gradients by Markov bias and by head products.

    Everything that is as wide as the vocabulary and no matrix product is done here, from products in the head's dtype
    to gradients in it: compiled, this is two or three sweeps over memory instead of twenty.
    """
    plain = draft_head.finish(products)
    draft_logits = plain if bias is None else plain + bias.float()
    target_logits = head.finish(target_products)
    if temperature != 1.0:
        draft_logits, target_logits = (cooled(logits, temperature) for logits in (draft_logits, target_logits))
        # what rounding adds to a logit is divided by the temperature too, and could make more of it than certainty
        target_lse = torch.maximum(target_lse, target_logits.logsumexp(-1))
    log_norm = draft_logits.logsumexp(-1)
    draft_probs = torch.exp(draft_logits - log_norm[:, None])
    target_probs = torch.exp(target_logits - target_lse[:, None])
    outside = (1 - target_probs.sum(-1)).clamp_min(0)[inverse]
    difference = draft_probs - target_probs[inverse]
    distance = difference.abs().sum(-1) + outside
    proposable = labels >= 0
    at_label = draft_logits.gather(-1, labels.clamp_min(0)[:, None]).squeeze(-1)
    cross_entropy = (log_norm - at_label) * proposable

    sign = difference.sign()
    ce_weights = loss_weights.ce * weights * proposable
    grad = sign - (draft_probs * sign).sum(-1, keepdim=True)
    grad = draft_probs * (grad * (loss_weights.tv * weights)[:, None] + ce_weights[:, None])
    is_label = torch.arange(grad.shape[-1], device=labels.device) == labels[:, None]
    grad = torch.where(is_label, grad - ce_weights[:, None], grad)
    grad = cooled(grad, temperature)
    by_products = grad if not draft_head.cap else grad * (1 - (plain / draft_head.cap) ** 2)
    by_products = by_products if draft_head.factor == 1.0 else by_products * draft_head.factor
    return cross_entropy, distance, grad.to(products.dtype), by_products.to(products.dtype)


def cooled(logits: Tensor, temperature: float) -> Tensor:
    """Return logits, or their gradient, over a temperature; 0 is greedy decoding."""
    return logits if temperature == 1.0 else logits / max(temperature, _COLDEST)


@cache
def _compiled_chunk_terms() -> Any:
    return torch.compile(_chunk_terms, dynamic=True)


def _empty_like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor)


def _zeros_like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor)


@dataclass
class DraftLosses:
    """The objective and its parts: `total` (differentiable) and, per slot `(P,)`, fp32 and detached, the terms."""

    total: Tensor
    cross_entropy: Tensor
    distance: Tensor
    confidence: Tensor

    @property
    def accept_rate(self) -> Tensor:
        """The chance that each draft is accepted, `1 - distance / 2` (Eq. 8)."""
        return 1 - 0.5 * self.distance


def draft_losses(
    hidden_states: Tensor,
    latents: Tensor | None,
    markov_weight: Tensor | None,
    confidence_logits: Tensor | None,
    head: TargetHead,
    slots: Slots,
    weights: LossWeights,
    *,
    draft_head: TargetHead | None = None,
    temperature: float = 1.0,
    chunk_size: int = 256,
    compiled: bool = False,
) -> DraftLosses:
    """Return the paper's objective over P slots: cross-entropy, L1 distance and confidence (Eq. 9-12).

    All of them are of the distributions at `temperature`, and so is what the confidence learns: how likely a draft is
    to be accepted where both are divided by it. 0 is greedy decoding, which has no gradient but for the confidence.

    Args:
        hidden_states: backbone outputs `(P, D)`.
        latents: the Markov head's latents `(P, R)`, or None.
        markov_weight: its matrix W2 `(V, R)`, or None.
        confidence_logits: `(P,)`, or None without a confidence head.
        head: the target's frozen head, in the dtype the products are computed in.
        slots: labels, target distributions and weights.
        weights: weights of the terms.
        draft_head: what makes the drafts' logits of `hidden_states`, frozen too; None: `head`.
        temperature: of the distributions; `slots.target_lse` is at the same.
        chunk_size: slots per chunk; memory is `chunk_size * V`, whatever P is.
        compiled: whether to run the vocabulary-sized element-wise work through `torch.compile`.
    """
    loss, cross_entropy, distance = _DraftLoss.apply(
        hidden_states,
        latents,
        markov_weight,
        head,
        draft_head or head,
        slots,
        weights,
        temperature,
        chunk_size,
        compiled,
    )
    confidence = torch.zeros_like(distance)
    if confidence_logits is not None:
        accept_rate = (1 - 0.5 * distance).clamp(0, 1)
        terms = torch.nn.functional.binary_cross_entropy_with_logits(confidence_logits, accept_rate, reduction="none")
        loss = loss + weights.confidence * (slots.weights * terms).sum() / slots.weights.sum().clamp_min(1e-6)
        confidence = terms.detach()
    return DraftLosses(loss, cross_entropy, distance, confidence)
