"""Collect conversations: prompts from a source, answers from a writer, lines in a file that can be continued."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from dspark_hf.console import Steps
from dspark_hf.data.sources import PromptSource
from dspark_hf.data.writers import DEFAULT_SAMPLINGS, Answer, Sampling, Writer
from dspark_hf.journal import Journal
from dspark_hf.prompts import Prompt, plain_text

# batches that are planned at once, so that alike lengths share one
_BATCHES_AHEAD = 4


@dataclass(frozen=True)
class CollectionPlan:
    """What to collect.

    Args:
        num_conversations: stop when the file holds so many; None goes on until there are no more prompts.
        samplings: sampling settings, in turns over the prompts' answers.
        samples_per_prompt: answers to each prompt; at most one of them is greedy.
        max_new_tokens: longest answer.
        seed: seed of everything that is sampled.
    """

    num_conversations: int | None = None
    samplings: Sequence[Sampling] = DEFAULT_SAMPLINGS
    samples_per_prompt: int = 1
    max_new_tokens: int = 512
    seed: int = 0


@dataclass(frozen=True)
class _Task:
    prompt: Prompt
    key: str
    sampling: Sampling
    number: int


class Collection:
    """A file of conversations in TRL's layout of prompt and completion, open for writing.

    Each line holds `prompt` and `completion`, as messages or as texts, and what training and provenance need:
    `completion_ids` (the target's very tokens, where they are known), `finished`, `sampling`, `source`, `target`. No
    two lines have the same prompt and the same answer.

    Args:
        path: the file; what is there is kept.
        target: the target's name.

    Raises:
        InUseError: if another run has the file open.
        ValueError: if it holds something else, or another target's words.

    Example:

        >>> with Collection("chats.jsonl", "Qwen/Qwen3-8B") as collection:  # doctest: +SKIP
        ...     num_conversations = len(collection)
    """

    def __init__(self, path: str | Path, target: str):
        self._target = target
        self._path = Path(path)
        self._answers: set[str] = set()
        self._samplings: dict[str, Counter[str]] = {}
        self._journal = Journal(path, self._check)
        for record in self._journal.records:
            self._count(record)
        self._size = len(self._journal.records)
        # known by their keys from here on
        self._journal.records.clear()

    def __len__(self) -> int:
        return self._size

    def samplings_of(self, key: str) -> Counter[str]:
        """Return how often the prompt of `key` is answered with each sampling setting."""
        return self._samplings.get(key, Counter())

    def add(self, prompt: Prompt, answer: Answer, sampling: Sampling, source: str) -> bool:
        """Append a conversation; return False if the same is there already."""
        record: dict[str, Any] = {**_prompt_and_completion(prompt, answer.text)}
        if answer.token_ids is not None:
            record["completion_ids"] = list(answer.token_ids)
        record.update(finished=answer.is_finished, sampling=str(sampling), source=source, target=self._target)
        if not self._count(record):
            return False
        self._journal.append(record)
        self._size += 1
        return True

    def commit(self) -> None:
        """Wait until everything is on the disk."""
        self._journal.commit()

    def close(self) -> None:
        """Commit, and let other runs have the file."""
        self._journal.close()

    def __enter__(self) -> Collection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(self, record: dict[str, Any]) -> bool:
        key = content_key(record["prompt"])
        self._samplings.setdefault(key, Counter())[record.get("sampling", "")] += 1
        answer = content_key([key, record["completion"], record.get("finished")])
        is_new = answer not in self._answers
        self._answers.add(answer)
        return is_new

    def _check(self, record: dict[str, Any], number: int) -> None:
        path = self._path
        if not {"prompt", "completion"} <= record.keys():
            raise ValueError(
                f"`{path}` must hold `prompt` and `completion` on every line, got {sorted(record)} on line {number}. "
                "Name another file."
            )
        if not isinstance(record.get("sampling", ""), str):
            raise ValueError(
                f"`{path}` must hold a text as `sampling` on every line, got {record['sampling']!r:.60} on line "
                f"{number}. Correct the line, or name another file."
            )
        if record.get("target", self._target) != self._target:
            raise ValueError(
                f"`{path}` must hold the words of one target, got {record['target']!r} on line {number} and "
                f"{self._target!r} now. Name another file, or the same target."
            )


def content_key(content: Any) -> str:
    """Return a short key of what JSON can hold, the same in every run."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _prompt_and_completion(prompt: Prompt, text: str) -> dict[str, Any]:
    if prompt.messages is None:
        return {"prompt": prompt.text, "completion": text}
    return {"prompt": list(prompt.messages), "completion": [{"role": "assistant", "content": text}]}


def _prompt_key(prompt: Prompt) -> str:
    return content_key(_prompt_and_completion(prompt, "")["prompt"])


class Collector:
    """Fill a collection until the plan is met or there are no more prompts.

    Args:
        collection: the file.
        source: where prompts come from.
        writer: who answers.
        plan: what to collect.
        shows_progress: whether to show a bar with conversations, tokens per second and the time left.
        num_expected: conversations the source can give, for the bar, where that is known.
    """

    def __init__(
        self,
        collection: Collection,
        source: PromptSource,
        writer: Writer,
        plan: CollectionPlan,
        *,
        shows_progress: bool = True,
        num_expected: int | None = None,
    ):
        self._collection = collection
        self._source = source
        self._writer = writer
        self._plan = plan
        self._num_prompts = 0
        self._tasks: list[_Task] = []
        total = num_expected if plan.num_conversations is None else plan.num_conversations
        self._progress = _Progress(total, len(collection), is_shown=shows_progress)

    def run(self) -> bool:
        """Collect; return whether the plan is met, rather than out of prompts."""
        with self._progress:
            while not self._is_met():
                tasks = self._plan_tasks()
                if tasks is None:
                    return self._plan.num_conversations is None
                for batch in self._batches(tasks):
                    self._write(batch)
        return True

    def _is_met(self) -> bool:
        return self._num_missing() == 0

    def _num_missing(self) -> int:
        most = _BATCHES_AHEAD * self._writer.batch_size * len(self._plan.samplings)
        if self._plan.num_conversations is None:
            return most
        return min(max(self._plan.num_conversations - len(self._collection), 0), most)

    def _plan_tasks(self) -> list[_Task] | None:
        """Return the next answers to be written, at least one, or None if there are no more prompts."""
        num_missing = self._num_missing()
        while len(self._tasks) < num_missing:
            self._progress.describe(f"prompts, {len(self._tasks)} waiting")
            prompts = self._source.take(-(-(num_missing - len(self._tasks)) // self._plan.samples_per_prompt))
            if not prompts:
                break
            self._tasks += [task for prompt in prompts for task in self._tasks_of(prompt)]
        chosen, self._tasks = self._tasks[:num_missing], self._tasks[num_missing:]
        return chosen or None

    def _tasks_of(self, prompt: Prompt) -> list[_Task]:
        plan, key = self._plan, _prompt_key(prompt)
        first = self._num_prompts * plan.samples_per_prompt
        self._num_prompts += 1
        wanted = [
            plan.samplings[number % len(plan.samplings)] for number in range(first, first + plan.samples_per_prompt)
        ]
        # the second greedy answer would be the first one again
        wanted = [one for index, one in enumerate(wanted) if not (one.is_greedy and one in wanted[:index])]
        done = Counter(self._collection.samplings_of(key))
        num_left = max(len(wanted) - done.total(), 0)
        tasks = []
        for number, sampling in enumerate(wanted):
            if done[str(sampling)]:
                done[str(sampling)] -= 1
            else:
                tasks.append(_Task(prompt, key, sampling, number))
        return tasks[:num_left]

    def _batches(self, tasks: Sequence[_Task]) -> Iterator[list[_Task]]:
        size = self._writer.batch_size
        for sampling in dict.fromkeys(task.sampling for task in tasks):
            alike = [task for task in tasks if task.sampling == sampling]
            alike.sort(key=lambda task: len(plain_text(task.prompt)))
            yield from (alike[start : start + size] for start in range(0, len(alike), size))

    def _write(self, batch: Sequence[_Task]) -> None:
        self._progress.describe(f"answers, {batch[0].sampling}")
        answers = self._writer.write(
            [task.prompt for task in batch],
            batch[0].sampling,
            max_new_tokens=self._plan.max_new_tokens,
            seed=self._seed(batch[0]),
        )
        try:
            for index, answer in answers:
                task = batch[index]
                is_new = self._collection.add(task.prompt, answer, task.sampling, self._source.name)
                self._progress.add(answer.num_tokens, is_new=is_new)
        finally:
            self._collection.commit()

    def _seed(self, task: _Task) -> int:
        # follows from the content: a continued run samples other batches with other seeds
        key = content_key([self._plan.seed, task.key, task.number])
        return int(key[:8], 16) >> 1


class _Progress:
    def __init__(self, total: int | None, initial: int, *, is_shown: bool):
        self._bar = Steps("conversations", total, completed=initial, is_shown=is_shown)
        self._text = "conversations"
        self._num_tokens = 0
        self._start = perf_counter()

    def __enter__(self) -> _Progress:
        self._start = perf_counter()
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def describe(self, text: str) -> None:
        self._text = text
        self._bar.describe(text)

    def add(self, num_tokens: int, *, is_new: bool) -> None:
        self._num_tokens += num_tokens
        self._bar.describe(self._text, f"{self._num_tokens / (perf_counter() - self._start):.0f} tokens/s")
        self._bar.advance(int(is_new))
