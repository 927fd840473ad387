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
        self._text = ""

    def add(self, token_id: int) -> str:
        """Return the text that `token_id` adds."""
        self._ids.append(token_id)
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        piece, self._text = text[len(self._text) :], text
        return piece
