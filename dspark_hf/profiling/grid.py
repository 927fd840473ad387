"""The batch sizes, widths, context lengths and numbers of drafts that a profile measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_hf.generation.scheduling.costs.table import Point

_ROWS = (1, 2, 4, 8)
_CONTEXTS = (128, 1024)
# the block size that is assumed when there is no drafter
_NUM_DRAFTS = 7


@dataclass(frozen=True)
class Grid:
    """What to measure, each in ascending order: rows, widths, context lengths, drafts (none without a drafter)."""

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    contexts: tuple[int, ...]
    drafts: tuple[int, ...]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """All pairs of rows and context length, those with the fewest tokens first."""
        pairs = [(rows, context) for rows in self.rows for context in self.contexts]
        return sorted(pairs, key=lambda pair: pair[0] * pair[1])

    def passes(self, shape: tuple[int, int]) -> list[Point]:
        """Return the passes of the target to measure for a pair of `shapes`."""
        return [(*shape, width) for width in self.widths]

    def blocks(self, shape: tuple[int, int]) -> list[Point]:
        """Return the drafted blocks to measure for a pair of `shapes`."""
        return [(*shape, num_drafts) for num_drafts in self.drafts]


def make_grid(
    rows: str | None, widths: str | None, contexts: str | None, *, block_size: int | None, max_positions: int | None
) -> Grid:
    """Return the grid that the options of `dspark-hf profile` ask for; None means an option's default.

    One row, passes of a single token and passes over a drafter's whole block are always measured, since every decision
    compares drafting with plain decoding.

    Args:
        rows: numbers of rows, as in `"1,2,4"`.
        widths: tokens per row in a pass; by default every width up to a whole block, so that no step in the costs is
            missed.
        contexts: tokens that each row already holds before the pass.
        block_size: the drafter's block size, or None without a drafter.
        max_positions: how many positions the target has, or None if its configuration does not say.

    Raises:
        ValueError: if an option holds anything but positive integers, or a context is too long for the target.
    """
    num_drafts = _NUM_DRAFTS if block_size is None else block_size
    given_widths = range(1, num_drafts + 2) if widths is None else _parse(widths, "--widths")
    needed = {1} if block_size is None else {1, 1 + block_size}
    chosen_widths = tuple(sorted(needed.union(given_widths)))
    longest = None if max_positions is None else max_positions - chosen_widths[-1]
    if contexts is None:
        chosen_contexts = tuple(
            sorted({context if longest is None else min(context, longest) for context in _CONTEXTS})
        )
    else:
        chosen_contexts = _parse(contexts, "--contexts")
    if longest is not None and (chosen_contexts[-1] > longest or longest < 1):
        raise ValueError(
            f"`--contexts` must leave room for a pass of {chosen_widths[-1]} in the target's {max_positions} "
            f"positions, got {chosen_contexts[-1]}. Lower it, or `--widths`."
        )
    return Grid(
        rows=tuple(sorted({1, *(_ROWS if rows is None else _parse(rows, "--rows"))})),
        widths=chosen_widths,
        contexts=chosen_contexts,
        drafts=() if block_size is None else tuple(sorted({1, (1 + block_size) // 2, block_size})),
    )


def _parse(text: str, option: str) -> tuple[int, ...]:
    parts: Sequence[str] = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"`{option}` must be positive integers separated by commas, got {text!r}. Try 1,2,4.")
    return tuple(sorted(set(map(int, parts))))
