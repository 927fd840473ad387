"""Where prompts come from: a file, a dataset, or the target itself."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from dspark_hf.data.writers import Answer, Sampling, Writer
from dspark_hf.journal import Journal
from dspark_hf.prompts import (
    Prompt,
    has_chat_template,
    parse_prompt,
    plain_text,
    read_prompts,
    special_token_ids,
    turn_end,
    user_opening,
    user_turn,
)

# rounds without a new prompt after which the target is taken to have no more
_MAX_BARREN_ROUNDS = 10
_SHINGLE = 8


class NoNewPromptsError(RuntimeError):
    """The target keeps writing what it wrote before; the message says what to do."""


class PromptSource(Protocol):
    """An endless or finite row of prompts; it is the same row when a run is continued."""

    name: str
    """What a conversation notes as its prompt's origin."""

    def take(self, count: int) -> list[Prompt]:
        """Return the next prompts, at most `count`; none means that there are no more."""
        ...


class ListedPrompts:
    """Prompts that are there already; those that occur twice count once.

    Args:
        prompts: the prompts.
        name: their origin.
        is_wanted: whether to use a prompt; asked when its turn comes.
    """

    def __init__(self, prompts: Iterable[Prompt], name: str, is_wanted: Callable[[Prompt], bool] = lambda _: True):
        self.name = name
        self.num_dropped = 0
        self._prompts = list({str(prompt): prompt for prompt in prompts}.values())
        self._is_wanted = is_wanted
        self._position = 0

    def __len__(self) -> int:
        return len(self._prompts)

    def take(self, count: int) -> list[Prompt]:
        """Return the next prompts."""
        taken: list[Prompt] = []
        while len(taken) < count and self._position < len(self._prompts):
            prompt = self._prompts[self._position]
            self._position += 1
            if self._is_wanted(prompt):
                taken.append(prompt)
            else:
                self.num_dropped += 1
        return taken


