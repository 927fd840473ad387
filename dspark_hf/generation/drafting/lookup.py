"""Drafts that need no model: what followed the latest tokens where they stood before in prompt or text.

b rows, W drafts, K of them the drafter's, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dspark_hf.generation.drafting.chances import MatchChances
from dspark_hf.generation.drafting.interface import DraftContext, DraftedBlock, Drafter, Sampler

# how far back a match is followed: beyond, it is as sure as it gets
_LONGEST_MATCH = 32


class TextIndex:
    """A text that knows where its latest tokens stood before.

    Of every sequence of `min_match`, twice and four times as many tokens it keeps the latest places, in hash tables.
    So a token costs the same however long the text is. The match is the latest place of the longest of these
    sequences; beyond their length it is kept for as long as the text goes on as it did there. It `is_disputed` if the
    text went on otherwise behind the place of the same sequence before that.

    Args:
        min_match: tokens that a match has at least.

    Example:

        >>> index = TextIndex()
        >>> index.extend([5, 6, 7, 8, 9, 5, 6, 7])
        >>> index.match_length, index.continuation(4)
        (3, [8, 9, 5, 6])
    """

    def __init__(self, min_match: int = 1, prompt: Sequence[int] = ()):
        self.match_length = 0
        self.is_disputed = False
        self._ids: list[int] = []
        # by the hash of a sequence, the place behind it; and behind each place, the place before
        self._places: dict[int, dict[int, int]] = {size * min_match: {} for size in (4, 2, 1)}
        self._before: dict[int, dict[int, int]] = {size: {} for size in self._places}
        # the place of the token that continues the match
        self._next = 0
        self._prompt_length = len(prompt)
        self.extend(prompt)

    @property
    def is_in_prompt(self) -> bool:
        """Whether the match is one with the prompt."""
        return self._next < self._prompt_length

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens."""
        if not token_ids:
            return
        start = len(self._ids)
        self._ids.extend(token_ids)
        end = len(self._ids)
        # those at the end last: a text must not match itself where it ends
        self._enter(start, end - 1)
        if not self._goes_on(end - start):
            self._search()
        self._enter(end - 1, end)

    def continuation(self, count: int) -> list[int]:
        """Return the `count` tokens that followed the match, none if there is no match.

        Where the text ends it goes on as if it repeated itself.
        """
        if not self.match_length or not count:
            return []
        found = self._ids[self._next : self._next + count]
        return (found * -(-count // len(found)))[:count]

    def _enter(self, start: int, end: int) -> None:
        """Note the sequences that end at the tokens from `start` to `end`."""
        for size, places in self._places.items():
            first = max(start, size - 1)
            if first < end:
                parts = (self._ids[first - back : end - back] for back in range(size))
                before = self._before[size]
                for place, key in enumerate(map(hash, zip(*parts, strict=True)), start=first + 1):
                    if key in places:
                        before[place] = places[key]
                    places[key] = place

    def _goes_on(self, count: int) -> bool:
        """Follow the match over the latest `count` tokens; return whether it holds, and nothing could be longer."""
        followed = self._ids[self._next : self._next + count]
        holds = self.match_length > 0 and followed == self._ids[-count:]
        self.match_length, self._next = (self.match_length + count, self._next + count) if holds else (0, 0)
        self.is_disputed = False
        return self.match_length > max(self._places)

    def _search(self) -> None:
        end = len(self._ids)
        for size, places in self._places.items():
            place = places.get(hash(tuple(self._ids[: end - size - 1 : -1]))) if size <= end else None
            length = 0 if place is None else self._common_length(place)
            # different sequences may have the same hash
            if place is not None and length >= size:
                self.match_length, self._next = length, place
                before = self._before[size].get(place)
                self.is_disputed = before is not None and self._ids[before] != self._ids[place]
                return
        self.match_length = 0

    def _common_length(self, place: int) -> int:
        """Return how many tokens before `place` are those at the end of the text."""
        ids, end = self._ids, len(self._ids)
        most = min(place, _LONGEST_MATCH)
        return next((back for back in range(most) if ids[place - 1 - back] != ids[end - 1 - back]), most)


@dataclass(frozen=True)
class Offer:
    """What a row could draft without a model.

    Args:
        token_ids: the drafts; none if there is no match.
        chances: of each draft, the chance that it is accepted if those before it are.
    """

    token_ids: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()

    def survival(self) -> list[float]:
        """Return the chance of each draft that it and all before it are accepted."""
        survival, product = [], 1.0
        for chance in self.chances:
            product *= chance
            survival.append(product)
        return survival

    def up_to(self, most: int) -> Offer:
        """Return the offer's first drafts."""
        return Offer(self.token_ids[:most], self.chances[:most]) if len(self.token_ids) > most else self

    def expected(self, most: int) -> float:
        """Return how many of the first `most` drafts are expected to be accepted."""
        return sum(self.survival()[:most])


class Lookups:
    """The texts of a batch's rows, and what they offer.

    Args:
        prompts: the rows' prompts, without padding.
        chances: how sure drafts are; learns from every token that is written, whoever drafted it.
        min_match: tokens that a match has at least.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], chances: MatchChances, *, min_match: int = 1):
        self._chances = chances
        self._rows = [TextIndex(min_match, prompt) for prompt in prompts]

    def offers(self, rooms: Sequence[int]) -> list[Offer]:
        """Return every row's offer of at most `rooms[r]` drafts, or an empty list if none has any."""
        counts = [room if row.match_length else 0 for row, room in self._pairs(rooms)]
        if not any(counts):
            return []
        return [self._offer(row, count) for row, count in self._pairs(counts)]

    def _pairs(self, numbers: Sequence[int]) -> zip[tuple[TextIndex, int]]:
        return zip(self._rows, numbers, strict=True)

    def _offer(self, row: TextIndex, count: int) -> Offer:
        if count < 1:
            return Offer()
        chances = self._chances.of_drafts(
            row.match_length, count, is_disputed=row.is_disputed, is_in_prompt=row.is_in_prompt
        )
        return Offer(tuple(row.continuation(count)), chances)

    def read(self, new_tokens: Sequence[Sequence[int]]) -> None:
        """Append every row's new tokens, and learn from them whether matches go on."""
        for row, tokens in zip(self._rows, new_tokens, strict=True):
            if row.match_length:
                expected = row.continuation(len(tokens))
                went_on = [a == b for a, b in zip(expected, tokens, strict=True)]
                self._chances.learn(
                    row.match_length, went_on, is_disputed=row.is_disputed, is_in_prompt=row.is_in_prompt
                )
            row.extend(tokens)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only `rows` of the batch, in that order."""
        self._rows = [self._rows[row] for row in rows]

    def append_rows(self, other: Lookups) -> None:
        """Append the rows of other lookups, which end there."""
        self._rows = self._rows + other._rows


class NoContext(DraftContext):
    """The context of a drafter that drafts nothing by itself."""

    def extend(self, hidden_states: Tensor, positions: Tensor, num_tokens: Sequence[int]) -> None:
        """Read nothing."""

    def draft(self, anchor_ids: Tensor, positions: Tensor, num_drafts: int, sampler: Sampler) -> DraftedBlock:
        """Return the anchors `(B)`, repeated: only who measures what drafting costs asks for it."""
        return DraftedBlock(anchor_ids[:, None].expand(-1, num_drafts), None, None)

    def select_rows(self, rows: Tensor) -> None:
        """Nothing to select from."""

    def append_rows(self, other: NoContext) -> None:
        """Nothing to append."""


class NoDrafter(Drafter):
    """Draft nothing: what a stream decodes with that was given no drafter."""

    # nothing is to be planned
    scheduler = "fixed"
    drafts = "lookup"
    sources = ("lookup",)
    longest_lookup = 0
    block_size = 0
    target_layer_ids: list[int] = []

    def check_target(self, target: Any) -> None:
        """Any target will do."""

    def start(self, target: Any, batch_size: int) -> DraftContext:
        """Return a context that reads nothing."""
        return NoContext()


def with_lookups(
    drafted: DraftedBlock | None, offers: Sequence[Offer], num_looked_up: Sequence[int], device: torch.device
) -> DraftedBlock:
    """Return the block in which row r drafts the first `num_looked_up[r]` tokens of its offer, if any.

    The other rows keep the drafter's drafts. A draft that was looked up is certain: nothing is drawn, so it counts as
    drawn from a distribution that knows this token alone.
    """
    num_modelled = 0 if drafted is None else drafted.num_drafts
    width = max(num_modelled, *num_looked_up)
    pairs = list(zip(offers, num_looked_up, strict=True))
    # rows are filled up with token 0, which their limits keep from being verified
    rows = [[*offer.token_ids[:count], *[0] * (width - count)] for offer, count in pairs]
    survivals = [[*offer.chances[:count], *[0.0] * (width - count)] for offer, count in pairs]
    place = device if drafted is None else drafted.token_ids.device
    found, chances = torch.tensor(rows, device=place), torch.tensor(survivals, device=place)
    if drafted is None:
        return DraftedBlock(found, None, chances, is_certain=None, num_modelled=0)
    is_row = torch.tensor([count > 0 for count in num_looked_up], device=place)[:, None]
    token_ids = torch.where(is_row, found, _widened(drafted.token_ids, width))
    confidence, margins = drafted.confidence, drafted.margins
    chances = chances.where(is_row, torch.nan)
    if confidence is not None:
        confidence = torch.where(is_row, chances, _widened(confidence, width))
    return replace(
        drafted,
        token_ids=token_ids,
        confidence=confidence,
        margins=None if margins is None else _widened(margins, width),
        is_certain=is_row.expand(-1, width),
        chances=chances,
        num_modelled=num_modelled,
    )


def _widened(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
