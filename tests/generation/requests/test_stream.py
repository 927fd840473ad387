"""Requests that come and go in a running batch: each ends as it would alone, whatever happens to the others."""

from __future__ import annotations

import threading
import traceback
from queue import Full
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BatchEncoding,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    cache_utils,
)
from transformers.generation import BaseStreamer

from dspark_hf import DeepseekV4DSparkForCausalLM, DSparkAssistantModel
from dspark_hf.generation.drafting.interface import DraftContext
from dspark_hf.generation.requests.request import Request, RequestQueue
from dspark_hf.generation.requests.stream import generate_stream
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.deepseek_v4.tiny import write_tiny_checkpoint
from tests.generation.call.test_criteria import character_tokenizer
from tests.generation.drafters import ScriptedDrafter
from tests.generation.schedulers import EveryThirdRound
from tests.generation.test_sampling import OPTIONS, PROMPT
from tests.modeling.deepseek_v4.tiny import tiny_model
from tests.recurrent import recurrent_target
from tests.reference.sampling import SMALLEST_P_VALUE, p_value, text_probabilities
from tests.thinning import slow
from tests.tiny import FAMILIES, VOCAB_SIZE, tiny_target

# prompt lengths and new tokens: rows leave at different times, one at once; prompts both below and above the window
SIZES = ((5, 12), (11, 3), (17, 18), (1, 1), (4, 14), (21, 6), (3, 9))


class StreamDrafter(ScriptedDrafter):
    """Know what each request will say, in the order in which they are let in."""

    def __init__(self, target: Any, texts: list[Tensor], accuracy: float = 0.7):
        script = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        super().__init__(target, script, [0] * len(texts), accuracy)
        self.num_started = 0

    def start(self, target: TargetAdapter, batch_size: int) -> DraftContext:
        context: Any = super().start(target, batch_size)
        context.rows = [self.num_started]
        self.num_started += 1
        return context


class Raises(LogitsProcessor, StoppingCriteria):
    """A processor or a criterion that fails once a text has `length` tokens."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.length:
            raise KeyError("mine")
        return scores if isinstance(scores, Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)


class Silences(LogitsProcessor):
    """Leave nothing to sample once a text has `length` tokens."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores):
        return scores if input_ids.shape[1] < self.length else torch.full_like(scores, float("-inf"))


class Recorder(BaseStreamer):
    """Keep what is streamed; fail at the end of the prompt if asked to."""

    def __init__(self, fails: bool = False):
        self.tokens: list[int] = []
        self.fails = fails
        self.has_ended = False

    def put(self, value):
        if self.fails and self.tokens:
            raise KeyError("mine")
        self.tokens += value.flatten().tolist()

    def end(self):
        self.has_ended = True


def _prompt(length: int) -> Tensor:
    return torch.randint(2, VOCAB_SIZE, (length,))


def _requests(sizes=SIZES, **options: Any) -> list[Request]:
    options = {"do_sample": False, **options}
    return [
        Request(_prompt(length), {"max_new_tokens": count, **options}, key=i)
        for i, (length, count) in enumerate(sizes)
    ]


def _alone(target, request: Request) -> Tensor:
    return target.generate(request.input_ids[None], **request.options)[0]


def _drip(requests, every=3):
    """Give a request now and then, and in between nothing."""
    for request in requests:
        yield from [None] * (every if request.key else 0)
        yield request


def _drafter(kind, target, texts):
    if kind == "scripted":
        return StreamDrafter(target, texts)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=2, markov_rank=8, block_size=5)
    drafter.scheduler = "fixed"
    return drafter


def _num_hooks(target) -> int:
    return sum(len(module._forward_hooks) for module in target.modules())


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


# without and with sliding layers, and with learned positions
QUICK_FAMILIES = ("llama", "gemma3_text", "gpt2")


