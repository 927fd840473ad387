"""Show tokens as they come, the accepted drafts in another colour than the target's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from dspark_hf.pieces import TextPieces


class TimedStreamer(BaseStreamer):
    """Hand every piece of text on as soon as it is there, and keep the time that takes apart.

    Args:
        tokenizer: decodes the tokens.
        show: called with a piece and whether it was a draft.
        origins: returns, for the tokens so far, whether each was a draft; what it does not know yet was none.

    Attributes:
        seconds: time spent here, which is none of the model's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        show: Callable[[str, bool], None],
        origins: Callable[[], Sequence[bool]] = list,
    ):
        self._pieces = TextPieces(tokenizer)
        self._show = show
        self._origins = origins
        self._num_tokens = 0
        self._is_prompt = True
        self.seconds = 0.0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token a call."""
        if self._is_prompt:
            self._is_prompt = False
            return
        start = perf_counter()
        for token_id in value.flatten().tolist():
            origins = self._origins()
            is_draft = self._num_tokens < len(origins) and origins[self._num_tokens]
            self._num_tokens += 1
            self._show(self._pieces.add(token_id), is_draft)
        self.seconds += perf_counter() - start

    def end(self) -> None:
        """Do nothing: every piece has been shown."""