class SelfWrittenPrompts:
    """Prompts in the target's own words.

    A chat model writes user turns: its template's opening of a user turn is all it is given, and it stops where a turn
    stops. A base model writes the beginning of a text. Prompts are sampled at temperature 1 and kept in a file, so
    that none is lost; a run that is continued takes them from there first, then goes on with new seeds.

    Args:
        writer: the target.
        tokenizer: its tokenizer.
        journal: the file of the prompts, as `open_prompts` gives it.
        openings: texts a prompt starts with, in turns; without any it starts anywhere.
        max_tokens: a user turn must end within so many tokens; the beginning of a text is cut there.
        seed: seed of the first round.
        is_wanted: whether to keep a prompt.

    Raises:
        ValueError: if the chat template does not show how a user turn starts.
    """

    name = "self"

    def __init__(
        self,
        writer: Writer,
        tokenizer: Any,
        journal: Journal,
        *,
        openings: Sequence[str] = (),
        max_tokens: int = 256,
        seed: int = 0,
        is_wanted: Callable[[Prompt], bool] = lambda _: True,
    ):
        self._writer = writer
        self._journal = journal
        self._max_tokens = max_tokens
        self._seed = seed
        self._is_wanted = is_wanted
        self._is_chat = has_chat_template(tokenizer)
        self._special_ids = special_token_ids(tokenizer)
        self._start = user_opening(tokenizer) if self._is_chat else ""
        self._stop = turn_end(tokenizer, "user") if self._is_chat else ""
        self._openings = [opening.strip() for opening in openings] or [""]
        self._texts = [plain_text(parse_prompt(record)) for record in journal.records]
        self._known = {normalize(text) for text in self._texts}
        self._round = 1 + max((record.get("round", 0) for record in journal.records), default=-1)
        self._position = 0

    def take(self, count: int) -> list[Prompt]:
        """Return the next prompts: the ones in the file, then new ones.

        Raises:
            NoNewPromptsError: if the target keeps writing what it wrote before.
        """
        num_barren = 0
        while len(self._texts) == self._position:
            num_barren = 0 if self._write_round(count) else num_barren + 1
            if num_barren == _MAX_BARREN_ROUNDS:
                raise NoNewPromptsError(
                    f"`--target` must write new prompts, got none in {num_barren} rounds beyond the "
                    f"{len(self._texts)} in `{self._journal.path}`. Give other openings, or prompts."
                )
        texts = self._texts[self._position : self._position + count]
        self._position += len(texts)
        return [user_turn(text) if self._is_chat else Prompt(text=text) for text in texts]

    def _write_round(self, count: int) -> bool:
        """Write one batch of prompts; return whether any of them is new."""
        # some will be dropped
        num_prompts = min(self._writer.batch_size, count + count // 2 + 4)
        shift = self._round * num_prompts
        openings = [self._openings[(shift + index) % len(self._openings)] for index in range(num_prompts)]
        prompts = [Prompt(text=self._start + opening) for opening in openings]
        answers = self._writer.write(
            prompts,
            Sampling(1.0),
            max_new_tokens=self._max_tokens,
            seed=self._seed + 1_000_003 * self._round,
            stop=self._stop,
        )
        num_before = len(self._texts)
        for index, answer in answers:
            self._keep(openings[index], answer)
        self._journal.commit()
        self._round += 1
        return len(self._texts) > num_before

    def _keep(self, opening: str, answer: Answer) -> None:
        text = (opening + answer.text).strip()
        key = normalize(text)
        if not self._is_usable(answer) or not key or key in self._known:
            return
        if not self._is_wanted(user_turn(text)):
            return
        self._known.add(key)
        self._texts.append(text)
        self._journal.append({**self._layout(text), "round": self._round})

    def _layout(self, text: str) -> dict[str, Any]:
        return {"turns": [text]} if self._is_chat else {"prompt": text}

    def _is_usable(self, answer: Answer) -> bool:
        if not answer.text.strip():
            return False
        # a turn that was cut is no question; a text that ended has nothing to continue
        if answer.is_finished != self._is_chat:
            return False
        # a special token inside: a turn of another role, which only looks like text
        return not self._special_ids & set((answer.token_ids or ())[:-1])


def open_prompts(path: str | Path) -> Journal:
    """Return the file of self-written prompts, open for writing.

    Raises:
        InUseError: if another run has it open.
        ValueError: if it holds something else.
    """

    def check(record: dict[str, Any], number: int) -> None:
        try:
            parse_prompt(record)
        except ValueError as error:
            raise ValueError(f"`{path}`, line {number}: {error}") from error
        found = record.get("round", 0)
        if type(found) is not int or found < 0:
            raise ValueError(
                f"`{path}` must hold a whole number as `round` on every line, got {found!r:.60} on line {number}. "
                "Correct the line, or name another output."
            )

    return Journal(path, check)


def read_dataset(
    name: str, *, column: str = "prompt", split: str = "train", subset: str | None = None, is_chat: bool = True
) -> list[Prompt]:
    """Return the prompts in a column of a dataset of the hub, or of a folder.

    A column of texts holds user turns, or beginnings of texts for a base model; a column of lists holds conversations.

    Args:
        name: what `datasets.load_dataset` takes.
        column: the column.
        split: the split.
        subset: the dataset's configuration.
        is_chat: whether the target is a chat model.

    Raises:
        ImportError: if `datasets` is not installed.
        ValueError: if there is no such column, or it holds something else.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "`datasets` must be installed to read a dataset, got no such package. "
            'Run `pip install "dspark-hf[train]"`.'
        ) from error
    dataset = load_dataset(name, subset, split=split)
    if column not in dataset.column_names:
        raise ValueError(
            f"`column` must be one of {dataset.column_names}, got {column!r}. Name the one that holds the prompts."
        )
    return [
        _column_prompt(value, f"row {row} of `{column}`", is_chat=is_chat) for row, value in enumerate(dataset[column])
    ]


def _column_prompt(value: Any, place: str, *, is_chat: bool) -> Prompt:
    if isinstance(value, str) and value.strip():
        return user_turn(value) if is_chat else Prompt(text=value)
    try:
        return parse_prompt({"prompt": value})
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def for_base_model(prompt: Prompt, tokenizer: Any, max_tokens: int) -> Prompt:
    """Return a prompt as text, for a target without a chat template; raw text is cut to `max_tokens` tokens."""
    text = plain_text(prompt)
    if prompt.messages is not None:
        return Prompt(text=text)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(token_ids) <= max_tokens:
        return prompt
    # half a character at the cut is no text
    return Prompt(text=tokenizer.decode(token_ids[:max_tokens]).rstrip("\ufffd"))


class HeldOut:
    """Prompts that must not be trained on.

    A prompt is held out if one of its user turns has the words of one of theirs, whatever the case, the punctuation
    and the spaces; or if one of the two contains the other and that is at least eight words long, so that a question
    is known with and without an instruction around it.

    Args:
        paths: files of prompts, read by `read_prompts`.

    Example:

        >>> held_out = HeldOut.from_prompts([user_turn("Name one planet.")])
        >>> user_turn("name one  PLANET") in held_out
        True
    """

    def __init__(self, paths: Iterable[str | Path] = ()):
        self._texts: set[str] = set()
        self._all = ""
        self._by_start: dict[str, list[str]] = {}
        self._add(prompt for path in paths for prompt in read_prompts(path))

    @classmethod
    def from_prompts(cls, prompts: Iterable[Prompt]) -> HeldOut:
        """Return what holds out these prompts."""
        held_out = cls()
        held_out._add(prompts)
        return held_out

    def _add(self, prompts: Iterable[Prompt]) -> None:
        self._texts |= {normalize(text) for prompt in prompts for text in _user_texts(prompt)} - {""}
        # spaces around, so that whole words are compared
        self._all = "\n".join(f" {text} " for text in sorted(self._texts))
        for text in self._texts:
            words = text.split()
            if len(words) >= _SHINGLE:
                self._by_start.setdefault(" ".join(words[:_SHINGLE]), []).append(text)

    def __contains__(self, prompt: Prompt) -> bool:
        return any(self._holds(normalize(text)) for text in _user_texts(prompt))

    def _holds(self, text: str) -> bool:
        words = text.split()
        if text in self._texts:
            return True
        if len(words) < _SHINGLE:
            return False
        if f" {text} " in self._all:
            return True
        starts = {" ".join(words[index : index + _SHINGLE]) for index in range(len(words) - _SHINGLE + 1)}
        return any(
            f" {held} " in f" {text} " for start in starts & self._by_start.keys() for held in self._by_start[start]
        )


def normalize(text: str) -> str:
    """Return the words of a text: no case, no punctuation, single spaces.

    Example:

        >>> normalize("What  is 3.5 + 1?")
        'what is 3 5 1'
    """
    words = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    # a text of signs alone has no words, yet is a text
    return words or " ".join(text.split())


def _user_texts(prompt: Prompt) -> list[str]:
    if prompt.messages is None:
        return [prompt.text or ""]
    return [message["content"] for message in prompt.messages if message["role"] == "user"]
