"""Feed a streamer one token at a time, in the order in which plain `generate` feeds it."""

from __future__ import annotations

from collections.abc import Container

import torch
from transformers.generation import BaseStreamer

from dspark_hf.generation.call.sequences import Sequences


class OrderedStream:
    """Hold tokens back until every row has them: a streamer gets one token of each row at a time.

    Args:
        streamer: the user's streamer, or None.
        sequences: the committed tokens.
    """

    def __init__(self, streamer: BaseStreamer | None, sequences: Sequences):
        self._streamer = streamer
        self._sequences = sequences
        self._sent = sequences.prompt_length

    def flush(self, padded_rows: Container[int]) -> None:
        """Send what all rows have; rows in `padded_rows` are finished and give padding."""
        if self._streamer is None:
            return
        lengths = self._sequences.lengths
        open_rows = [length for row, length in enumerate(lengths) if row not in padded_rows]
        end = min(open_rows, default=max(lengths))
        ids = self._sequences.padded()
        for column in range(self._sent, end):
            self._streamer.put(ids[:, column].cpu().to(torch.long))
        self._sent = max(self._sent, end)

    def end(self) -> None:
        """Tell the streamer that generation is over."""
        if self._streamer is not None:
            self.flush(range(self._sequences.batch_size))
            self._streamer.end()
