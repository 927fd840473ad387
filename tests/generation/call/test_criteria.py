"""Every way to stop acts at the very token where plain `generate` acts."""

from __future__ import annotations

import string
import time
from itertools import product

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import MaxTimeCriteria, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

from tests.generation.drafters import ScriptedDrafter
from tests.generation.frequencies import PROMPT, small_target, smallest_p_value, untrained_drafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.reference.sampling import SMALLEST_P_VALUE, text_probabilities
from tests.thinning import slow
from tests.tiny import tiny_target

NEW_TOKENS = 24


def character_tokenizer():
    """Return a tokenizer of 64 characters, one token each."""
    characters = string.ascii_letters + string.digits + "+/"
    model = WordLevel({character: index for index, character in enumerate(characters)}, unk_token="+")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class StopAfter(StoppingCriteria):
    """Stop a row whose last token is in `tokens` once it has `length` tokens; count the calls."""

    def __init__(self, tokens, length):
        self.tokens, self.length, self.lengths = torch.tensor(tokens), length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return torch.isin(input_ids[:, -1], self.tokens) & (input_ids.shape[1] >= self.length)


class StopAll(StoppingCriteria):
    """Stop the whole batch at one length, with a single answer."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor(input_ids.shape[1] >= 23)


def _compare(target, inputs, options, accuracy=0.8, script=None):
    if script is None:
        script = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    drafter = ScriptedDrafter(target, script, num_padded(inputs), accuracy)
    plain = target.generate(**inputs, do_sample=False, **options())
    assisted = target.generate(**inputs, do_sample=False, assistant_model=drafter, **options())
    assert torch.equal(assisted, plain)
    return plain, drafter.last_statistics


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


@pytest.fixture(scope="module", params=[1, 4])
def inputs(request):
    return ragged_prompts(request.param)


@pytest.fixture(scope="module")
def script(target, inputs):
    return target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)


@pytest.mark.parametrize(
    ("accuracy", "offset"),
    [
        (pytest.param if case in ((0.8, 0), (1.0, 1), (0.8, 7), (1.0, 12)) else slow)(*case)
        for case in product((0.0, 0.8, 1.0), (0, 1, 2, 3, 7, 12))
    ],
)
def test_eos(target, inputs, script, accuracy, offset):
    """Generation runs past an EOS inside an accepted block, or stops before it."""
    eos = int(script[-1, inputs["input_ids"].shape[1] + offset])
    plain, _ = _compare(target, inputs, lambda: {"max_new_tokens": NEW_TOKENS, "eos_token_id": eos}, accuracy, script)
    assert plain.shape[1] <= script.shape[1]


def test_several_eos_ids(target, inputs, script):
    """Only the first of several EOS ids stops."""
    width = inputs["input_ids"].shape[1]
    eos = [int(script[0, width + 9]), int(script[-1, width + 5])]
    _compare(target, inputs, lambda: {"max_new_tokens": NEW_TOKENS, "eos_token_id": eos}, script=script)


@pytest.mark.parametrize("new_tokens", [1, slow(2), slow(5), 6, 7, slow(13)])
def test_max_new_tokens(target, inputs, script, new_tokens):
    """A block at the end commits more tokens than were asked for."""
    plain, statistics = _compare(target, inputs, lambda: {"max_new_tokens": new_tokens}, 1.0, script)
    assert plain.shape[1] == inputs["input_ids"].shape[1] + new_tokens
    # a draft that cannot be committed is never verified
    assert statistics.num_verified <= len(plain) * max(new_tokens - 1, 0)


def test_max_length(target, inputs, script):
    """`max_length` counts the prompt otherwise than plain `generate` does."""
    _compare(target, inputs, lambda: {"max_length": 30}, script=script)


def test_min_new_tokens(target, inputs, script):
    """An EOS that is still forbidden is let through in a block."""
    eos = int(script[-1, inputs["input_ids"].shape[1] + 2])
    _compare(
        target,
        inputs,
        lambda: {"max_new_tokens": NEW_TOKENS, "min_new_tokens": 9, "eos_token_id": eos},
        script=script,
    )


def test_stop_strings(target, inputs, script):
    """A stop string inside an accepted block is overrun."""
    width = inputs["input_ids"].shape[1]
    tokenizer = character_tokenizer()
    word = tokenizer.decode(script[-1, width + 6 : width + 8])
    plain, _ = _compare(
        target,
        inputs,
        lambda: {"max_new_tokens": NEW_TOKENS, "stop_strings": [word], "tokenizer": tokenizer, "eos_token_id": 1},
        0.9,
        script,
    )
    assert torch.equal(plain[-1, : width + 8], script[-1, : width + 8])


@pytest.mark.parametrize("eos", [None, 1])
def test_custom_criterion(target, inputs, script, eos):
    """A row-wise criterion stops at another token; without an EOS stopped rows are written on as plain does."""
    width = inputs["input_ids"].shape[1]
    tokens = script[:, width + 4 : width + 6].flatten().tolist()
    _compare(
        target,
        inputs,
        lambda: {
            "max_new_tokens": NEW_TOKENS,
            "eos_token_id": eos,
            "stopping_criteria": StoppingCriteriaList([StopAfter(tokens, width + 3)]),
        },
        0.9,
        script,
    )


@pytest.mark.parametrize("eos", [None, 1])
def test_criterion_for_the_whole_batch(target, inputs, script, eos):
    """A criterion that answers once for all rows is misread."""
    _compare(
        target,
        inputs,
        lambda: {
            "max_new_tokens": NEW_TOKENS,
            "eos_token_id": eos,
            "stopping_criteria": StoppingCriteriaList([StopAll()]),
        },
        0.9,
        script,
    )


def test_criterion_is_asked_once_per_token(target):
    """A criterion that counts its calls sees a token twice or never."""
    inputs = ragged_prompts(1)
    script = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    criterion = StopAfter([], 0)
    drafter = ScriptedDrafter(target, script, [0], 0.7)
    target.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        assistant_model=drafter,
        stopping_criteria=StoppingCriteriaList([criterion]),
    )
    width = inputs["input_ids"].shape[1]
    assert criterion.lengths == list(range(width + 1, width + NEW_TOKENS + 1))


def test_max_time(target):
    """`max_time` is ignored."""
    inputs = ragged_prompts(1)
    script = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    drafter = ScriptedDrafter(target, script, [0], 1.0)
    criterion = MaxTimeCriteria(max_time=0.5, initial_timestamp=time.time() - 10)
    output = target.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        assistant_model=drafter,
        stopping_criteria=StoppingCriteriaList([criterion]),
    )
    assert output.shape[1] == inputs["input_ids"].shape[1] + 1


def test_constrained_decoding(target, inputs, script):
    """`prefix_allowed_tokens_fn` lets a token through, asks about another row, or acts a token late."""
    width = inputs["input_ids"].shape[1]
    asked = []

    def allowed(row, ids):
        asked.append((row, len(ids)))
        return [10 + row, 20 + (len(ids) - width) % 5]

    _compare(
        target,
        inputs,
        lambda: {"max_new_tokens": NEW_TOKENS, "prefix_allowed_tokens_fn": allowed},
        script=script,
    )
    assert {row for row, _ in asked} == set(range(len(script)))


class StopWithFirst(StoppingCriteria):
    """Stop the whole batch when its first row writes a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return bool(input_ids[0, -1] == self.token)