@pytest.mark.parametrize(
    ("family", "max_rows", "kind"),
    [(pytest.param if family in QUICK_FAMILIES else slow)(family, 3, "scripted") for family in FAMILIES]
    + [slow("gemma3_text", 1, "scripted"), slow("gemma3_text", 3, "untrained"), slow("mistral", 4, "untrained")],
)
def test_text_is_that_of_each_request_alone(family, max_rows, kind):
    """A request that joins, or leaves, changes the text of itself or of others."""
    target = tiny_target(family)
    requests = _requests()
    texts = [_alone(target, request) for request in requests]
    finished = list(generate_stream(target, _drip(requests), drafter=_drafter(kind, target, texts), max_rows=max_rows))
    assert len(finished) == len(requests)
    for one in finished:
        assert one.error is None
        assert torch.equal(one.token_ids, texts[one.request.key])
    assert _num_hooks(target) == 0


@pytest.mark.parametrize(
    ("window", "scheduler"),
    [
        (6, "fixed"),
        slow(None, "fixed"),
        *(slow(window, scheduler) for scheduler in ("adaptive", EveryThirdRound()) for window in (None, 6)),
    ],
    ids=lambda value: "third" if isinstance(value, EveryThirdRound) else None,
)
def test_drafter_context_follows_the_rows(target, scheduler, window):
    """The drafter reads another row's context, or none, once rows have moved: its drafts differ from those alone."""
    requests = _requests()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=2, block_size=5, context_window=window)
    told = {"drafter": drafter, "max_rows": 3, "scheduler": scheduler, "drafts": "model"}
    for one in generate_stream(target, _drip(requests), **told):
        options = {"assistant_model": drafter, "scheduler": "fixed", "drafts": "model"}
        assert torch.equal(one.token_ids, _alone(target, one.request))
        target.generate(one.request.input_ids[None], **one.request.options, **options)
        if scheduler == "fixed":
            assert one.statistics.num_accepted == drafter.last_statistics.num_accepted
            assert one.statistics.origins == drafter.last_statistics.origins
            # hardly a draft of a fresh drafter is accepted, but what it believes tells what it has read
            for ours, alone in zip(one.statistics.rounds, drafter.last_statistics.rounds, strict=True):
                # near its end a row alone is given fewer drafts
                if alone.num_drafted == 0:
                    continue
                confidence = ours.confidence[:, : alone.num_drafted]
                torch.testing.assert_close(confidence, alone.confidence, atol=1e-4, rtol=1e-4)


def test_finished_in_the_order_of_finishing(target):
    """A short request waits for a long one, or the drafts are not used."""
    requests = _requests(((4, 30), (4, 2), (4, 12)))
    drafter = StreamDrafter(target, [_alone(target, request) for request in requests], accuracy=1.0)
    stream = generate_stream(target, requests, drafter=drafter)
    assert [one.request.key for one in stream] == [1, 2, 0]
    # three prefills, and rounds of five drafts and a bonus for 29 tokens
    assert stream.statistics.num_target_passes == 3 + 5
    assert stream.statistics.num_committed == 29 + 1 + 11


def test_each_request_has_its_own_rules(target):
    """Options of one request act on another, or not where they would alone."""
    tokenizer = character_tokenizer()
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 30},
        {"max_new_tokens": 30, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 9, "bad_words_ids": [[5], [7, 9]]},
        {"max_length": 25, "prefix_allowed_tokens_fn": lambda row, ids: range(2 + len(ids) % 3, 64, 3)},
        {"max_new_tokens": 20, "num_assistant_tokens": 2, "logits_processor": LogitsProcessorList()},
    ]
    requests = [Request(_prompt(6 + 2 * i), {"do_sample": False, **some}, key=i) for i, some in enumerate(options)]
    first = _alone(target, requests[0])
    # ends in the middle of a text: a token, a string, a criterion
    ends = {"eos_token_id": int(first[20])}, {"stop_strings": tokenizer.decode(first[15:17]), "tokenizer": tokenizer}
    for end in ends:
        requests.append(Request(first[:6], {**requests[0].options, **end}, key=len(requests)))
    texts = [_alone(target, request) for request in requests]
    assert max(map(len, texts[-2:])) < len(first)
    drafter = StreamDrafter(target, texts)
    for one in generate_stream(target, requests, drafter=drafter, max_rows=4):
        assert one.error is None
        assert torch.equal(one.token_ids, texts[one.request.key])


