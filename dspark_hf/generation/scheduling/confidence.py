"""Where a scheduler's confidence comes from: the drafter's head, or the estimator that learns while decoding.

b rows, K drafts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling.adaptive.memory import remembered
from dspark_hf.generation.scheduling.defaults import MOST_IDLE_ROUNDS
from dspark_hf.generation.scheduling.estimator import AcceptanceEstimator
from dspark_hf.generation.scheduling.interface import Call, Outcome

SOURCES = ("head", "online")


class ConfidenceSource(ABC):
    """Give the chance that each draft is accepted, given that its prefix is."""

    wants_margins: bool = False

    @abstractmethod
    def read(self, drafted: DraftedBlock) -> Tensor:
        """Return the confidence `(b, K)`, fp32; entry k depends on the drafts before k only."""

    @abstractmethod
    def learn(self, outcome: Outcome) -> None:
        """Learn what came of the block that was read last."""


class HeadConfidence(ConfidenceSource):
    """The drafter's own confidence head, as calibrated as the drafter is."""

    def read(self, drafted: DraftedBlock) -> Tensor:
        if drafted.confidence is None:
            raise ValueError(
                "`scheduler` must take its confidence online with a drafter that has no confidence head, got "
                "confidence='head'. Pass a scheduler with `confidence=\"online\"`, or leave out the threshold and cap "
                "the drafts with `num_assistant_tokens`."
            )
        return drafted.confidence

    def learn(self, outcome: Outcome) -> None:
        """Nothing: a head is calibrated beforehand."""


class OnlineConfidence(ConfidenceSource):
    """The estimator that needs no trained head.

    Args:
        estimator: it is taught what becomes of the blocks.
        explores: whether a block is taken to be sure now and then if no draft is verified any more: else a low
            estimate would never be put right. For schedulers that do not look after that themselves.
    """

    wants_margins = True

    def __init__(self, estimator: AcceptanceEstimator, *, explores: bool = False):
        self._estimator = estimator
        self._explores = explores
        # of the block that was read last
        self.margins: list[list[float]] = []

    def read(self, drafted: DraftedBlock) -> Tensor:
        assert drafted.margins is not None
        margins = drafted.margins.cpu()
        self.margins = margins.tolist()
        # earlier rounds decide on this, so that no draft does
        if self._explores and self._estimator.num_idle >= MOST_IDLE_ROUNDS:
            return torch.ones_like(margins)
        return self._estimator.estimate(margins)

    def learn(self, outcome: Outcome) -> None:
        if outcome.num_drafted:
            self._estimator.learn(self.margins, outcome.num_verified, outcome.num_accepted)


class _HeadOrOnline(ConfidenceSource):
    """The head's confidence if blocks come with one, else the estimator's."""

    wants_margins = True

    def __init__(self, estimator: AcceptanceEstimator):
        self._head = HeadConfidence()
        self._online = OnlineConfidence(estimator, explores=True)
        self._chosen: ConfidenceSource = self._online

    def read(self, drafted: DraftedBlock) -> Tensor:
        self._chosen = self._online if drafted.confidence is None else self._head
        return self._chosen.read(drafted)

    def learn(self, outcome: Outcome) -> None:
        self._chosen.learn(outcome)


def check_source_name(name: str | None) -> str | None:
    """Return `name` if it is None or one of `SOURCES`.

    Raises:
        ValueError: if it is neither.
    """
    if name is not None and name not in SOURCES:
        raise ValueError(f"`confidence` must be one of {SOURCES}, got {name!r}. Leave it out for the head, if any.")
    return name


def find_source(name: str | None, call: Call) -> ConfidenceSource:
    """Return the source of that name; None means the head if the drafter has one, else the estimator."""
    if name == "head":
        return HeadConfidence()
    estimator = remembered(call).estimator
    return OnlineConfidence(estimator, explores=True) if name == "online" else _HeadOrOnline(estimator)