class StopWithLast(StoppingCriteria):
    """Stop the whole batch once every row has written its token, remembering who has."""

    def __init__(self, tokens, pad):
        self.tokens, self.pad, self.done, self.lengths = tokens, pad, [False] * len(tokens), []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        last = input_ids[:, -1].tolist()
        # padding is often an end's token: a row that is padded where it only writes slower is taken for over
        self.done = [
            was or token in (own, self.pad) for was, token, own in zip(self.done, last, self.tokens, strict=True)
        ]
        return all(self.done)


@pytest.mark.parametrize("eos", [slow(None), 1])
@pytest.mark.parametrize("accuracy", [0.5, slow(0.8), slow(1.0)])
@pytest.mark.parametrize("kind", ["first", "last"])
def test_criterion_that_compares_rows(target, kind, accuracy, eos):
    """A criterion that goes by other rows' text, or by earlier calls, stops a batch too early or never."""
    inputs = ragged_prompts(4)
    width = inputs["input_ids"].shape[1]
    script = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    first, last = int(script[0, width + 11]), [int(script[row, width + 4 + 2 * row]) for row in range(4)]
    criteria = []

    def options():
        criteria.append(StopWithFirst(first) if kind == "first" else StopWithLast(last, 0))
        return {
            "max_new_tokens": NEW_TOKENS,
            "eos_token_id": eos,
            "pad_token_id": 0,
            "stopping_criteria": StoppingCriteriaList(criteria[-1:]),
        }

    plain, statistics = _compare(target, inputs, options, accuracy, script)
    assert plain.shape[1] < width + NEW_TOKENS and statistics.num_accepted > 0
    if kind == "last":
        assert criteria[1].lengths == criteria[0].lengths


def test_rows_that_stop_one_by_one(target):
    """A row that has stopped holds the others up, or is shown with other text than without a drafter."""
    inputs = ragged_prompts(4)
    width = inputs["input_ids"].shape[1]
    script = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    tokens = [int(script[0, width + 3]), int(script[2, width + 9])]
    for eos in (None, int(script[3, width + 6])):
        pages = []

        class Diary(StopAfter):
            def __call__(self, input_ids, scores, pages=pages, **kwargs):
                pages.append(input_ids.tolist())
                return super().__call__(input_ids, scores)

        def options(eos=eos, diary=Diary):
            criteria = StoppingCriteriaList([diary(tokens, width + 3)])
            return {
                "max_new_tokens": NEW_TOKENS,
                "eos_token_id": eos,
                "pad_token_id": 0,
                "stopping_criteria": criteria,
            }

        _compare(target, inputs, options, 0.9, script)
        half = len(pages) // 2
        assert pages[:half] == pages[half:]


def test_a_promise_lets_rows_advance_alone(target):
    """A criterion that promises to go by each row's own text costs as many passes as one that compares them."""

    class Promising(StopAfter):
        depends_on_prefix_alone = True

    inputs = ragged_prompts(4)
    rounds = {}
    for kind in (StopAfter, Promising):
        criteria = StoppingCriteriaList([kind([], 0)])
        _, statistics = _compare(
            target, inputs, lambda criteria=criteria: {"max_new_tokens": 12, "stopping_criteria": criteria}
        )
        rounds[kind] = len(statistics.rounds)
    assert rounds[Promising] < rounds[StopAfter]


@pytest.mark.slow
def test_rows_that_grow_together_keep_the_law():
    """A token that a row would have got beyond the others is kept, or dropped by what it is."""
    target = small_target()
    drafter = untrained_drafter(target)
    criteria = StoppingCriteriaList([StopAfter([], 0)])
    options = {"max_new_tokens": 5, "do_sample": True, "stopping_criteria": criteria, "assistant_model": drafter}
    prompts = PROMPT[None].expand(3, -1)
    samples = torch.cat([target.generate(prompts, **options) for _ in range(60)])[:, len(PROMPT) :]
    assert drafter.last_statistics.num_accepted > 0
    assert smallest_p_value(samples, text_probabilities(target, PROMPT, 5)) > SMALLEST_P_VALUE
