"""What training shows of a drafter: loss terms, expected tau, accept rate by position.

N blocks, K block_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dspark_hf.training.losses import DraftLosses


class DraftMetrics:
    """Sums over blocks and slots, so that parts (batches, processes) add up exactly; ratios are taken at the end.

    Args:
        block_size: slots of a block.
    """

    def __init__(self, block_size: int):
        self._block_size = block_size
        # on the device, in one tensor: a step must not wait for its numbers, processes add them in one call
        self._sums: Tensor | None = None

    def add(self, losses: DraftLosses, valid: Tensor) -> None:
        """Count one batch: `losses` of the True slots of `valid` `(N, K)`, in their order."""
        rate = torch.zeros(valid.shape, device=valid.device)
        rate[valid] = losses.accept_rate
        # a block of which no slot is valid is padding
        blocks = valid[:, 0]
        accepted_length = (rate.cumprod(-1).sum(-1) + 1) * blocks
        sums = torch.cat(
            [
                torch.stack([losses.total.detach().double(), valid.new_ones((), dtype=torch.float64)]),
                torch.stack([accepted_length.sum(), blocks.sum()]).double(),
                torch.stack([losses.cross_entropy.sum(), losses.distance.sum(), losses.confidence.sum()]).double(),
                rate.sum(0).double(),
                valid.sum(0).double(),
            ]
        )
        self._sums = sums if self._sums is None else self._sums + sums

    def summary(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Return the means and start anew; `{}` if nothing was counted.

        Args:
            reduce: adds up the sums of several processes.

        Returns:
            `loss`; `expected_tau` (tokens per round, bonus included); `loss_ce`, `loss_tv` (L1 distance) and
            `loss_confidence` (means over slots, unweighted); `accept_rate_1` to `accept_rate_K` (Eq. 8, on the true
            prefix).
        """
        if self._sums is None:
            return {}
        sums = reduce(self._sums).tolist()
        self._sums = None
        size = self._block_size
        total, batches, lengths, blocks, *terms = sums[:7]
        rates, counts = sums[7 : 7 + size], sums[7 + size :]
        num_slots = max(sum(counts), 1)
        summary = {"loss": total / max(batches, 1), "expected_tau": lengths / max(blocks, 1)}
        names = ("loss_ce", "loss_tv", "loss_confidence")
        summary.update({name: term / num_slots for name, term in zip(names, terms, strict=True)})
        for position, (rate, count) in enumerate(zip(rates, counts, strict=True), start=1):
            summary[f"accept_rate_{position}"] = rate / max(count, 1)
        return {name: round(value, 4) for name, value in summary.items()}
