"""The text that each token adds."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class TextPieces:
    """Turn token ids into the pieces of text they add; half a character waits for the token that completes it.

    The pieces and the `rest` together are what all tokens are decoded to.

    Args:
        tokenizer: decodes the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        # tokens of the last piece, then those that wait; a piece is what these add to that, since a tokenizer may
        # write the first token of all in another way
        self._ids: list[int] = []
        self._num_known = 0

    def add(self, token_id: int) -> str:
        """Return the text that `token_id` adds."""
        self._ids.append(token_id)
        piece = self.rest()
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        if piece:
            del self._ids[: self._num_known]
        # a token without text, such as a special one, goes with the piece before it
        self._num_known = len(self._ids)
        return piece

    def rest(self) -> str:
        """Return the text that waits to be completed."""
        known = self._decode(self._ids[: self._num_known])
        return self._decode(self._ids)[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