def test_padded_prompts_and_lists(target):
    """A prompt with left padding, or given as a list, is read as other tokens."""
    ids, mask = torch.tensor([[0, 0, 5, 9, 11]]), torch.tensor([[0, 0, 1, 1, 1]])
    options = {"max_new_tokens": 12, "do_sample": False}
    requests = [
        Request(ids, {"attention_mask": mask, **options}),
        Request([5, 9, 11], options),
        # as tokenizers give them
        Request(ids[0].tolist(), {"attention_mask": mask[0].tolist(), **options}),
    ]
    drafter = _drafter("untrained", target, [])
    finished = {one.request: one for one in generate_stream(target, requests, drafter=drafter)}
    padded, plain, listed = (finished[request].token_ids for request in requests)
    assert torch.equal(padded[2:], plain)
    assert torch.equal(listed, padded)
    assert torch.equal(padded, target.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[0])


def test_sampling_beside_others_keeps_the_distribution():
    """Sampled text is not the target's where rows are greedy, or sample by other rules, in the same batch."""
    target = tiny_target(vocab_size=6, hidden_size=16, num_hidden_layers=1)
    # larger weights than fresh ones: the drafts are far from the target's distribution
    drafter = DSparkAssistantModel.from_target(
        target, num_hidden_layers=1, markov_rank=4, block_size=3, initializer_range=0.5
    )
    options, processors = OPTIONS["mixture"]
    span, plain = {"max_new_tokens": 4}, {"do_sample": True, "top_k": 0}
    kinds = [{"do_sample": True, **options}] * 4 + [{"do_sample": False}, plain]
    requests = [Request(PROMPT, {**span, **kinds[i % 6]}, key=i % 6) for i in range(144)]
    samples: dict[int, list[Tensor]] = {i: [] for i in range(6)}
    stream = generate_stream(target, requests, drafter=drafter, max_rows=13, scheduler="fixed")
    for one in stream:
        assert one.error is None
        samples[one.request.key].append(one.token_ids[len(PROMPT) :])
    # else the frequencies say nothing about drafting or nothing about rejecting
    assert 0.1 < stream.statistics.num_accepted / stream.statistics.num_verified < 0.9
    mixture = torch.stack([text for key in range(4) for text in samples[key]])
    for texts, chain in ((mixture, processors), (torch.stack(samples[5]), [])):
        probabilities = text_probabilities(target, PROMPT, 4, processors=LogitsProcessorList(chain))
        assert p_value(texts[:, :2], probabilities.sum((2, 3))) > SMALLEST_P_VALUE
        assert p_value(texts[:, 2:], probabilities.sum((0, 1))) > SMALLEST_P_VALUE
    greedy = target.generate(PROMPT[None], **span, do_sample=False)[0, len(PROMPT) :]
    assert torch.equal(torch.stack(samples[4]), greedy.expand(24, -1))


BAD = {
    "unknown option": ({"no_such": 1}, ValueError, "no_such"),
    "beams": ({"num_beams": 2}, ValueError, "`num_beams` must be 1"),
    "several texts": ({"num_return_sequences": 2, "do_sample": True}, ValueError, "one prompt"),
    "too many drafts": ({"num_assistant_tokens": 9}, ValueError, "`num_assistant_tokens`"),
    "row of padding": (
        {"attention_mask": torch.zeros(1, 6, dtype=torch.long)},
        ValueError,
        "`attention_mask` must leave every row a token",
    ),
    "another mask": ({"attention_mask": [1, 1]}, ValueError, "must have the shape of its `input_ids`, (1, 6)"),
    "own scheduler": ({"scheduler": "fixed"}, ValueError, "`options` of a request must leave out"),
    "a tree of drafts": ({"draft_tree": 9}, ValueError, "must leave out ['draft_tree']"),
    "output object": ({"return_dict_in_generate": True}, ValueError, "`return_dict_in_generate` must be False"),
    "no cache": ({"use_cache": False}, ValueError, "`use_cache` must be True"),
}
# what comes to light while others are being written
BAD_LATER = {
    "processor at once": ({"logits_processor": LogitsProcessorList([Raises(0)])}, KeyError, "mine"),
    "processor": ({"logits_processor": LogitsProcessorList([Raises(12)])}, KeyError, "mine"),
    "criterion": ({"stopping_criteria": StoppingCriteriaList([Raises(12)])}, KeyError, "mine"),
    "streamer": ({"streamer": Recorder(fails=True)}, KeyError, "mine"),
    "nothing to sample": (
        {"do_sample": True, "logits_processor": LogitsProcessorList([Silences(12)])},
        ValueError,
        "must leave a token that can be sampled",
    ),
}


