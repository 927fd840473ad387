"""Tokens of a pass that continue each other as a tree does, or as a chain.

B batch, W tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Tree:
    """Which token of a pass continues which, the same for every row.

    `parents` and `depths`, W of each on the host: a token's parent in the pass, -1 for the anchor, and how many tokens
    lie between both; `ancestry` `(W, W)`: whether token j is token i itself or one that it continues.
    """

    parents: list[int]
    depths: list[int]
    ancestry: Tensor


def read_tree(parents: Tensor | None, width: int) -> Tree | None:
    """Return the tree that `parents` `(W,)` describe, None for a chain.

    Raises:
        ValueError: if these are no parents of `width` tokens.
    """
    if parents is None:
        return None
    given = parents.tolist()
    is_sound = len(given) == width and given[0] == -1 and all(0 <= given[i] < i for i in range(1, width))
    if not is_sound:
        raise ValueError(
            f"`parents` must be -1 for the first of {width} tokens, and for each other an earlier one's index, got "
            f"{given}. Put every token behind its parent."
        )
    if given == list(range(-1, width - 1)):
        return None
    depths, ancestry = [0], torch.eye(width, dtype=torch.bool, device="cpu")
    for index in range(1, width):
        depths.append(depths[given[index]] + 1)
        ancestry[index] |= ancestry[given[index]]
    return Tree(given, depths, ancestry)


def chain_of(width: int) -> Tree:
    """Return the tree of `width` tokens of which each continues the one before."""
    return Tree(list(range(-1, width - 1)), list(range(width)), torch.ones(width, width, dtype=torch.bool).tril())


def refuse_tree(parents: Tensor | None, width: int, name: str) -> None:
    """Raise a `ValueError` if `parents` `(W,)` describe no chain, for a target that takes nothing else."""
    if read_tree(parents, width) is not None:
        assert parents is not None
        raise ValueError(
            f"`parents` must describe a chain for {name}, which does not take trees, got {parents.tolist()}. Leave "
            "them out, and draft one token for each position."
        )


def is_front(kept: Sequence[int]) -> bool:
    """Return whether `kept` are the first indices of all, in order."""
    front = range(len(kept))
    return kept == front if isinstance(kept, range) else list(kept) == list(front)


def check_kept(kept: Sequence[Sequence[int]], width: int, tree: Tree | None = None) -> None:
    """Raise a `ValueError` unless every row keeps a path of the last pass, from its anchor on."""
    for row in kept:
        if tree is None:
            is_path = len(row) <= width and is_front(row)
        else:
            is_path = all(
                0 <= token < width and tree.parents[token] == before
                for before, token in zip([-1, *row], row, strict=False)
            )
        if not is_path:
            raise ValueError(
                f"`kept` must lead from the anchor of a pass of {width} tokens from parent to child, got {list(row)}. "
                "Keep no token without its parent."
            )
