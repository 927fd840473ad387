"""One answer on its way from the thread that decodes to the coroutine that sends it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.generation import BaseStreamer

from dspark_hf.generation.requests.request import FinishedRequest, Request
from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.pieces import TextPieces
from dspark_hf.serving.held_text import Delta, HeldText, TokenLogprobs
from dspark_hf.serving.processors import LogprobRecorder


@dataclass(frozen=True)
class Ending:
    """How an answer ended.

    Args:
        reason: `"stop"`, `"length"`, or None where it was cancelled or failed.
        error: what failed, if anything.
        statistics: of its rounds, if it got as far.
    """

    reason: str | None
    error: BaseException | None = None
    statistics: SpeculationStatistics | None = None


class Answer(BaseStreamer):
    """Turn tokens into text up to the first stop string, and hand both to an event loop.

    The decoding thread calls `put` and `finish`; a coroutine of the loop that made it reads `next`.

    Args:
        tokenizer: decodes the tokens; used by the decoding thread alone.
        prompt_length: tokens of the prompt.
        end_ids: tokens that end an answer.
        stops: texts that end an answer.
        recorder: what knows the tokens' probabilities, if they are asked for.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_length: int,
        *,
        end_ids: Sequence[int] = (),
        stops: Sequence[str] = (),
        recorder: LogprobRecorder | None = None,
    ):
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._end_ids = frozenset(end_ids)
        self._recorder = recorder
        self._pieces = TextPieces(tokenizer)
        self._text = HeldText(stops)
        self._last_token: int | None = None
        self._is_prompt = True
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Delta | Ending] = asyncio.Queue()
        self.request: Request | None = None
        self.num_tokens = 0
        self.ending: Ending | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token a call."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token_id in value.flatten().tolist():
            # what a round wrote behind a stop string is nobody's
            if not self._text.is_stopped:
                self._send(self._take(token_id))

    def end(self) -> None:
        """Do nothing: `finish` says more."""

    def _take(self, token_id: int) -> Delta:
        entry = self._entry(token_id)
        self.num_tokens += 1
        self._last_token = token_id
        delta = self._text.add(self._pieces.add(token_id), entry)
        if self._text.is_stopped and self.request is not None:
            self.request.cancel()
        return delta

    def _entry(self, token_id: int) -> TokenLogprobs | None:
        if self._recorder is None:
            return None
        logprob, top = self._recorder.take(self._prompt_length + self.num_tokens, token_id)
        if token_id in self._end_ids:
            # it is no part of the text
            return None
        words = tuple((self._tokenizer.decode([other]), value) for other, value in top)
        return TokenLogprobs(self._tokenizer.decode([token_id]), logprob, words, self._text.length)

    def finish(self, finished: FinishedRequest) -> None:
        """Take what became of the request."""
        reason = None
        if self._text.is_stopped:
            reason = "stop"
        elif finished.error is None and not finished.request.is_cancelled:
            self._send(self._text.add(self._pieces.rest()))
            reason = "stop" if self._text.is_stopped or self._last_token in self._end_ids else "length"
            self._send(self._text.rest())
        self._send(Ending(reason, None if reason else finished.error, finished.statistics))

    def _send(self, event: Delta | Ending) -> None:
        if event == Delta():
            return
        # a loop that has ended has nobody who waits
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Delta | None:
        """Wait for text, and return all that is there; None at the end, which `ending` tells of."""
        delta = Delta()
        while self.ending is None:
            event = await self._events.get() if delta == Delta() or not self._events.empty() else None
            if event is None:
                return delta
            if isinstance(event, Ending):
                self.ending = event
            else:
                delta += event
        return None if delta == Delta() else delta