@pytest.fixture(scope="module")
def good_texts(target):
    """Whole texts of three good requests, by the lengths of their prompts."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator) for length in (4, 9, 6)]
    return {
        len(prompt): _alone(target, Request(prompt, {"max_new_tokens": count, "do_sample": False}))
        for prompt, count in zip(prompts, (20, 14, 9), strict=True)
    }


@pytest.mark.parametrize("names", [tuple(BAD), *((name,) for name in BAD_LATER)], ids=lambda names: names[0])
def test_failing_requests_leave_the_others_alone(target, good_texts, names):
    """One bad request ends or changes the others, or is lost without a word."""
    every = {**BAD, **BAD_LATER}
    good = [
        Request(text[:length], {"max_new_tokens": len(text) - length, "do_sample": False}, key=length)
        for length, text in good_texts.items()
    ]
    usual = {"do_sample": False, "max_new_tokens": 20}
    bad = [Request(_prompt(6), {**usual, **every[name][0]}, key=name) for name in names]
    drafter = _drafter("untrained", target, [])
    finished = {
        one.request.key: one
        for one in generate_stream(target, [good[0], good[1], *bad, good[2]], drafter=drafter, max_rows=3)
    }
    for request in good:
        assert finished[request.key].error is None
        assert torch.equal(finished[request.key].token_ids, good_texts[request.key])
    for name in names:
        options, kind, message = every[name]
        assert isinstance(finished[name].error, kind), name
        assert message in str(finished[name].error)
        if name in ("processor", "criterion", "nothing to sample"):
            # what came before is kept
            assert 6 < len(finished[name].token_ids) <= 12
        if "streamer" in options:
            assert options["streamer"].has_ended


def test_prompts_that_are_none(target):
    """A prompt that cannot be read ends the stream."""
    prompts = [torch.tensor([5, VOCAB_SIZE + 7]), "text", torch.zeros(2, 3, dtype=torch.long), None, []]
    requests = [Request(prompt, {"max_new_tokens": 3}, key=i) for i, prompt in enumerate(prompts)]
    good = _requests(((5, 10),))[0]
    finished = list(generate_stream(target, [*requests, good], drafter=_drafter("untrained", target, []), max_rows=2))
    assert [one.error is None for one in finished] == [False] * 5 + [True]
    # an easy one to send by mistake
    assert "`input_ids` of a request must hold a token at least, got none" in str(finished[4].error)
    assert torch.equal(finished[-1].token_ids, _alone(target, good))


def test_cancel(target):
    """A cancelled request goes on, is lost, or takes others with it."""
    first, second, never, third = _requests(((5, 60), (4, 30), (3, 30), (6, 20)))
    streamer, num_written = Recorder(), []

    def source():
        yield first
        yield second
        yield from [None] * 4
        first.cancel()
        never.cancel()
        num_written.append(len(streamer.tokens))
        yield None
        yield never
        yield third

    drafter = StreamDrafter(target, [_alone(target, one) for one in (first, second, third)])
    first.options["streamer"] = streamer
    finished = {
        one.request: one for one in generate_stream(target, source(), drafter=drafter, max_rows=3, scheduler="fixed")
    }
    assert all(one.error is None for one in finished.values())
    written = finished[first].token_ids
    assert 5 < len(written) < 65
    # not one round more
    assert [len(written)] == num_written
    del first.options["streamer"]
    assert torch.equal(written, _alone(target, first)[: len(written)])
    assert finished[never].token_ids is None
    for request in (second, third):
        assert torch.equal(finished[request].token_ids, _alone(target, request))


def test_back_pressure(target):
    """Requests are taken before there is a row for them."""
    num_taken = 0

    def source():
        nonlocal num_taken
        for request in _requests(SIZES[:5] * 2):
            num_taken += 1
            yield request

    stream = generate_stream(target, source(), drafter=_drafter("untrained", target, []), max_rows=3)
    assert num_taken == 0
    for num_finished, _ in enumerate(stream):
        assert num_taken <= num_finished + 3


def test_close_early(target):
    """A stream that is left early loses requests, or leaves hooks on the target."""
    requests = _requests(((5, 40), (4, 2), (6, 30), (7, 9)))
    streamer = Recorder()
    requests[2].options["streamer"] = streamer
    queue = RequestQueue()
    for request in requests:
        queue.put(request)
    stream = generate_stream(target, queue, drafter=_drafter("untrained", target, []), max_rows=3)
    assert next(stream).request is requests[1]
    assert _num_hooks(target) == 0
    rest = {one.request.key: one for one in stream.close()}
    assert sorted(rest) == [0, 2, 3]
    assert all(one.error is None and one.request.is_cancelled for one in rest.values())
    assert 5 < len(rest[0].token_ids) < 45
    assert rest[3].token_ids is None
    assert streamer.has_ended
    assert streamer.tokens == rest[2].token_ids.tolist()
    with pytest.raises(ValueError, match="`put` must come before `close`"):
        queue.put(requests[0])
    assert list(stream) == []
    assert stream.close() == []


def test_with_statement_closes(target):
    """An error of the caller leaves producers waiting at a queue that nobody reads."""
    queue = RequestQueue(max_waiting=1)
    with pytest.raises(KeyError), generate_stream(target, queue, drafter=_drafter("untrained", target, [])):
        raise KeyError
    with pytest.raises(ValueError, match="`put` must come before `close`"):
        queue.put(_requests()[0])


def test_queue_between_threads(target):
    """Requests of several threads are lost, or answered twice."""
    queue = RequestQueue(max_waiting=2)
    requests = _requests()

    def produce(mine):
        for request in mine:
            queue.put(request, timeout=60)

    producers = [threading.Thread(target=produce, args=(requests[i::3],)) for i in range(3)]

    def close():
        for producer in producers:
            producer.join()
        queue.close()

    threads = [*producers, threading.Thread(target=close)]
    for thread in threads:
        thread.start()
    finished = list(generate_stream(target, queue, drafter=_drafter("untrained", target, []), max_rows=4))
    for thread in threads:
        thread.join()
    assert sorted(one.request.key for one in finished) == list(range(len(requests)))
    assert all(torch.equal(one.token_ids, _alone(target, one.request)) for one in finished)


def test_queue_is_bounded():
    """A producer that is faster than the target fills the memory."""
    queue = RequestQueue(max_waiting=1)
    queue.put(_requests()[0], timeout=0)
    with pytest.raises(Full):
        queue.put(_requests()[1], timeout=0.01)


def test_target_fails(target, monkeypatch):
    """When the target fails, requests are lost, or hooks stay."""
    requests = _requests(((5, 40), (4, 2), (6, 30), (7, 9)))
    queue = RequestQueue()
    for request in requests:
        queue.put(request)
    stream = generate_stream(target, queue, drafter=_drafter("untrained", target, []), max_rows=3)
    assert next(stream).request is requests[1]

    def fail(*args, **kwargs):
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(target.model, "forward", fail)
        finished = []
        with pytest.raises(RuntimeError, match="out of order"):
            # the request that would have joined now fails as well, at its own pass
            finished.extend(stream)
    # list.extend keeps what it had before the error
    assert {one.request.key for one in finished} == {0, 2, 3}
    assert all("out of order" in str(one.error) for one in finished)
    # those that were inside come with what they had
    assert all(len(one.token_ids) > 5 for one in finished if one.request.key != 3)
    assert _num_hooks(target) == 0
    assert list(stream) == []


def test_interrupt(target, monkeypatch):
    """After Ctrl-C nobody knows what the requests inside had got."""
    requests = _requests(((5, 40), (6, 30)))
    stream = generate_stream(target, requests, drafter=_drafter("untrained", target, []), max_rows=3)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "_let_requests_in", _after(1, stream._let_requests_in, interrupt))
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    rest = stream.close()
    assert [one.request.key for one in rest] == [0, 1]
    assert all(isinstance(one.error, KeyboardInterrupt) for one in rest)


def _after(count, function, then):
    calls = iter(range(count))
    return lambda: function() if next(calls, None) is not None else then()


@pytest.mark.parametrize(("item", "error"), [(KeyError("source"), KeyError), ("no request", TypeError)])
def test_source_fails(target, item, error):
    """When the source of requests fails, those inside are lost."""
    requests = _requests(((5, 20), (6, 12)))

    def source():
        yield from requests
        if isinstance(item, Exception):
            raise item
        yield item

    stream = generate_stream(target, source(), drafter=_drafter("untrained", target, []))
    finished = [next(stream), next(stream)]
    with pytest.raises(error):
        next(stream)
    assert all(torch.equal(one.token_ids, _alone(target, one.request)) for one in finished)
    assert list(stream) == []


def test_streamers(target):
    """A request's streamer gets another request's tokens, or is never told of the end."""
    requests = _requests(((5, 20), (6, 12), (3, 16)))
    for request in requests:
        request.options["streamer"] = Recorder()
    for one in generate_stream(target, requests, drafter=_drafter("untrained", target, []), max_rows=2):
        assert one.request.options["streamer"].tokens == one.token_ids.tolist()
        assert one.request.options["streamer"].has_ended


def test_target_is_the_callers_between_rounds(target):
    """A call of `generate` between two finished requests disturbs the stream."""
    requests = _requests(SIZES[:4])
    drafter = _drafter("untrained", target, [])
    for one in generate_stream(target, requests, drafter=drafter, max_rows=2):
        alone = target.generate(one.request.input_ids[None], **one.request.options, assistant_model=drafter)[0]
        assert torch.equal(one.token_ids, alone)


def test_targets_without_a_ragged_cache():
    """A target that chooses by an index what it attends to is decoded as if rows could be moved about."""
    indexed = recurrent_target("qwen4_exp_text")
    with pytest.raises(ValueError, match="`target` must have full, sliding or chunked attention"):
        generate_stream(indexed, [], drafter=StreamDrafter(indexed, [PROMPT]))


# beyond the window of 16 and the ratios of 4 and 8 on either side of a join; the first prompt completes no entry
V4_SIZES = ((3, 8), (40, 4), (17, 9), (1, 5), (8, 6))


@pytest.mark.parametrize(
    ("max_rows", "kind", "indexer_dtype"),
    [
        (3, "scripted", "fp4"),
        slow(2, "untrained", "fp4"),
        *(slow(num, "scripted", dtype) for num in (1, 8) for dtype in (None, "fp4")),
        slow(3, "scripted", None),
        slow(2, "untrained", None),
    ],
)
def test_cache_with_rows_of_its_own(max_rows, kind, indexer_dtype):
    """A request that joins, or leaves, changes the text of others in DeepSeek-V4's own cache."""
    rowwise = tiny_model(indexer_dtype=indexer_dtype)
    requests = _requests(V4_SIZES)
    texts = [_alone(rowwise, request) for request in requests]
    drafter = _drafter(kind, rowwise, texts)
    for one in generate_stream(rowwise, _drip(requests), drafter=drafter, max_rows=max_rows):
        assert one.error is None
        assert torch.equal(one.token_ids, texts[one.request.key])


