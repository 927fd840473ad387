"""Drafts recorded behind every position of a text, and what a schedule makes of them at given costs.

Greedy text is the same however it is drafted, and so are the drafts behind a position: recorded once, they tell what
becomes of any schedule's rounds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

import torch

from benchmarks.loads import make_load
from dspark_hf.generation.drafting.interface import DraftedBlock, Drafter
from dspark_hf.generation.drafting.lookup import Lookups
from dspark_hf.generation.proposing import outcome_of, propose
from dspark_hf.generation.scheduling import Batch, CallInfo, Schedule, Scheduler
from dspark_hf.generation.scheduling.costs.table import CostTable
from dspark_hf.generation.statistics import RoundInProgress

# rows of a batch that is recorded, and the context whose costs count
RECORDED_ROWS = 8
CONTEXT = 128
# share of the steps that another program makes so many times longer
DISTURBED, DISTURBANCE = 0.02, 2.5


@dataclass(frozen=True)
class Draft:
    """The block behind a position: how many of its drafts are right, all their margins, and the drafts themselves."""

    num_right: int
    margins: tuple[float, ...]
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Text:
    """What a target wrote after a prompt, and the block behind each of its tokens.

    `token_ids` go on behind the last of the `blocks`, so that its drafts can be judged. Without tokens nothing can be
    looked up.
    """

    blocks: tuple[Draft, ...]
    prompt: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()


class _Recorder(Scheduler, Schedule):
    """Draft whole blocks and verify nothing, so that every position is drafted behind."""

    wants_margins = True

    def __init__(self) -> None:
        self.token_ids: list[list[list[int]]] = []
        self.margins: list[list[list[float]]] = []

    def start(self, call: CallInfo) -> Schedule:
        return self

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        assert drafted.margins is not None
        self.token_ids.append(drafted.token_ids.tolist())
        self.margins.append(drafted.margins.tolist())
        return batch.cut(0)


def record(target: Any, drafter: Drafter, prompts: Sequence[torch.Tensor], length: int) -> list[Text]:
    """Return the blocks behind the first `length` tokens that the target writes after every prompt."""
    texts: list[Text] = []
    for start in range(0, len(prompts), RECORDED_ROWS):
        load = make_load(
            prompts[start : start + RECORDED_ROWS], 0, target.device, {"do_sample": False, "eos_token_id": None}
        )
        recorder = _Recorder()
        output = target.generate(
            load.token_ids,
            attention_mask=load.attention_mask,
            # a block may be continued by what is looked up
            max_new_tokens=length + drafter.block_size + drafter.longest_lookup + 1,
            assistant_model=drafter,
            scheduler=recorder,
            drafts="model",
            **load.options,
        )
        written = output[:, load.token_ids.shape[1] :].tolist()
        texts += [
            Text(_blocks(recorder, row, text, length), tuple(prompts[start + row].tolist()), tuple(text))
            for row, text in enumerate(written)
        ]
    return texts


def _blocks(recorder: _Recorder, row: int, text: Sequence[int], length: int) -> tuple[Draft, ...]:
    return tuple(
        Draft(
            _num_right(recorder.token_ids[place][row], text[place + 1 :]),
            tuple(recorder.margins[place][row]),
            tuple(recorder.token_ids[place][row]),
        )
        for place in range(length)
    )


def save_texts(texts: Sequence[Text], path: Path) -> None:
    """Write recordings to a file, to replay them again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(text) for text in texts]), encoding="utf-8")


def load_texts(path: Path) -> list[Text]:
    """Return the recordings of a file."""
    return [
        Text(
            tuple(
                Draft(block["num_right"], tuple(block["margins"]), tuple(block["token_ids"]))
                for block in text["blocks"]
            ),
            tuple(text["prompt"]),
            tuple(text["token_ids"]),
        )
        for text in json.loads(path.read_text(encoding="utf-8"))
    ]


def _num_right(drafts: Sequence[int], text: Sequence[int]) -> int:
    pairs = enumerate(zip(drafts, text, strict=False))
    return next((index for index, (draft, token) in pairs if draft != token), len(drafts))


def fewer_right(texts: Sequence[Text], share: float, seed: int = 0) -> list[Text]:
    """Return the texts with so many of the blocks right as they were, and none of the drafts of the others."""
    draw = random.Random(seed)
    return [
        replace(
            text,
            blocks=tuple(
                one if draw.random() < share else Draft(0, one.margins, (-1,) * len(one.token_ids))
                for one in text.blocks
            ),
        )
        for text in texts
    ]


