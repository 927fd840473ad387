"""What layers and drafting stages of DeepSeek-V4 share of their attention: the way in and the way out.

H heads, c head size, D hidden, R query rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_hf.modeling.backbone import RMSNorm
from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
from dspark_hf.modeling.deepseek_v4.linear import GroupedLinear
from dspark_hf.modeling.deepseek_v4.rotary import Rotary, per_head, rotate


class AttentionProjections(nn.Module):
    """Low-rank queries, one vector that is key and value of all heads, sinks, and a grouped way out."""

    def __init__(self, config: DeepseekV4DSparkConfig):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        width = self.num_heads * self.head_dim
        self.wq_a = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = nn.Linear(config.q_lora_rank, width, bias=False)
        self.head_norm = RMSNorm(self.head_dim, config.rms_norm_eps, with_scale=False)
        self.wkv = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.kv_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.wo_a = GroupedLinear(width // config.o_groups, config.o_groups * config.o_lora_rank, config.o_groups)
        self.wo_b = nn.Linear(config.o_groups * config.o_lora_rank, config.hidden_size, bias=False)
        self.attn_sink = nn.Parameter(torch.zeros(self.num_heads, dtype=torch.float32))

    def latents(self, hidden_states: Tensor) -> Tensor:
        """Return what queries `(*, R)` are made from, for `(*, D)`."""
        return self.q_norm(self.wq_a(hidden_states))

    def queries(self, latents: Tensor, rotary: Rotary) -> Tensor:
        """Return queries `(*, H, c)` for latents `(*, R)`."""
        query = self.head_norm(self.wq_b(latents).unflatten(-1, (self.num_heads, self.head_dim)))
        return rotate(query, per_head(rotary))

    def keys(self, hidden_states: Tensor, rotary: Rotary) -> Tensor:
        """Return keys, which are values too, `(*, c)` for `(*, D)`."""
        return rotate(self.kv_norm(self.wkv(hidden_states)), rotary)

    def output(self, attended: Tensor, rotary: Rotary) -> Tensor:
        """Return the output `(*, D)` for what the heads gathered, `(*, H, c)`."""
        turned_back = rotate(attended, per_head(rotary), is_inverse=True)
        grouped = turned_back.flatten(-2).unflatten(-1, (self.config.o_groups, -1))
        return self.wo_b(self.wo_a(grouped).flatten(-2))