def test_cache_that_cannot_take_a_pass_back():
    """A request whose drafts DeepSeek-V4's cache cannot take back ends the stream."""
    rowwise = tiny_model(max_rollback=3)
    (finished,) = generate_stream(rowwise, _requests(((5, 20),)), drafter=_drafter("untrained", rowwise, []))
    assert "`max_rollback` must be at least 6, the tokens of a verify pass, got 3" in str(finished.error)


def test_kinds_of_layers_that_transformers_does_not_know(tmp_path):
    """A target of our own classes ends in a KeyError, unless Transformers' class of the same kind was imported."""
    write_tiny_checkpoint(tmp_path, with_dspark=False)
    model = DeepseekV4DSparkForCausalLM.from_pretrained(tmp_path)
    (request,) = _requests(((5, 4),))
    kinds = {kind: cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.pop(kind, None) for kind in set(model.config.layer_types)}
    kinds = {kind: layer for kind, layer in kinds.items() if layer is not None}
    try:
        (finished,) = generate_stream(model, [request], drafter=_drafter("untrained", model, []))
    finally:
        cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.update(kinds)
    assert finished.error is None
    assert torch.equal(finished.token_ids, _alone(model, request))


@pytest.mark.parametrize("threshold", [0.4, 0.6])
def test_threshold_of_the_target(threshold):
    """A threshold that the target's generation configuration holds fails every request."""
    target = tiny_target("llama")
    target.generation_config.assistant_confidence_threshold = threshold
    drafter = _drafter("untrained", target, [])
    drafter.scheduler = None
    requests = _requests(((5, 20), (9, 14)))
    for one in generate_stream(target, requests, drafter=drafter):
        assert one.error is None
        assert torch.equal(one.token_ids, _alone(target, one.request))
    with pytest.raises(ValueError, match=f"must agree with the scheduler, got {threshold} with 'fixed'"):
        generate_stream(target, [], drafter=drafter, scheduler="fixed")