@dataclass
class Clock:
    """What steps take: their measured costs, with noise, and now and then a disturbance."""

    costs: CostTable
    noise: float
    draw: random.Random

    def verify_seconds(self, num_rows: int, width: int) -> float:
        """Return the seconds of a pass."""
        return self.costs.verify_seconds(num_rows, width, CONTEXT) * self._factor()

    def draft_seconds(self, num_rows: int, num_drafts: int) -> float:
        """Return the seconds of drafting."""
        return self.costs.draft_seconds(num_rows, num_drafts, CONTEXT) * self._factor() if num_drafts else 0.0

    def _factor(self) -> float:
        factor = exp(self.noise * self.draw.gauss(0, 1))
        return factor * DISTURBANCE if self.noise and self.draw.random() < DISTURBED else factor


@dataclass
class Written:
    """Tokens and seconds of a batch, and its rounds: drafts made, and drafts verified."""

    num_tokens: int = 0
    seconds: float = 0.0
    rounds: list[tuple[int, int]] = field(default_factory=list)


def _recorded_block(places: Sequence[tuple[Text, int]], num_drafts: int) -> DraftedBlock | None:
    if not num_drafts:
        return None
    blocks = [text.blocks[place] for text, place in places]
    margins = torch.tensor([block.margins[:num_drafts] for block in blocks])
    # a text without tokens has drafts without tokens
    token_ids = [(block.token_ids or (-1,) * num_drafts)[:num_drafts] for block in blocks]
    return DraftedBlock(torch.tensor(token_ids), None, None, margins)


def _num_accepted(text: Text, place: int, drafts: Sequence[int], num_modelled: int, num_verified: int) -> int:
    """Return how many drafts are accepted, the first `num_modelled` of which are the drafter's."""
    right = min(text.blocks[place].num_right, num_modelled)
    if right == num_modelled:
        right += _num_right(drafts[num_modelled:], text.token_ids[place + 1 + num_modelled :])
    return min(right, num_verified)


def replay(
    schedule: Schedule,
    texts: Sequence[Text],
    length: int,
    clock: Clock,
    max_drafts: int,
    *,
    longest_lookup: int = 0,
) -> Written:
    """Return what a batch of `length` tokens a row takes, where up to `longest_lookup` drafts may be looked up."""
    written = Written(len(texts))
    places = [(text, 0) for text in texts]
    lookups = None
    if longest_lookup:
        lookups = Lookups([text.prompt for text in texts], schedule.match_chances)
        lookups.read([text.token_ids[:1] for text in texts])
    is_behind = True
    while places:
        room = [max(length - place - 2, 0) for _, place in places]
        rooms = tuple(min(longest_lookup, one) for one in room) if longest_lookup else ()
        batch = Batch(tuple(min(max_drafts, one) for one in room), len(places), CONTEXT, rooms)
        record = RoundInProgress(num_verified=[0] * len(places))
        drafted = propose(schedule, lookups, batch, partial(_recorded_block, places), record, torch.device("cpu"))
        accepted = [0] * len(places)
        if drafted is not None:
            for row, (text, place) in enumerate(places):
                num_modelled = 0 if any(record.num_looked_up[row : row + 1]) else record.num_drafted
                drafts = drafted.token_ids[row].tolist()
                accepted[row] = _num_accepted(text, place, drafts, num_modelled, record.num_verified[row])
        drafting = clock.draft_seconds(len(places), record.num_drafted)
        verifying = clock.verify_seconds(len(places), 1 + max(record.num_verified))
        is_typical = not (record.num_drafted and is_behind)
        record.num_accepted = accepted
        outcome = outcome_of(batch, record, drafting, verifying, is_typical=is_typical)
        schedule.observe(outcome)
        if lookups is not None:
            schedule.compare(outcome)
        is_behind = not record.num_drafted
        written.num_tokens += len(places) + sum(accepted)
        written.seconds += drafting + verifying
        written.rounds.append((record.num_drafted, max(record.num_verified)))
        moved = [(text, place, place + 1 + count) for (text, place), count in zip(places, accepted, strict=True)]
        if lookups is not None:
            lookups.read([text.token_ids[place + 1 : now + 1] for text, place, now in moved])
        staying = [row for row, (_, _, now) in enumerate(moved) if now < length - 1]
        if lookups is not None and len(staying) < len(moved):
            lookups.select_rows(staying)
        places = [(moved[row][0], moved[row][2]) for row in staying]
    return written
