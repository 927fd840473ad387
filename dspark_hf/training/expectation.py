"""What a training run may bring: the tau to expect of blocks, text and layers.

    tau = 1 + s b / (r b + h),   s = (layers / 2) ** p * max(text / 480,000, 1) ** q

b are the blocks trained on, of which those that read a position of the text again count less and less; r, h and p are
fitted to the held-out tau of the runs that this repository keeps, each of which weighs as one:

- `drafters/gemma3-270m/training_log_1.jsonl`: 1 layer, 78 thousand tokens of text, 51 to 358 thousand blocks;
- `drafters/smollm2-135m-instruct/training_log_2.jsonl`, a second round after 819 thousand blocks: 2 layers, 480
  thousand tokens, 0.9 to 1.6 million blocks;
- `benchmarks/drafters.md`, all trained with Muon: 1 to 3 layers, the same text, 61 thousand blocks.

`tests/training/test_expectation.py` fits them again, and leaves out one run after the other: what is predicted of it
lies within 15% of what was measured (9% at worst; 7% for the two logs, which tell the most: the table's rows stand in
for one another). Two numbers are others', since these runs do not show them: q follows from one published drafter
(Llama-3.2-1B, 3 layers, about 30 million tokens of its own text, mean tau 3.15), and the worth of repetition, 15.4
passes, from language models (Muennighoff et al., arXiv 2305.16264). More layers, blocks and text than above are
guesses, which `range_of` names; larger targets than of 270 million parameters are guesses too.

Text that is easy to draft brings more than this tells: a drafter that was adapted to a fine-tune's short lines of
arithmetic came to 2.41 where 1.86 were expected. A run's own evaluations tell how easy its text is and what the
drafter had learnt before (`Curve.tau_seen`). From a quarter of a run on they predict its end within 7% for six runs,
among them one on such text, and within 11% for one whose learning rate rose anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# fitted, see above
_REST, _HALF, _LAYERS_POWER = 1.0005, 130_460.0, 0.2
# from elsewhere, see above
_TEXT_POWER, _PASSES = 0.17, 15.4
_TEXT, _LAYERS = 480_000, 2
# what a drafter may be worth at the beginning of a run, in blocks
_HAD = (0.0, *(1_000 * 1.15**step for step in range(60)))
# what the runs covered: blocks, tokens of text, layers
_RANGE = ((51_000, 1_640_000, "blocks"), (78_000, 480_000, "tokens of text"), (1, 3, "layers"))


@dataclass(frozen=True)
class Curve:
    """The curve above, with other numbers where it is fitted anew.

    Example:

        >>> round(Curve().tau(1_000_000, num_tokens=480_000, layers=2), 1)
        1.9
    """

    rest: float = _REST
    half: float = _HALF
    layers_power: float = _LAYERS_POWER

    def tau(self, blocks: float, *, num_tokens: int, layers: int, block_size: int = 7) -> float:
        """Return the held-out tau to expect, in tokens per round.

        Args:
            blocks: blocks trained on, over all steps.
            num_tokens: of the text, those that the target wrote.
            layers: of the drafter.
            block_size: drafts of a round.
        """
        gain = strength(num_tokens, layers, self.layers_power) * self._share(worth_of(blocks, num_tokens))
        return 1 + min(gain, block_size)

    def blocks_of(self, tau: float, *, num_tokens: int, layers: int) -> float:
        """Return the blocks, all different ones, that a drafter of this tau is worth; infinite beyond the curve."""
        gain = max(tau - 1, 0.0)
        left = strength(num_tokens, layers, self.layers_power) - self.rest * gain
        return math.inf if left <= 0 else self.half * gain / left

    def tau_after(self, start: float, blocks: float, *, num_tokens: int, layers: int, block_size: int = 7) -> float:
        """Return the tau to expect of a drafter that has `start` on this text before it trains on `blocks`."""
        had = self.blocks_of(start, num_tokens=num_tokens, layers=layers)
        if math.isinf(had):
            return start
        # what it had came from other text, and is not read again
        gain = strength(num_tokens, layers, self.layers_power) * self._share(had + worth_of(blocks, num_tokens))
        return 1 + min(gain, block_size)

    def tau_seen(
        self, seen: Sequence[tuple[float, float]], blocks: float, *, num_tokens: int, block_size: int = 7
    ) -> float:
        """Return the tau to expect of a run after `blocks`, from what its evaluations have `seen`.

        These are pairs of blocks and held-out tau, two at least. They decide s, and how many blocks the drafter was
        worth at the beginning; r and h are the curve's.
        """
        worths, gains = [worth_of(one, num_tokens) for one, _ in seen], [max(tau - 1, 1e-6) for _, tau in seen]
        fits = []
        for had in _HAD:
            shares = [self._share(had + worth) for worth in worths]
            # with the least relative error
            ratios = [share / gain for share, gain in zip(shares, gains, strict=True)]
            scale = sum(ratios) / sum(ratio**2 for ratio in ratios)
            error = sum((scale * ratio - 1) ** 2 for ratio in ratios)
            fits.append((error, scale * self._share(had + worth_of(blocks, num_tokens))))
        return 1 + min(min(fits)[1], block_size)

    def _share(self, worth: float) -> float:
        return worth / (self.rest * worth + self.half)


def worth_of(blocks: float, num_tokens: int) -> float:
    """Return the blocks at positions of their own that are worth as much as `blocks` over this text."""
    repeated = blocks / max(num_tokens, 1) - 1
    if repeated <= 0:
        return blocks
    return num_tokens * (1 + _PASSES * (1 - math.exp(-repeated / _PASSES)))


def strength(num_tokens: int, layers: int, layers_power: float) -> float:
    """Return s, what the text and the layers multiply the gain by."""
    return (layers / _LAYERS) ** layers_power * max(num_tokens / _TEXT, 1.0) ** _TEXT_POWER


def range_of(blocks: float, num_tokens: int, layers: int) -> str | None:
    """Return what lies beyond the runs that the curve was fitted on, in words, or None."""
    beyond = [
        f"{value:,.0f} {name} (fitted on {lowest:,} to {highest:,})"
        for value, (lowest, highest, name) in zip((blocks, num_tokens, layers), _RANGE, strict=True)
        if not lowest <= value <= highest
    ]
    return ", ".join(beyond) or None
