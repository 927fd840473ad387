"""Mixture of experts of DeepSeek-V4: router in fp32, experts one by one, a shared expert.

N tokens, D hidden, F expert width, X experts, A experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig


class Router(nn.Module):
    """Choose the experts of every token: by its id in the first layers, by learned affinity elsewhere."""

    def __init__(self, config: DeepseekV4DSparkConfig, *, is_hashed: bool):
        super().__init__()
        self.num_chosen = config.num_experts_per_tok
        self.is_normalised = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if is_hashed:
            table = torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.int32)
            self.tid2eid: nn.Parameter | None = nn.Parameter(table, requires_grad=False)
        else:
            self.tid2eid = None
            # no gradient passes the choice of experts
            bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden_states: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the chosen experts and their weights, both `(N, A)`, and the affinities `(N, X)` in fp32.

        Takes `hidden_states` `(N, D)` and, in a hashed layer, `token_ids` `(N)`.
        """
        logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        affinity = nn.functional.softplus(logits).sqrt()
        if self.tid2eid is not None:
            if token_ids is None:
                raise ValueError(
                    "`input_ids` must be given, also beside `inputs_embeds`: the first layers choose their experts by "
                    "token id, got None. Pass both."
                )
            chosen = self.tid2eid[token_ids].long()
        else:
            # the bias balances the choice; it is no part of the weight
            chosen = (affinity + self.bias).topk(self.num_chosen, dim=-1).indices
        weights = affinity.gather(-1, chosen)
        if self.is_normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights * self.scale, affinity


class Expert(nn.Module):
    """One gated feed-forward network with clamped activations, fp32 between its products."""

    def __init__(self, config: DeepseekV4DSparkConfig):
        super().__init__()
        self.limit = config.swiglu_limit
        self.w1 = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)
        self.w2 = nn.Linear(config.moe_intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)

    def forward(self, hidden_states: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the output `(N, D)` for `hidden_states` `(N, D)`, times `weights` `(N)` if given."""
        gate = self.w1(hidden_states).float().clamp(max=self.limit)
        up = self.w3(hidden_states).float().clamp(-self.limit, self.limit)
        inner = nn.functional.silu(gate) * up
        if weights is not None:
            # before the last product, as the released code does
            inner = inner * _for_shard(weights, self.w1.weight)[:, None]
        return self.w2(inner.to(hidden_states.dtype))


def _for_shard(weights: Tensor, shard: Tensor) -> Tensor:
    """Return `weights`, whose gradient is summed over the processes that each hold a shard of the expert."""
    if not isinstance(shard, DTensor):
        return weights
    replicated = DTensor.from_local(weights, shard.device_mesh, [Replicate()], run_check=False)
    return replicated.to_local(grad_placements=[Partial()])


class MixtureOfExperts(nn.Module):
    """Routed experts and the shared one; only experts that some token chose are touched."""

    def __init__(self, config: DeepseekV4DSparkConfig, *, is_hashed: bool):
        super().__init__()
        self.gate = Router(config, is_hashed=is_hashed)
        self.experts = nn.ModuleList([Expert(config) for _ in range(config.n_routed_experts)])
        self.shared_experts = Expert(config)

    def forward(self, hidden_states: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output `(*, D)` and the router's affinities `(N, X)`.

        Takes `hidden_states` `(*, D)` of N tokens and `token_ids` `(*)`.
        """
        states = hidden_states.flatten(0, -2)
        chosen, weights, affinity = self.gate(states, None if token_ids is None else token_ids.flatten())
        output = torch.zeros_like(states, dtype=torch.float32)
        # grouped by expert with one transfer to the host
        order = chosen.flatten().argsort(stable=True)
        rows, sorted_weights = order // chosen.shape[1], weights.flatten()[order]
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        start = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                mine = slice(start, start + count)
                start += count
                fed = expert(states[rows[mine]], sorted_weights[mine])
                output = output.index_add(0, rows[mine], fed.float())
        output = output + self.shared_experts(states).float()
        return output.to(hidden_states.dtype).view(hidden_states.shape), affinity
