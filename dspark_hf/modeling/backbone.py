"""Parallel block backbone of a DSpark drafter: every slot sees the context and the whole block (Eq. 1-3).

B batch, N blocks per row, K block_size, C context slots, H heads, G query heads per key/value head, E head_dim,
D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.rotary import rotate


class RMSNorm(nn.Module):
    """Scale to unit root mean square in fp32, then by a learned weight (none if `with_scale` is False)."""

    def __init__(self, size: int, eps: float, with_scale: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if with_scale else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        states = hidden_states.float()
        states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            states = states * self.weight.float()
        return states.to(hidden_states.dtype)


def project(linear: nn.Module, states: Tensor) -> Tensor:
    """Return `linear` of states `(*, D)`; quantised layers take at most three dimensions."""
    return linear(states) if states.ndim <= 3 else linear(states.flatten(0, -2)).unflatten(0, states.shape[:-1])


class BlockAttention(nn.Module):
    """Attend from every slot of a block to its context and to the block itself (Eq. 3).

    The block is seen both ways, or if `is_causal` only backwards.
    """

    def __init__(self, config: DSparkConfig, is_causal: bool = False):
        super().__init__()
        self.is_causal = is_causal
        self.is_interleaved = config.rope_interleaved
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        is_gemma = config.backbone_type == "gemma4"
        self.scaling = 1.0 if is_gemma else self.head_dim**-0.5
        width, kv_width = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = None if config.attention_k_eq_v else nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)
        if config.use_qk_norm:
            self.q_norm: nn.Module = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm: nn.Module = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()
        self.v_norm = RMSNorm(self.head_dim, config.rms_norm_eps, with_scale=False) if is_gemma else nn.Identity()

    def keys_and_values(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys (rotated) and values `(B, *, H_kv, E)` of hidden states `(B, *, D)`."""
        shape = (*hidden_states.shape[:-1], self.num_key_value_heads, self.head_dim)
        raw_keys = project(self.k_proj, hidden_states).view(shape)
        values = raw_keys if self.v_proj is None else project(self.v_proj, hidden_states).view(shape)
        return rotate(self.k_norm(raw_keys), rotary, self.is_interleaved), self.v_norm(values)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        context: tuple[Tensor, Tensor],
        context_mask: Tensor | None,
    ) -> Tensor:
        """Return the attention output `(B, N, K, D)` for block states `(B, N, K, D)`.

        `context` holds keys and values `(B, H_kv, C, E)`; `context_mask` `(B, N, C)` is True where block n may look.
        """
        batch, blocks, size, _ = hidden_states.shape
        groups = self.num_heads // self.num_key_value_heads
        shape = (batch, blocks, size, self.num_key_value_heads, groups, self.head_dim)
        query = self.q_norm(
            project(self.q_proj, hidden_states).view(batch, blocks, size, self.num_heads, self.head_dim)
        )
        query = rotate(query, rotary, self.is_interleaved).view(shape).permute(0, 3, 1, 4, 2, 5)  # [B, H, N, G, K, E]
        key, value = (x.permute(0, 3, 1, 2, 4) for x in self.keys_and_values(hidden_states, rotary))  # [B, H, N, K, E]
        query = query.reshape(batch, self.num_key_value_heads, blocks, groups * size, self.head_dim)
        attend = self._attend_once if blocks == 1 else self._attend_apart
        output = attend(query, key, value, context, context_mask)
        output = output.view(batch, self.num_key_value_heads, blocks, groups, size, self.head_dim)
        return project(self.o_proj, output.permute(0, 2, 4, 1, 3, 5).reshape(batch, blocks, size, -1))

    def _attend_once(
        self, query: Tensor, key: Tensor, value: Tensor, context: tuple[Tensor, Tensor], context_mask: Tensor | None
    ) -> Tensor:
        """Return what `_attend_apart` does for rows of one block: context and block together, in PyTorch's own kernel.

        A context grows from round to round, and for a bf16 product of every new length oneDNN makes a kernel, which
        takes longer than the product.
        """
        keys, values = (torch.cat([old, new[:, :, 0]], dim=2) for old, new in zip(context, (key, value), strict=True))
        mask = None
        if context_mask is not None or self.is_causal:
            batch, num_queries, length = len(query), query.shape[3], context[0].shape[2]
            mask = torch.ones(batch, num_queries, keys.shape[2], dtype=torch.bool, device=query.device)
            if context_mask is not None:
                mask[..., :length] = context_mask
            if self.is_causal:
                mask[..., length:] = _slots_before(key.shape[3], num_queries, query.device)
            mask = mask[:, None]
        output = nn.functional.scaled_dot_product_attention(
            query[:, :, 0], keys, values, attn_mask=mask, scale=self.scaling
        )
        return output[:, :, None]

    def _attend_apart(
        self, query: Tensor, key: Tensor, value: Tensor, context: tuple[Tensor, Tensor], context_mask: Tensor | None
    ) -> Tensor:
        """Return `(B, H, N, G * K, E)`: every block's attention to the context, which they share, and to itself.

        Takes queries `(B, H, N, G * K, E)`, and keys and values `(B, H, N, K, E)` of the blocks.
        """
        query = query * self.scaling
        context_key, context_value = context
        context_scores = query.flatten(2, 3) @ context_key.transpose(-1, -2)
        context_scores = context_scores.view(*query.shape[:-1], context_key.shape[2])
        if context_mask is not None:
            context_scores = context_scores.masked_fill(~context_mask[:, None, :, None], float("-inf"))
        block_scores = query @ key.transpose(-1, -2)
        if self.is_causal:
            before = _slots_before(key.shape[3], query.shape[3], query.device)
            block_scores = block_scores.masked_fill(~before, float("-inf"))
        weights = torch.cat([context_scores, block_scores], dim=-1).softmax(-1, dtype=torch.float32)
        weights = weights.to(value.dtype)
        context_weights, block_weights = weights.split([context_key.shape[2], key.shape[3]], dim=-1)
        return (context_weights.flatten(2, 3) @ context_value).view(query.shape) + block_weights @ value


