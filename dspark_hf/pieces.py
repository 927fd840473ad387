"""The text that each token adds."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class TextPieces:
    """Turn token ids into the pieces of text they add; half a character waits for the token that completes it.

    Args:
        tokenizer: decodes the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # text is decoded from the piece before the open one on: a tokenizer may write a token otherwise at a start
        self._start = self._open = 0

    def add(self, token_id: int) -> str:
        """Return the text that `token_id` adds."""
        self._ids.append(token_id)
        piece = self.rest()
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        if piece:
            self._start = self._open
        # a token without text, such as a special one, is no start: the space behind it belongs to the text before
        self._open = len(self._ids)
        return piece

    def rest(self) -> str:
        """Return the text that waits to be completed."""
        known = self._decode(self._ids[self._start : self._open])
        return self._decode(self._ids[self._start :])[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
