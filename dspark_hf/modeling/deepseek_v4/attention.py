"""Attention of DeepSeek-V4: a sliding window, and compressed entries where the layer has them (CSA, HCA).

One vector per token is key and value of all heads. Queries are taken in blocks, so that memory does not grow with the
product of prompt and context.

B batch, T tokens, Q queries of a block, H heads, c head size, W window keys, E entries, K chosen entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_hf.modeling.deepseek_v4.cache import DeepseekV4LayerCache
from dspark_hf.modeling.deepseek_v4.compressor import Compressor, EntriesSoFar
from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
from dspark_hf.modeling.deepseek_v4.indexer import Indexer, choose_entries, score_entries
from dspark_hf.modeling.deepseek_v4.projections import AttentionProjections
from dspark_hf.modeling.deepseek_v4.rotary import Rotary
from dspark_hf.modeling.deepseek_v4.storage import Fp8Codec, Span

# numbers that one block of queries may hold in scores or gathered entries
_MAX_BLOCK = 1 << 24


@dataclass
class _Window:
    """Uncompressed keys `(B, W, c)` and their positions `(B, W)`; negative positions hold nothing."""

    keys: Tensor
    positions: Tensor


class Attention(AttentionProjections):
    """The attention of one layer.

    Args:
        config: the model's configuration.
        layer: the layer's number.
    """

    def __init__(self, config: DeepseekV4DSparkConfig, layer: int):
        super().__init__(config)
        self.kind = config.attention_kinds[layer]
        self.ratio = config.compress_ratios[layer]
        # stands for the storage format also where nothing is stored, so that every way to process a text agrees, but
        # where a last bit turns a rounding
        self._codec = None if config.cache_dtype is None else Fp8Codec(config.qk_rope_head_dim, torch.float32)
        if self.kind != "window":
            self.compressor = Compressor(
                config,
                ratio=self.ratio,
                size=self.head_dim,
                is_overlapping=self.kind == "csa",
                rounding=None if self._codec is None else self._codec.round,
            )
        if self.kind == "csa":
            self.indexer = Indexer(config, self.ratio)

    def forward(
        self, hidden_states: Tensor, span: Span, rotary: Rotary, cache: DeepseekV4LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output `(B, T, D)` for `hidden_states` `(B, T, D)`, and the indexer's loss, a scalar.

        The loss is a mean over the real tokens. It is zero unless the layer has an indexer, `indexer_loss_coef` is set
        and the model is trained.
        """
        latent = self.latents(hidden_states)
        query = self.queries(latent, rotary)
        keys = self.keys(hidden_states, rotary)
        if self._codec is not None:
            keys = self._codec.round(keys)
        entries = None
        if self.kind != "window":
            entries = self.compressor(hidden_states, span, None if cache is None else cache.compressed)
        index = None
        if self.kind == "csa":
            # the indexer learns to serve the model, the model nothing from the indexer
            states = hidden_states.detach()
            index_keys = self.indexer.keys(states, span, None if cache is None else cache.index)
            index = (index_keys, *self.indexer.queries(latent.detach(), states, rotary))
        outputs, losses = [], []
        for block in self._blocks(span, entries):
            window = _window(keys, span, cache, block, self.config.sliding_window)
            output, loss = self._attend(query[:, block], span.positions[:, block], window, entries, index, block)
            outputs.append(output)
            losses.append(loss)
        if cache is not None:
            cache.window.write(keys, span)
        is_real = span.positions < (span.starts + span.counts)[:, None]
        loss = torch.cat(losses, dim=1).masked_fill(~is_real, 0.0).sum() / max(sum(span.num_real), 1)
        return self.output(torch.cat(outputs, dim=1), rotary), loss

    def _blocks(self, span: Span, entries: EntriesSoFar | None) -> Iterator[slice]:
        """Yield blocks of queries whose scores and gathered entries fit the memory that is meant for them."""
        batch, length = span.positions.shape
        per_query = self.num_heads * 2 * self.config.sliding_window
        if entries is not None:
            num_read = entries.num_entries
            if self.kind == "csa":
                num_read = min(num_read, self.config.index_topk)
                per_query += num_read * self.head_dim + entries.num_entries
            per_query += self.num_heads * num_read
        size = max(min(_MAX_BLOCK // (batch * per_query), self.config.sliding_window), 1)
        for start in range(0, length, size):
            yield slice(start, min(start + size, length))

    def _attend(
        self,
        query: Tensor,
        positions: Tensor,
        window: _Window,
        entries: EntriesSoFar | None,
        index: tuple[EntriesSoFar, Tensor, Tensor] | None,
        block: slice,
    ) -> tuple[Tensor, Tensor]:
        """Return the output of queries, both `(B, Q, H, c)`, at `positions` `(B, Q)`, and the indexer's loss there."""
        # [B, Q, W]
        age = positions[..., None] - window.positions[:, None]
        is_near = (age >= 0) & (age < self.config.sliding_window) & (window.positions >= 0)[:, None]
        near = _scores(query, window.keys) * self.head_dim**-0.5
        parts = [near.masked_fill(~is_near[:, :, None], float("-inf"))]
        far_keys, chosen_scores = None, None
        if entries is not None and entries.num_entries:
            num_visible = (positions + 1) // self.ratio
            if index is None:
                far_keys = entries.all()
                is_visible = torch.arange(entries.num_entries, device=positions.device) < num_visible[..., None]
            else:
                index_scores = score_entries(index[0], index[1][:, block], index[2][:, block])
                chosen, is_visible = choose_entries(index_scores.detach(), num_visible, self.config.index_topk)
                far_keys = entries.gather(chosen)
                chosen_scores = index_scores.gather(-1, chosen)
            far = _scores(query, far_keys) * self.head_dim**-0.5
            parts.append(far.masked_fill(~is_visible[:, :, None], float("-inf")))
        sink = self.attn_sink.view(1, 1, -1, 1).expand(*query.shape[:3], 1)
        weights = torch.cat([*(part.float() for part in parts), sink], dim=-1).softmax(-1)
        output = _mix(weights[..., : near.shape[-1]], window.keys)
        loss = weights.new_zeros(positions.shape)
        if far_keys is not None:
            far_weights = weights[..., near.shape[-1] : -1]
            output = output + _mix(far_weights, far_keys)
            # in training also without gradients: a checkpointed layer may run so at first
            is_trained = self.training or torch.is_grad_enabled()
            if chosen_scores is not None and self.config.indexer_loss_coef and is_trained:
                loss = _index_loss(far_weights, chosen_scores, is_visible)
        return output, loss


def _window(keys: Tensor, span: Span, cache: DeepseekV4LayerCache | None, block: slice, size: int) -> _Window:
    """Return the uncompressed keys that a block of queries may see."""
    first = max(block.start - size + 1, 0)
    recent, positions = keys[:, first : block.stop], span.positions[:, first : block.stop]
    past = None if cache is None or block.start >= size - 1 else cache.window.read()
    if cache is None or past is None:
        return _Window(recent, positions)
    past_positions = cache.window.positions(span.starts)
    return _Window(torch.cat([past.to(keys.dtype), recent], dim=1), torch.cat([past_positions, positions], dim=1))


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """Return products `(B, Q, H, S)` of queries `(B, Q, H, c)` with keys, shared `(B, S, c)` or own `(B, Q, S, c)`."""
    if keys.ndim == 4:
        return query @ keys.transpose(2, 3)
    return (query.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, query.shape[1:3])


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """Return sums `(B, Q, H, c)` of values by weights `(B, Q, H, S)`."""
    weights = weights.to(values.dtype)
    if values.ndim == 4:
        return weights @ values
    return (weights.flatten(1, 2) @ values).unflatten(1, weights.shape[1:3])


def _index_loss(weights: Tensor, scores: Tensor, is_visible: Tensor) -> Tensor:
    """Return the KL divergence `(B, Q)` of the indexer from the attention.

    The attention's mass on the chosen entries, `weights` `(B, Q, H, K)` summed over heads, is what the softmax of the
    indexer's `scores` `(B, Q, K)` should be.
    """
    mass = weights.detach().sum(2) * is_visible
    wanted = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    # -inf times zero is no number
    believed = scores.masked_fill(~is_visible, torch.finfo(scores.dtype).min).log_softmax(-1)
    divergence = torch.special.xlogy(wanted, wanted) - wanted * believed
    return divergence.masked_fill(~is_visible, 0.0).sum(-1)
