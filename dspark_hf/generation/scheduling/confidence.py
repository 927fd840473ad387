"""Sources of confidence: the drafter's head, or the estimator that learns while decoding.

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
from dspark_hf.generation.scheduling.interface import CallInfo, RoundOutcome

SOURCES = ("head", "online")


class ConfidenceSource(ABC):
    """Gives the chance that each draft is accepted if the drafts before it are."""

    wants_margins: bool = False

    @abstractmethod
    def read(self, drafted: DraftedBlock) -> Tensor:
        """Return the confidence `(b, K)`, fp32; entry k depends on the drafts before k only."""

    @abstractmethod
    def learn(self, outcome: RoundOutcome) -> None:
        """Learn from the fate of the block that was read last."""


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

    def learn(self, outcome: RoundOutcome) -> None:
        """Do nothing: a head is calibrated beforehand."""


class OnlineConfidence(ConfidenceSource):
    """The estimator that needs no trained head.

    Args:
        estimator: learns from the fate of every block.
        explores: whether to report full confidence once when no draft has been verified for many rounds. Otherwise an
            estimate that is too low would never be corrected. For schedulers that make no trials themselves.
    """

    wants_margins = True

    def __init__(self, estimator: AcceptanceEstimator, *, explores: bool = False):
        self._estimator = estimator
        self._explores = explores
        # margins of the block that was read last
        self.margins: list[list[float]] = []

    def read(self, drafted: DraftedBlock) -> Tensor:
        if drafted.margins is None:
            # all was looked up
            assert drafted.confidence is not None
            return drafted.confidence
        margins = drafted.margins.cpu()
        self.margins = margins.tolist()
        confidence = self._estimate(margins)
        if drafted.chances is None:
            return confidence
        chances = drafted.chances.cpu()
        return torch.where(chances.isnan(), confidence, chances)

    def _estimate(self, margins: Tensor) -> Tensor:
        # only earlier rounds decide this, so that no draft decides about itself
        if self._explores and self._estimator.num_idle >= MOST_IDLE_ROUNDS:
            return torch.ones_like(margins)
        return self._estimator.estimate(margins)

    def learn(self, outcome: RoundOutcome) -> None:
        if outcome.num_drafted:
            rows = outcome.modelled_rows
            counts = (outcome.num_verified, outcome.num_accepted)
            self._estimator.learn([self.margins[i] for i in rows], *([of[i] for i in rows] for of in counts))


class _HeadOrOnline(ConfidenceSource):
    """The head's confidence if the drafter has a head, else the estimator's."""

    wants_margins = True

    def __init__(self, estimator: AcceptanceEstimator):
        self._head = HeadConfidence()
        self._online = OnlineConfidence(estimator, explores=True)
        self._chosen: ConfidenceSource = self._online

    def read(self, drafted: DraftedBlock) -> Tensor:
        self._chosen = self._online if drafted.confidence is None else self._head
        return self._chosen.read(drafted)

    def learn(self, outcome: RoundOutcome) -> None:
        self._chosen.learn(outcome)


def check_source_name(name: str | None) -> str | None:
    """Return `name` if it is None or one of `SOURCES`.

    Raises:
        ValueError: if it is neither.
    """
    if name is not None and name not in SOURCES:
        raise ValueError(f"`confidence` must be one of {SOURCES}, got {name!r}. Leave it out for the head, if any.")
    return name


def find_source(name: str | None, call: CallInfo) -> ConfidenceSource:
    """Return the source of that name; None means the head if the drafter has one, else the estimator."""
    if name == "head":
        return HeadConfidence()
    estimator = remembered(call).estimator
    return OnlineConfidence(estimator, explores=True) if name == "online" else _HeadOrOnline(estimator)
