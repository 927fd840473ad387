"""A collection grows to what was asked, without repeats, and goes on where a run stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dspark_hf.data.collection import Collection, CollectionPlan, Collector
from dspark_hf.data.sources import ListedPrompts
from dspark_hf.data.writers import Answer, Sampling
from dspark_hf.journal import InUseError
from dspark_hf.prompts import Prompt, plain_text, user_turn

SAMPLINGS = (Sampling(), Sampling(0.7, 0.95), Sampling(1.0))


class _Parrot:
    """A writer whose answer says what it was asked, and that stops like Ctrl-C after some answers."""

    batch_size = 3

    def __init__(self, num_answers: int = 1000, *, is_original: bool = True):
        self.num_left = num_answers
        self.is_original = is_original
        self.calls: list[tuple[list[str], Sampling, int]] = []

    def write(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, max_new_tokens: int, seed: int, stop: str = ""
    ) -> Iterator[tuple[int, Answer]]:
        self.calls.append(([plain_text(prompt) for prompt in prompts], sampling, seed))
        # not in order, as a batch does not end in order
        for index in reversed(range(len(prompts))):
            if self.num_left == 0:
                raise KeyboardInterrupt
            self.num_left -= 1
            mark = f"{seed} {index}" if self.is_original and not sampling.is_greedy else ""
            yield index, Answer(f"{plain_text(prompts[index])} {mark}", True, 2, (7, 8))


def _prompts(count: int = 10) -> ListedPrompts:
    return ListedPrompts([user_turn("q" * (1 + (3 * index) % 10) + f" {index}") for index in range(count)], "file")


def _collect(path: Path, writer: _Parrot, source: ListedPrompts | None = None, **plan: Any) -> bool:
    plan = {"samplings": SAMPLINGS, **plan}
    with Collection(path, "target") as collection:
        return Collector(collection, source or _prompts(), writer, CollectionPlan(**plan), shows_progress=False).run()


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _asked(path: Path) -> list[tuple[str, str]]:
    return sorted((record["prompt"][0]["content"], record["sampling"]) for record in _records(path))


def test_a_line_holds_what_training_needs(tmp_path: Path) -> None:
    """The trainer could not read the file, or nobody would know where its lines are from."""
    path = tmp_path / "chats.jsonl"
    assert _collect(path, _Parrot(), ListedPrompts([user_turn("q")], "file"))
    assert _collect(path, _Parrot(), ListedPrompts([Prompt(text="t")], "texts"))
    notes = {"completion_ids": [7, 8], "finished": True, "sampling": "greedy", "target": "target"}
    assert _records(path) == [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "q "}],
            "source": "file",
            **notes,
        },
        {"prompt": "t", "completion": "t ", "source": "texts", **notes},
    ]


def test_samplings_take_turns(tmp_path: Path) -> None:
    """The drafter would see one temperature only."""
    path = tmp_path / "chats.jsonl"
    assert _collect(path, _Parrot())
    assert Counter(sampling for _, sampling in _asked(path)) == {"greedy": 4, "0.7,0.95": 3, "1.0": 3}


def test_batches_are_of_one_sampling_and_alike_lengths(tmp_path: Path) -> None:
    """A batch would sample some rows otherwise than noted, or be mostly padding."""
    writer = _Parrot()
    _collect(tmp_path / "chats.jsonl", writer, samplings=SAMPLINGS[:1])
    lengths = [[len(text) for text in texts] for texts, _, _ in writer.calls]
    assert lengths == [sorted(batch) for batch in lengths]
    assert [len(batch) for batch in lengths] == [3, 3, 3, 1]
    assert sorted(sum(lengths, [])) == sum(lengths, [])


@pytest.mark.parametrize("num_answers", [0, 1, 4, 9])
@pytest.mark.parametrize("samples_per_prompt", [1, 2, 5])
def test_an_interrupted_run_goes_on(num_answers: int, samples_per_prompt: int, tmp_path: Path) -> None:
    """Ctrl-C would lose answers, or the next run would write them again."""
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    _collect(whole, _Parrot(), samples_per_prompt=samples_per_prompt)
    with pytest.raises(KeyboardInterrupt):
        _collect(parts, _Parrot(num_answers), samples_per_prompt=samples_per_prompt)
    assert len(_records(parts)) == num_answers
    rest = _Parrot()
    assert _collect(parts, rest, samples_per_prompt=samples_per_prompt)
    assert _asked(parts) == _asked(whole)
    assert sum(len(texts) for texts, _, _ in rest.calls) == len(_asked(whole)) - num_answers
    done = _Parrot(0)
    assert _collect(parts, done, samples_per_prompt=samples_per_prompt)
    assert not done.calls


def test_one_greedy_answer_is_enough(tmp_path: Path) -> None:
    """The same answer would be written again and again."""
    path = tmp_path / "chats.jsonl"
    _collect(path, _Parrot(), _prompts(1), samplings=(Sampling(), Sampling(1.0)), samples_per_prompt=4)
    assert [sampling for _, sampling in _asked(path)] == ["1.0", "1.0", "greedy"]


def test_the_same_conversation_is_kept_once(tmp_path: Path) -> None:
    """Training would weigh a conversation by how often it was found."""
    path = tmp_path / "chats.jsonl"
    _collect(path, _Parrot(is_original=False), _prompts(2), samples_per_prompt=3)
    assert len(_records(path)) == 2


@pytest.mark.parametrize(("count", "is_complete"), [(4, True), (10, True), (11, False)])
def test_the_plan_is_met_exactly(count: int, is_complete: bool, tmp_path: Path) -> None:
    """A run would write too much, or promise more than there is."""
    path = tmp_path / "chats.jsonl"
    assert _collect(path, _Parrot(), num_conversations=count) is is_complete
    assert len(_records(path)) == min(count, 10)


def test_a_larger_plan_goes_on(tmp_path: Path) -> None:
    """More conversations would mean to start anew, or cost some that were planned before."""
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    _collect(whole, _Parrot(), samples_per_prompt=2)
    for count in (3, 8, 13):
        _collect(parts, _Parrot(), samples_per_prompt=2, num_conversations=count)
        assert len(_records(parts)) == count
    _collect(parts, _Parrot(), samples_per_prompt=2)
    assert _asked(parts) == _asked(whole)


def test_seeds_differ(tmp_path: Path) -> None:
    """Two batches, or two runs with other seeds, would sample the same."""
    writer, other = _Parrot(), _Parrot()
    _collect(tmp_path / "chats.jsonl", writer, samples_per_prompt=3)
    _collect(tmp_path / "others.jsonl", other, samples_per_prompt=3, seed=1)
    seeds = [seed for _, _, seed in writer.calls + other.calls]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 31 for seed in seeds)


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    """A crash in the middle of a line would stop every run after it."""
    path = tmp_path / "chats.jsonl"
    _collect(path, _Parrot(), num_conversations=4)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    _collect(path, _Parrot(), num_conversations=4)
    assert path.read_bytes().startswith(content.rpartition(b'{"prompt"')[0])
    assert len(_records(path)) == 4


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"must hold `prompt` and `completion` on every line, got \['text'\] on line 1"),
        ({"prompt": "a", "completion": "b", "target": "x"}, "must hold the words of one target, got 'x' on line 1"),
    ],
)
def test_another_file_is_not_continued(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Two targets' words would be mixed, or a file of another kind spoiled."""
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            Collection(path, "target")


def test_two_runs_on_one_file_are_refused(tmp_path: Path) -> None:
    """Two runs would write every conversation twice."""
    with Collection(tmp_path / "chats.jsonl", "target"), pytest.raises(InUseError):
        Collection(tmp_path / "chats.jsonl", "target")
