"""Blocks whose true acceptance is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dspark_hf.calibration.observations import Observations


def synthetic_observations(
    num_blocks: int,
    temperatures: Sequence[float],
    *,
    mean_logit: float = 1.0,
    num_prompts: int = 10,
    share_cut: float = 0.0,
    seed: int = 0,
) -> Observations:
    """Return blocks whose draft k is accepted with the sigmoid of its logit over `temperatures[k]`.

    A share of them, `share_cut`, is verified only in part.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (num_blocks, len(temperatures))
    truth = mean_logit + 1.5 * torch.randn(size, generator=generator, dtype=torch.float64)
    would_be_accepted = torch.rand(size, generator=generator) < truth.sigmoid()
    num_observed = torch.full((num_blocks,), len(temperatures))
    is_cut = torch.rand(num_blocks, generator=generator) < share_cut
    num_observed[is_cut] = torch.randint(1, len(temperatures) + 1, (int(is_cut.sum()),), generator=generator)
    num_accepted = torch.minimum(would_be_accepted.long().cumprod(-1).sum(-1), num_observed)
    logits = truth * torch.tensor(temperatures, dtype=torch.float64)
    logits[torch.arange(len(temperatures)) >= num_observed[:, None]] = float("nan")
    return Observations(logits, num_accepted, num_observed, torch.arange(num_blocks) % num_prompts)
