"""Processors that remember their calls are called as without a drafter: for committed text, once a token, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from dspark_hf import Request, generate_stream
from tests.generation.drafters import ScriptedDrafter
from tests.generation.frequencies import PROMPT, small_target, smallest_p_value, untrained_drafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.reference.sampling import SMALLEST_P_VALUE, text_probabilities
from tests.thinning import mostly_slow, slow
from tests.tiny import tiny_target

NEW_TOKENS = 24
END = 9


class Budget(LogitsProcessor):
    """Force an end at the call after the first `size`: what a thinking budget does."""

    def __init__(self, size: int):
        self.size, self.calls = size, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return _only(scores, END) if self.calls == self.size + 1 else scores


def _only(scores: Tensor, token_id: int) -> Tensor:
    scores = torch.full_like(scores, -float("inf"))
    scores[:, token_id] = 0
    return scores


class SharedBudget(Budget):
    """A budget in its class."""

    def __init__(self, size: int):
        type(self).size, type(self).calls = size, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        type(self).calls += 1
        return _only(scores, END) if self.calls == self.size + 1 else scores


def closed_over(size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a budget whose memory is in a closure."""
    calls = 0

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return _only(scores, END) if calls == size + 1 else scores

    return process


class Generated(LogitsProcessor):
    """A budget whose memory is in a generator, which nothing can copy."""

    def __init__(self, size: int):
        self.steps = self._steps(size)

    @staticmethod
    def _steps(size: int) -> Iterator[bool]:
        yield from [False] * size
        yield True
        while True:
            yield False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _only(scores, END) if next(self.steps) else scores


class Grammar(LogitsProcessor):
    """Allow each row what its own automaton allows next; fail on a token that it did not allow."""

    def __init__(self, size: int):
        self.states: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.states:
            self.states = list(range(len(input_ids)))
        else:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                if token not in self._allowed(row):
                    raise KeyError(f"no next state of row {row} for token {token}")
                self.states[row] = (3 * self.states[row] + token) % 101
        masked = torch.full_like(scores, -float("inf"))
        for row in range(len(scores)):
            masked[row, self._allowed(row)] = scores[row, self._allowed(row)]
        return masked

    def _allowed(self, row: int) -> list[int]:
        return [token for token in range(2, 64) if (token + self.states[row]) % 3]


class Halves(Budget):
    """Answer in half precision, of which several tokens have the best score."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids, scores).round().half()


class Whole(Budget):
    """Answer in integers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids, scores.round()).clamp(-1000, 1000).long()


MEMORIES: dict[str, Callable[[int], Any]] = {
    "attribute": Budget,
    "class": SharedBudget,
    "closure": closed_over,
    "generator": Generated,
    "grammar": Grammar,
    "halves": Halves,
    "integers": Whole,
}


class Diary(LogitsProcessor):
    """Note every text that is shown."""

    def __init__(self) -> None:
        self.pages: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.pages.append(input_ids.tolist())
        return scores