def _slots_before(size: int, num_queries: int, device: torch.device) -> Tensor:
    """Return `(G * K, K)`: which slots of its block a query sees that looks only backwards."""
    slots = torch.arange(size, device=device)
    return slots <= slots.repeat(num_queries // size)[:, None]


class GatedMLP(nn.Module):
    """Gated feed-forward network of Llama, Qwen and Gemma."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate = self.act_fn(project(self.gate_proj, hidden_states))
        return project(self.down_proj, gate * project(self.up_proj, hidden_states))


class DSparkLayer(GradientCheckpointingLayer):
    """One drafter layer: pre-norm as in Qwen3, or Gemma's sandwich norms, for Gemma 4 with a layer scalar."""

    layer_scalar: Tensor

    def __init__(self, config: DSparkConfig, is_causal: bool = False):
        super().__init__()
        self.self_attn = BlockAttention(config, is_causal)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.has_sandwich_norms = config.backbone_type in ("gemma3", "gemma4")
        self.has_scalar = config.backbone_type == "gemma4"
        if self.has_sandwich_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.has_scalar:
            self.register_buffer("layer_scalar", torch.ones(1))

    def keys_and_values(self, features: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the context's keys and values `(B, T, H_kv, E)` for features `(B, T, D)`."""
        return self.self_attn.keys_and_values(features, rotary)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        context: tuple[Tensor, Tensor],
        context_mask: Tensor | None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), rotary, context, context_mask)
        if not self.has_sandwich_norms:
            hidden_states = hidden_states + attended
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        hidden_states = hidden_states + self.post_feedforward_layernorm(fed)
        return hidden_states * self.layer_scalar if self.has_scalar else hidden_states
