"""Training terms of DeepSeek-V4 beyond the next-token loss.

N tokens, X experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def balance_loss(affinities: Sequence[Tensor], num_chosen: int, is_real: Tensor | None) -> Tensor:
    """Return how unevenly the routed experts are used: 1 where they are used evenly, more otherwise.

    The load-balancing term of the Switch Transformer over the affinities `(N, X)` of every layer with learned routing:
    X times the sum over experts of the share of tokens times the share of affinity. `is_real` `(N)` leaves padding
    out.
    """
    if not affinities:
        raise ValueError(
            "`output_router_logits` must be False for a model whose layers all route by token id, got True. Leave it "
            "out."
        )
    terms = []
    for affinity in affinities:
        shares = affinity / affinity.sum(-1, keepdim=True)
        uses = torch.zeros_like(shares).scatter_(-1, affinity.topk(num_chosen, dim=-1).indices, 1.0) / num_chosen
        if is_real is not None:
            shares, uses = shares[is_real], uses[is_real]
        terms.append((uses.mean(0) * shares.mean(0)).sum() * affinity.shape[-1])
    device = terms[0].device
    return torch.stack([term.to(device) for term in terms]).mean()