class StopsAt(StoppingCriteria):
    """Stop row r once it has `lengths[r]` tokens."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.lengths


def _compare(make: Callable[[], dict[str, Any]], num_rows: int, accuracy: float = 0.8) -> Any:
    """Check that a drafter does not change the greedy text under `make()`, which makes options for one call each."""
    target, inputs = tiny_target(), ragged_prompts(num_rows)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    plain = target.generate(**inputs, **{**options, **make()})
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), accuracy)
    assisted = target.generate(**inputs, **{**options, **make()}, assistant_model=drafter)
    assert torch.equal(assisted, plain)
    # else nothing was accepted in a block, or nothing rejected
    statistics = drafter.last_statistics
    assert num_rows > 3 or 0 < statistics.num_accepted < statistics.num_verified or not statistics.num_verified
    return plain


@pytest.mark.parametrize(
    ("memory", "num_rows"),
    [
        (pytest.param if (num_rows == 3) == (name in ("attribute", "grammar", "integers")) else slow)(name, num_rows)
        for name in MEMORIES
        for num_rows in (1, 3)
    ],
)
def test_greedy_text(memory, num_rows):
    """A processor that counts drafts which are then rejected gives another text, or ends in an error of its own."""
    plain = _compare(lambda: {"logits_processor": LogitsProcessorList([MEMORIES[memory](12)])}, num_rows)
    if memory != "grammar":
        assert (plain[:, 12 - NEW_TOKENS] == END).all()


def test_constraint_with_a_memory():
    """A `prefix_allowed_tokens_fn` that follows its row from call to call loses its way on drafts."""

    def make() -> dict[str, Any]:
        calls = [0, 0, 0]

        def allowed(row: int, ids: Tensor) -> list[int]:
            calls[row] += 1
            return [token for token in range(2, 64) if (token + calls[row]) % 4]

        return {"prefix_allowed_tokens_fn": allowed}

    for num_rows in (1, 3):
        _compare(make, num_rows)


ENDS = {"none": [], "some": list(range(20, 24)), "many": list(range(20, 50))}
# of each number of rows one that only a criterion ends, and some that tokens end with or without it
QUICK_ENDS = [(1, True, "none"), (1, False, "many"), (3, True, "none"), (3, False, "some"), (3, True, "many")]


@pytest.mark.parametrize(
    ("num_rows", "stops_early", "end"),
    [(pytest.param if case in QUICK_ENDS else slow)(*case) for case in product((1, 3), (False, True), ENDS)],
)
@pytest.mark.parametrize("returns_dict", [slow(False), True])
def test_every_call_is_the_one_without_a_drafter(num_rows, stops_early, end, returns_dict):
    """A processor is called in another order, once too often, or with other text than without a drafter."""
    ends, stops = ENDS[end], [30, 24, 27] if stops_early else None
    diaries = []

    def make() -> dict[str, Any]:
        diaries.append(Diary())
        options: dict[str, Any] = {"logits_processor": LogitsProcessorList([diaries[-1]]), "repetition_penalty": 1.2}
        if ends:
            options |= {"eos_token_id": ends, "pad_token_id": 0}
        if stops:
            options["stopping_criteria"] = StoppingCriteriaList([StopsAt(stops[:num_rows])])
        return options

    def make_one() -> dict[str, Any]:
        return {**make(), "return_dict_in_generate": returns_dict, "output_scores": returns_dict}

    target, inputs = tiny_target(), ragged_prompts(num_rows)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    script = target.generate(**inputs, **options, repetition_penalty=1.2)
    drafter = ScriptedDrafter(target, script, num_padded(inputs), 0.9)
    plain = target.generate(**inputs, **options, **make_one())
    assisted = target.generate(**inputs, **options, **make_one(), assistant_model=drafter)
    if returns_dict:
        assert len(assisted.scores) == len(plain.scores)
        for row in range(num_rows):
            torch.testing.assert_close(assisted.scores[0][row], plain.scores[0][row], atol=2e-4, rtol=1e-4)
        plain, assisted = plain.sequences, assisted.sequences
    assert torch.equal(assisted, plain)
    first, second = (diary.pages for diary in diaries)
    # a single text that a criterion ends may have been looked at for the rest of a block
    assert second[: len(first)] == first
    assert len(second) == len(first) or (stops and num_rows == 1)


@pytest.mark.parametrize("memory", ["attribute", "generator", "grammar"])
def test_sampled_text(memory):
    """Sampled text is not the target's under a processor that remembers, or the processor fails."""

    class Biased(LogitsProcessor):
        """Bias by the number of the call, which is the place in the text."""

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            return _biased(self.calls, scores)

    class ByPlace(LogitsProcessor):
        """The same for the enumeration, which calls for each prefix as often as it likes."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return _biased(input_ids.shape[1] - len(PROMPT) + 1, scores)

    target = small_target()
    if memory != "attribute":
        # what is allowed next depends on the whole text: a draft that is not would be an error
        inputs = {"input_ids": PROMPT[None].expand(2, -1)}
        wide = tiny_target()
        drafter = ScriptedDrafter(wide, torch.randint(2, 64, (2, 40)), [0, 0], 0.5)
        for _ in range(2):
            processors = LogitsProcessorList([MEMORIES[memory](12)])
            ids = wide.generate(
                **inputs, max_new_tokens=16, do_sample=True, logits_processor=processors, assistant_model=drafter
            )
            assert ids.shape == (2, len(PROMPT) + 16)
        return
    drafter = untrained_drafter(target)
    samples = torch.cat(
        [
            target.generate(
                PROMPT[None],
                max_new_tokens=5,
                do_sample=True,
                logits_processor=LogitsProcessorList([Biased()]),
                assistant_model=drafter,
            )
            for _ in range(60)
        ]
    )[:, len(PROMPT) :]
    assert drafter.last_statistics.num_verified
    probabilities = text_probabilities(target, PROMPT, 5, processors=LogitsProcessorList([ByPlace()]))
    assert smallest_p_value(samples, probabilities) > SMALLEST_P_VALUE


def _biased(place: int, scores: Tensor) -> Tensor:
    return scores + 2 * torch.sin(3 * place + torch.arange(scores.shape[1]))


# of many rows one rejects at nearly every position; few all accept now and then
@pytest.mark.parametrize(("num_rows", "num_calls"), [(3, 24), (200, 3)])
def test_rows_that_advance_together_keep_the_law(num_rows, num_calls):
    """A row of a batch keeps a draft that it should have rejected, or loses one, where another row rejects."""

    class ByPlace(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return _biased(input_ids.shape[1] - len(PROMPT) + 1, scores)

    target = small_target()
    drafter = untrained_drafter(target)
    processors = LogitsProcessorList([ByPlace()])
    options = {"max_new_tokens": 5, "do_sample": True, "logits_processor": processors, "assistant_model": drafter}
    prompts = PROMPT[None].expand(num_rows, -1)
    samples = torch.cat([target.generate(prompts, **options) for _ in range(num_calls)])[:, len(PROMPT) :]
    probabilities = text_probabilities(target, PROMPT, 5, processors=processors)
    assert smallest_p_value(samples, probabilities) > SMALLEST_P_VALUE


# what lies in a class is shared by all requests, in the order of their calls
@pytest.mark.parametrize(
    "memory", mostly_slow([name for name in MEMORIES if name != "class"], ("generator", "grammar"))
)
def test_stream(memory):
    """A request with a processor that remembers ends otherwise in a stream than alone, or spoils the others."""
    target = tiny_target()
    prompts = [ragged_prompts(1, lengths=(length,))["input_ids"][0] for length in (5, 9, 4, 7)]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}

    def own(index: int) -> dict[str, Any]:
        return {"logits_processor": LogitsProcessorList([MEMORIES[memory](12)])} if index % 2 else {}

    texts = [target.generate(prompt[None], **options, **own(i))[0] for i, prompt in enumerate(prompts)]
    drafter = untrained_drafter(target)
    requests = [Request(prompt, {**options, **own(i)}, i) for i, prompt in enumerate(prompts)]
    for finished in generate_stream(target, requests, drafter=drafter, max_rows=3):
        assert finished.error is None
        assert torch.equal(finished.token_ids, texts[finished.request.key])


def test_grammar_of_another_library():
    """A grammar of xgrammar, valid without a drafter, ends in an error with one, or lets another text through."""
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.contrib.hf import LogitsProcessor as GrammarProcessor

    # a byte for each token from 2 on, one of which ends the text
    tokens = [b"", b"", *(bytes([code]) for code in range(64, 126))]
    info = xgrammar.TokenizerInfo(tokens, vocab_size=64, stop_token_ids=[1])
    grammar = xgrammar.GrammarCompiler(info).compile_grammar('root ::= ("{" [a-f]* "}" | "[" [g-z]* "]")*')

    def make() -> dict[str, Any]:
        return {"logits_processor": LogitsProcessorList([GrammarProcessor(grammar)]), "eos_token_id": 1}

    for num_rows in (1, 3):
        _compare(make, num_rows)
    target = tiny_target()
    drafter = untrained_drafter(target)
    for _ in range(3):
        # without an error
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, **make()}
        target.generate(**ragged_prompts(2), **options, assistant_model=drafter)
