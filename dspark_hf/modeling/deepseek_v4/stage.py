"""One stage of the DSpark module in a DeepSeek-V4 checkpoint: block attention over the latest context, then experts.

B batch, N blocks per row, K slots, C context entries, H heads, c head size, n streams, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
from dspark_hf.modeling.deepseek_v4.hyper_connections import join_streams
from dspark_hf.modeling.deepseek_v4.layer import HyperConnectedLayer, add_hyper_head
from dspark_hf.modeling.deepseek_v4.projections import AttentionProjections
from dspark_hf.modeling.deepseek_v4.rotary import Rotary, rotary_tables
from dspark_hf.modeling.deepseek_v4.storage import Fp8Codec


class StageRotary(nn.Module):
    """Return cosines and sines of positions as the stages use them: the plain base, no YaRN."""

    def __init__(self, config: DeepseekV4DSparkConfig):
        super().__init__()
        self.config = config

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """Return tables in fp32 whatever `dtype` says, as the released code keeps them."""
        return rotary_tables(self.config, positions, is_compressed=False)


class StageAttention(AttentionProjections):
    """Attend from every slot of a block to the latest context and, both ways, to the block; with sinks (Eq. 3).

    With `cache_dtype="fp8"` the keys of both are rounded as the target's are: the released code does so, and its
    module was trained with it.
    """

    def __init__(self, config: DeepseekV4DSparkConfig):
        super().__init__(config)
        self._codec = None if config.cache_dtype is None else Fp8Codec(config.qk_rope_head_dim, torch.float32)

    def keys(self, hidden_states: Tensor, rotary: Rotary) -> Tensor:
        """Return keys, which are values too, `(*, c)` for `(*, D)`."""
        keys = super().keys(hidden_states, rotary)
        return keys if self._codec is None else self._codec.round(keys)

    def keys_and_values(self, hidden_states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Return keys and values of `(B, *, D)`, one vector for all heads and both purposes: `(B, *, 1, c)` twice."""
        shared = self.keys(hidden_states, rotary)[..., None, :]
        return shared, shared

    def forward(
        self, hidden_states: Tensor, rotary: Rotary, context: tuple[Tensor, Tensor], context_mask: Tensor | None
    ) -> Tensor:
        """Return the output `(B, N, K, D)` for block states `(B, N, K, D)`.

        `context` holds keys `(B, 1, C, c)`; `context_mask` `(B, N, C)` is True where block n may look.
        """
        query = self.queries(self.latents(hidden_states), rotary)  # [B, N, K, H, c]
        own = self.keys(hidden_states, rotary)  # [B, N, K, c]
        past = context[0][:, 0].to(query.dtype)  # [B, C, c]
        past_scores = torch.einsum("bnkhc,bsc->bnkhs", query, past) * self.head_dim**-0.5
        if context_mask is not None:
            past_scores = past_scores.masked_fill(~context_mask[:, :, None, None], float("-inf"))
        own_scores = torch.einsum("bnkhc,bnsc->bnkhs", query, own) * self.head_dim**-0.5
        sink = self.attn_sink.view(1, 1, 1, -1, 1).expand(*query.shape[:4], 1)
        weights = torch.cat([past_scores.float(), own_scores.float(), sink], dim=-1).softmax(-1).to(query.dtype)
        past_weights, own_weights, _ = weights.split([past.shape[1], own.shape[2], 1], dim=-1)
        output = torch.einsum("bnkhs,bsc->bnkhc", past_weights, past)
        output = output + torch.einsum("bnkhs,bnsc->bnkhc", own_weights, own)
        return self.output(output, rotary)


class DeepseekV4Stage(HyperConnectedLayer):
    """One drafting stage: the block of a DeepSeek-V4 layer, its experts always chosen by affinity."""

    def __init__(self, config: DeepseekV4DSparkConfig):
        super().__init__(config, is_hashed=False)
        self.attn = StageAttention(config)

    def keys_and_values(self, features: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Return the context's keys and values `(B, T, 1, c)` for features `(B, T, D)`, which all stages share."""
        return self.attn.keys_and_values(features, rotary)

    def forward(
        self, streams: Tensor, rotary: Rotary, context: tuple[Tensor, Tensor], context_mask: Tensor | None
    ) -> Tensor:
        """Return the streams `(B, N, K, n, D)` of the blocks."""
        states, mixing = self.read_for_attention(streams)
        streams = mixing(streams, self.attn(states, rotary, context, context_mask))
        return self.run_experts(streams, None)[0]


class StreamEnds(nn.Module):
    """Where streams begin and end around the stages; holds the parameters of the hyper-connection's head."""

    hc_head_fn: nn.Parameter
    hc_head_base: nn.Parameter
    hc_head_scale: nn.Parameter

    def __init__(self, config: DeepseekV4DSparkConfig):
        super().__init__()
        self.config = config
        add_hyper_head(self, config)

    def open(self, states: Tensor) -> Tensor:
        """Return states `(*, D)` as n equal streams `(*, n, D)`."""
        return states[..., None, :].expand(*states.shape[:-1], self.config.hc_mult, -1)

    def close(self, streams: Tensor) -> Tensor:
        """Return the joined state `(*, D)` of streams `(*, n, D)`."""
        return join_streams(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.config)
