"""Text that may have to be taken back: what could begin a stop string waits until it is known not to."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's text, its log probability, and the most probable ones with theirs; `offset` is where it starts."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int = 0


@dataclass(frozen=True)
class Delta:
    """Text that is sent, and the tokens that begin in it, where their probabilities were asked for."""

    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()

    def __add__(self, other: Delta) -> Delta:
        return Delta(self.text + other.text, self.logprobs + other.logprobs)


class HeldText:
    """The text of an answer, let go as far as no stop string can begin in it.

    Args:
        stops: the stop strings.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        # what waits, and where it begins in the whole text
        self._waiting = ""
        self._start = 0
        self._entries: deque[TokenLogprobs] = deque()
        self.is_stopped = False

    @property
    def length(self) -> int:
        """Number of characters so far."""
        return self._start + len(self._waiting)

    def add(self, piece: str, entry: TokenLogprobs | None = None) -> Delta:
        """Append a piece and its token; return what can be sent. The first stop string ends the text before it."""
        if entry is not None:
            self._entries.append(entry)
        self._waiting += piece
        # no stop string lies in what waited before: it would have ended the text
        found = [place for place in map(self._waiting.find, self._stops) if place >= 0]
        if found:
            self.is_stopped = True
            self._waiting = self._waiting[: min(found)]
            return self.rest(before_end=True)
        return self._let_go(len(self._waiting) - self._num_held())

    def rest(self, *, before_end: bool = False) -> Delta:
        """Return all that waits; with `before_end`, tokens behind the last character are dropped."""
        end = self.length
        if before_end:
            self._entries = deque(entry for entry in self._entries if entry.offset < end)
        delta = Delta(self._waiting, tuple(self._entries))
        self._waiting, self._start = "", end
        self._entries.clear()
        return delta

    def _let_go(self, count: int) -> Delta:
        text, self._waiting = self._waiting[:count], self._waiting[count:]
        self._start += count
        entries = []
        while self._entries and (self._entries[0].offset < self._start or not self._waiting):
            entries.append(self._entries.popleft())
        return Delta(text, tuple(entries))

    def _num_held(self) -> int:
        """Return the length of the longest end of the text that a stop string begins with."""
        most = min(self._longest - 1, len(self._waiting))
        ends = (self._waiting[-count:] for count in range(most, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)