def test_max_rows(target):
    """A stream without rows waits for ever."""
    with pytest.raises(ValueError, match="`max_rows` must be at least 1, got 0"):
        generate_stream(target, [], drafter=_drafter("untrained", target, []), max_rows=0)


def test_drafter_whose_contexts_cannot_join(target, monkeypatch):
    """A drafter of somebody else's ends the stream without saying what it lacks."""
    requests = _requests(((5, 20), (6, 12)))
    drafter = StreamDrafter(target, [_alone(target, request) for request in requests])
    context_class: Any = type(drafter.start(TargetAdapter(target), 1))
    monkeypatch.delattr(context_class, "append_rows")
    stream = generate_stream(target, requests, drafter=drafter)
    finished = [next(stream), next(stream)]
    assert {one.request.key for one in finished} == {0, 1}
    with pytest.raises(NotImplementedError, match="contexts with `append_rows`"):
        next(stream)


@pytest.mark.parametrize("prompt", ["text", {"input_ids": [5, 6]}, BatchEncoding({"input_ids": [5, 6]})])
def test_a_prompt_is_token_ids(target, prompt):
    """Text, or all that a tokenizer returns, ends in an error of PyTorch that names nothing."""
    [finished] = generate_stream(target, [Request(prompt)], drafter=_drafter("untrained", target, []))
    assert isinstance(finished.error, TypeError)
    assert "`input_ids` of a request must be token ids, got" in str(finished.error)


def test_kept_errors_hold_no_tensors(target):
    """A caller that keeps what failed keeps its tensors: an error's frames hold scores over whole vocabularies."""
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    options = {"max_new_tokens": 9, "logits_processor": LogitsProcessorList([Raises(6)])}
    (finished,) = generate_stream(target, [Request([3, 4, 5], options)], drafter=drafter)
    assert finished.error is not None
    frames = [frame for frame, _ in traceback.walk_tb(finished.error.__traceback__)]
    # where it happened is still known
    assert frames[-1].f_code.co_name == "__call__"
    held = [value for frame in frames for value in frame.f_locals.values()]
    assert not any(isinstance(value, Tensor) for value in held)
