"""Lossless acceptance of drafts that branch: the target goes from token to token, as far as the tree has its choice.

Every token is the target's own, its best or one drawn from its distribution, as if there were no drafts: so greedy
text is the same, and sampled text has the target's distribution, whatever tree it is. The tree only decides whether
the scores behind a token are there already. A draft is accepted with the chance that the target gives it, as is right
for drafts that were not drawn themselves.

W tokens of a pass, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspark_hf.generation.drawing import draw_or_best
from dspark_hf.generation.rows import Rows
from dspark_hf.generation.targets.interface import TargetPass


@dataclass(frozen=True)
class Walk:
    """How far one row came in a tree.

    `path`: the indices of anchor and accepted drafts in the pass; `scores` `(1, n, V)` behind each of these n tokens;
    `bonus` `(1,)`, the token behind the last; `num_tried`: drafts of the path and one more, if any were there for the
    bonus token's place.
    """

    path: list[int]
    scores: Tensor
    bonus: Tensor
    num_tried: int


def walk(rows: Rows, target_pass: TargetPass, token_ids: Tensor, parents: Tensor) -> Walk:
    """Walk through a pass over one row's `token_ids` `(1, W)`, which continue each other as `parents` `(W,)` say."""
    links = parents.tolist()
    # of two drafts that say the same, either will do
    places = {pair: place for place, pair in enumerate(zip(links, token_ids[0].tolist(), strict=True))}
    path, steps = [0], []
    while True:
        here = replace(target_pass, logits=target_pass.logits[:, path[-1] : path[-1] + 1])
        scores = rows.scores(here, token_ids[:, path[1:]])
        steps.append(scores)
        noisy = rows.with_noise(scores, len(path) - 1)[:, 0]
        probs = rows.probabilities(noisy)
        bonus = draw_or_best(noisy, probs)
        place = places.get((path[-1], int(bonus)))
        if place is None:
            return Walk(path, torch.cat(steps, dim=1), bonus, len(path) - (path[-1] not in links))
        path.append(place)
