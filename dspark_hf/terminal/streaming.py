"""Hand text on as tokens are accepted, with who gave each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from dspark_hf.pieces import TextPieces

# called with a piece of text and its source: "target", "model" (the drafter) or "lookup"
Show = Callable[[str, str], None]


class SourceStreamer(BaseStreamer):
    """Hand every piece of text on as soon as it is there, and keep the time that takes apart.

    Args:
        tokenizer: decodes the tokens.
        show: called with a piece and the source of the token that completed it.
        sources: returns the sources of the tokens so far, such as `statistics.token_sources[0]`; what it does not
            know is the target's.

    Attributes:
        token_ids: the new tokens so far.
        sources: the source of each.
        seconds: time spent here, which is none of the model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Show, sources: Callable[[], Sequence[str]] = tuple):
        self._pieces = TextPieces(tokenizer)
        self._show = show
        self._known_sources = sources
        self._is_prompt = True
        self.token_ids: list[int] = []
        self.sources: list[str] = []
        self.seconds = 0.0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token a call."""
        if self._is_prompt:
            self._is_prompt = False
            return
        start = perf_counter()
        known = self._known_sources()
        for token_id in value.flatten().tolist():
            place = len(self.token_ids)
            source = known[place] if place < len(known) else "target"
            self.token_ids.append(token_id)
            self.sources.append(source)
            if piece := self._pieces.add(token_id):
                self._show(piece, source)
        self.seconds += perf_counter() - start

    def end(self) -> None:
        """Show what no further token will complete."""
        if rest := self._pieces.rest():
            self._show(rest, self.sources[-1])
