"""Drafts that were looked up in prompt and text: the output is the target's own, however it is called.

B batch, n samples, S prompt length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, pipeline

from dspark_hf import DSparkAssistantModel, LookupAssistant, Request, generate_stream
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.drafting.lookup import Offer
from dspark_hf.generation.scheduling import AdaptiveScheduler, Batch, Schedule, Scheduler
from dspark_hf.generation.scheduling.choosing import SCHEDULERS
from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable
from dspark_hf.generation.scheduling.interface import Choice
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.generation.call.test_criteria import character_tokenizer
from tests.generation.drafters import MemorylessDrafter, ScriptedDrafter
from tests.generation.frequencies import (
    PROMPT,
    VOCAB_SIZE,
    PrefixDependent,
    small_target,
    smallest_p_value,
    untrained_drafter,
)
from tests.generation.prompts import num_padded, ragged_prompts
from tests.modeling.deepseek_v4.tiny import tiny_model
from tests.reference.sampling import SMALLEST_P_VALUE, text_probabilities
from tests.thinning import slow
from tests.tiny import tiny_target

NEW_TOKENS = 40
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
NUM_SAMPLES = 2000


def _repeating_target(family: str = "llama", **fields: Any) -> Any:
    # weights of this size make a text that comes back to what it said
    return tiny_target(family, initializer_range=0.15, **fields)


def _drafter(target: Any, drafts: str, **fields: Any) -> DSparkAssistantModel:
    options = {"num_hidden_layers": 1, "markov_rank": 8, "block_size": 5}
    drafter = DSparkAssistantModel.from_target(target, **{**options, **fields})
    drafter.drafts, drafter.scheduler = drafts, "fixed"
    return drafter


def _assert_looked_up(drafter: Any) -> None:
    # else nothing is said of lookups
    counts = drafter.last_statistics.by_source["lookup"]
    assert 0 < counts.num_accepted < counts.num_verified


@pytest.mark.parametrize(
    ("family", "num_rows"),
    [("llama", 1), ("gemma3_text", 4), ("gpt2", 1), slow("llama", 4), slow("gemma3_text", 1), slow("gpt2", 4)],
)
def test_assistant_without_a_model_writes_what_the_target_writes(family, num_rows):
    """Lookups change the text of one row or of a batch, or a target whose layers nobody taps cannot be decoded."""
    target, inputs = _repeating_target(family), ragged_prompts(num_rows)
    plain = target.generate(**inputs, **GREEDY)
    for scheduler in SCHEDULERS if family == "llama" and num_rows == 1 else ("fixed",):
        assistant = LookupAssistant()
        output = target.generate(**inputs, **GREEDY, assistant_model=assistant, scheduler=scheduler)
        assert torch.equal(output, plain), scheduler
        if scheduler == "fixed":
            _assert_looked_up(assistant)
        assert assistant.last_statistics.by_source["model"].num_drafted == 0


# these measure costs on first use
_PROFILED = ("hardware_aware", "asynchronous")


@pytest.mark.parametrize(
    ("scheduler", "num_rows"),
    [
        (pytest.param if (name, rows) in (("fixed", 1), ("adaptive", 4)) else slow)(name, rows)
        for name in SCHEDULERS
        for rows in (1, 4)
    ],
)
def test_both_sources_together_write_what_the_target_writes(scheduler, num_rows):
    """A row's text depends on who drafted, or a round without the drafter leaves a gap in what it has read."""
    target, inputs = _repeating_target(), ragged_prompts(num_rows)
    plain = target.generate(**inputs, **GREEDY)
    # right as long as it has read everything: else the right script drafts for the wrong position
    for drafter in (_drafter(target, "both"), ScriptedDrafter(target, plain, num_padded(inputs), 0.5)):
        options = {"scheduler": scheduler, "drafts": "both"}
        if isinstance(drafter, ScriptedDrafter) and scheduler in _PROFILED:
            continue
        for _ in range(2):
            assert torch.equal(target.generate(**inputs, **GREEDY, assistant_model=drafter, **options), plain)


def test_trained_drafter_is_not_asked_where_all_rows_look_up():
    """A round in which every row looks up pays for the drafter all the same."""
    target, inputs = _repeating_target(), ragged_prompts(1)
    drafter = ScriptedDrafter(target, target.generate(**inputs, **GREEDY), num_padded(inputs), 0.0)
    target.generate(**inputs, **GREEDY, assistant_model=drafter, drafts="both")
    rounds = drafter.last_statistics.rounds
    looked_up = [one for one in rounds if any(one.num_looked_up)]
    assert looked_up
    assert all(one.num_drafted == 0 for one in looked_up)
    # under "fixed" a pass is never wider than the drafter's
    assert max(one.num_looked_up[0] for one in looked_up) <= drafter.block_size
    assert len(drafter.widths) == sum(one.num_drafted > 0 for one in rounds)


def test_drafter_knows_what_it_missed():
    """The drafter drafts without the tokens that were written while it was not asked."""
    target, inputs = _repeating_target(), ragged_prompts(1)
    drafter = _drafter(target, "both")
    seen: list[tuple[int, int]] = []
    start = drafter.start

    def watched(adapter: Any, batch_size: int) -> Any:
        context: Any = start(adapter, batch_size)
        draft = context.draft
        context.draft = lambda ids, positions, *rest: (
            seen.append((context.cache.lengths.host[0], int(positions[0]))) or draft(ids, positions, *rest)
        )
        return context

    drafter.start = watched
    target.generate(**inputs, **GREEDY, assistant_model=drafter)
    _assert_looked_up(drafter)
    assert len(seen) > 1
    assert all(length == position for length, position in seen)


def test_lookups_alone_tap_no_layer(monkeypatch):
    """Hidden states are captured, and kept, that nobody reads."""
    target, inputs = _repeating_target(), ragged_prompts(4)
    tapped: list[list[int]] = []
    enter = TargetAdapter.__enter__
    monkeypatch.setattr(TargetAdapter, "__enter__", lambda self: tapped.append(self.layer_ids) or enter(self))
    for drafter in (LookupAssistant(), _drafter(target, "lookup")):
        target.generate(**inputs, **GREEDY, assistant_model=drafter)
    assert tapped == [[], []]


@pytest.mark.parametrize(
    ("scheduler", "drafts"),
    [("fixed", "both"), ("adaptive", "lookup"), slow("fixed", "lookup"), slow("adaptive", "both")],
)
def test_requests_that_come_and_go(scheduler, drafts):
    """A request is offered another one's text, or loses its own, when rows join and leave."""
    target = _repeating_target()
    prompts = [torch.randint(2, 20, (length,)) for length in (5, 21, 3, 12, 1, 7)]
    requests = [
        Request(prompt, {"max_new_tokens": count, "do_sample": False}, key=key)
        for key, (prompt, count) in enumerate(zip(prompts, (30, 9, 40, 2, 25, 33), strict=True))
    ]
    drafter = LookupAssistant() if drafts == "lookup" else _drafter(target, drafts)
    stream = generate_stream(target, requests, drafter=drafter, max_rows=3, scheduler=scheduler)
    finished = {one.request.key: one for one in stream}
    for key, request in enumerate(requests):
        assert finished[key].error is None
        assert torch.equal(finished[key].token_ids, target.generate(request.input_ids[None], **request.options)[0])
    if scheduler == "fixed":
        counts = stream.statistics.by_source["lookup"]
        assert 0 < counts.num_accepted < counts.num_verified
        parts = [one.statistics.by_source["lookup"].num_accepted for one in finished.values()]
        assert sum(parts) == counts.num_accepted


def test_stream_without_a_drafter():
    """A stream needs a drafter, or a number of drafts that is meant for one is taken for its own."""
    target = _repeating_target()
    target.generation_config.num_assistant_tokens = 4
    requests = [Request(prompt, {"max_new_tokens": 12, "do_sample": False}) for prompt in ([5, 6, 5, 6], [7, 8, 9])]
    stream = generate_stream(target, requests, max_rows=2)
    for finished in stream:
        prompt = torch.tensor([finished.request.input_ids])
        assert torch.equal(finished.token_ids, target.generate(prompt, **finished.request.options)[0])
    assert stream.statistics.num_drafted == 0 < stream.statistics.num_rounds


@pytest.mark.parametrize(("drafts", "num_rows"), [("lookup", 1), ("both", 3), slow("lookup", 3), slow("both", 1)])
def test_second_turn_over_a_kept_cache(drafts, num_rows):
    """A second turn, whose cache holds the first, is written otherwise when drafts are looked up in both."""
    target, inputs = _repeating_target(), ragged_prompts(num_rows)
    options = {"max_new_tokens": 15, "do_sample": False, "return_dict_in_generate": True}
    texts = []
    for drafter in (None, _drafter(target, drafts)):
        first = target.generate(**inputs, **options, assistant_model=drafter, **{CACHE_KEY: DynamicCache()})
        new = torch.full((num_rows, 4), 7)
        ids = torch.cat([first.sequences, new], dim=1)
        num_new = ids.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, num_new), value=1)
        cache = getattr(first, CACHE_KEY)
        second = target.generate(ids, attention_mask=mask, **options, assistant_model=drafter, **{CACHE_KEY: cache})
        texts.append(second.sequences)
    assert torch.equal(*texts)


@pytest.mark.parametrize("drafts", [slow("lookup"), "both"])
def test_deepseek_v4(drafts):
    """A cache that takes few tokens back is asked to take back more, or rows of its own are mixed up."""
    target = tiny_model().eval()
    inputs = ragged_prompts(3, vocab_size=16)
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    drafter = LookupAssistant(max_drafts=40) if drafts == "lookup" else ScriptedDrafter(target, plain, [0] * 3, 0.3)
    options = {"max_new_tokens": 12, "do_sample": False, "scheduler": "fixed", "drafts": drafts}
    assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter), plain)


def test_pipeline():
    """A pipeline refuses an assistant that has neither a vocabulary nor a tokenizer."""
    target = _repeating_target()
    assistant = LookupAssistant()
    options = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
    texts = []
    for chosen in (None, assistant):
        generator = pipeline(
            "text-generation", model=target, tokenizer=character_tokenizer(), assistant_model=chosen, device="cpu"
        )
        texts.append(generator("abcabc", **options))
    assert texts[0] == texts[1]
    assert assistant.last_statistics.num_rounds > 0


def test_door_without_a_patch():
    """`custom_generate` decodes otherwise than `assistant_model`."""
    target, inputs = _repeating_target(), ragged_prompts(2)
    plain = target.generate(**inputs, **GREEDY)
    assistant, drafter = LookupAssistant(), _drafter(target, "model")
    for door, drafts in ((assistant, None), (drafter, "both")):
        output = target.generate(**inputs, **GREEDY, custom_generate=door.decode, drafts=drafts)
        assert torch.equal(output, plain)
        assert door.last_statistics.by_source["lookup"].num_drafted > 0


class _Alternates(Scheduler):
    """Look up all that is offered, in every second row if there is a drafter for the others."""

    def start(self, call: Any) -> Schedule:
        return _Alternating()


class _Alternating(Schedule):
    def choose(self, batch: Batch, offers: Sequence[Offer]) -> Choice:
        step = 2 if batch.max_drafts else 1
        counts = tuple(0 if row % step else len(offer.token_ids) for row, offer in enumerate(offers))
        return Choice(batch.max_drafts, counts)

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        return batch.cut(drafted.num_drafts)


@pytest.mark.parametrize("drafts", [slow("lookup"), "both"])
@pytest.mark.parametrize("name", ["prefix-dependent", pytest.param("end of text", marks=pytest.mark.slow)])
def test_sampled_text_keeps_the_distribution(drafts, name):
    """A draft that was looked up counts as drawn by the drafter, or a rejected one may come back as the bonus."""
    # warm, so that many drafts are neither sure nor hopeless
    processors = LogitsProcessorList([PrefixDependent()] if name == "prefix-dependent" else [])
    processors.append(TemperatureLogitsWarper(3.0))
    target = small_target()
    target.generation_config.eos_token_id = 3 if name == "end of text" else None
    # every pair of tokens, so that there is always a match
    prompt = torch.tensor([1, 1, 2, 1, 3, 1, 4, 1, 5, 2, 2, 3, 2, 4, 2, 5, 3, 3, 4, 3, 5, 4, 4, 5, 5, 1])
    drafter = MemorylessDrafter(lambda slot, previous: torch.zeros(len(previous), VOCAB_SIZE), VOCAB_SIZE, 3)
    samples = target.generate(
        prompt.expand(NUM_SAMPLES, -1),
        max_new_tokens=4,
        do_sample=True,
        assistant_model=drafter,
        scheduler=_Alternates(),
        drafts=drafts,
        logits_processor=processors,
    )[:, len(prompt) :]
    for source in ("lookup", "model") if drafts == "both" else ("lookup",):
        counts = drafter.last_statistics.by_source[source]
        assert 0.05 < counts.num_accepted / counts.num_verified < 0.9
        # texts that end early have few rounds
        assert counts.num_verified > NUM_SAMPLES / 2
    probabilities = text_probabilities(target, prompt, 4, processors=processors)
    assert smallest_p_value(samples, probabilities) > SMALLEST_P_VALUE


@pytest.mark.slow
def test_sampled_requests_keep_the_distribution():
    """Greedy and sampling requests that share a pass with lookups are sampled from another distribution."""
    target = small_target()
    options: dict[str, Any] = {"max_new_tokens": 4}
    requests = [Request(PROMPT, {**options, "do_sample": index % 8 > 0}, key=index % 8 > 0) for index in range(300)]
    assistant = LookupAssistant(max_drafts=3)
    stream = generate_stream(target, requests, drafter=assistant, max_rows=50, scheduler="fixed")
    finished = list(stream)
    assert 0 < stream.statistics.num_accepted < stream.statistics.num_verified
    texts = torch.stack([one.token_ids[len(PROMPT) :] for one in finished if one.request.key])
    assert smallest_p_value(texts, text_probabilities(target, PROMPT, 4), span=2) > SMALLEST_P_VALUE
    plain = target.generate(PROMPT[None], do_sample=False, **options)[0]
    assert all(torch.equal(one.token_ids, plain) for one in finished if not one.request.key)


class _Admits(Scheduler):
    """Let only drafts through that the target is going to accept: what no scheduler may know."""

    def start(self, call: Any) -> Schedule:
        return _Peeking()


class _Peeking(Schedule):
    def admit(self, drafted: Any, batch: Any) -> list[int]:
        return [min(limit, int(ids[0]) % 2) for ids, limit in zip(drafted.token_ids, batch.limits, strict=True)]


def test_frequencies_notice_a_draft_that_decides_about_itself():
    """The frequency tests of this file would pass for text that does not follow the target's distribution."""
    target = small_target()
    drafter = untrained_drafter(target)
    samples = target.generate(
        PROMPT.expand(NUM_SAMPLES, -1), max_new_tokens=5, do_sample=True, assistant_model=drafter, scheduler=_Admits()
    )[:, len(PROMPT) :]
    assert smallest_p_value(samples, text_probabilities(target, PROMPT, 5)) < SMALLEST_P_VALUE


def test_knob_of_a_call_goes_before_the_drafter():
    """Who drafts is not who the call, its configuration or the drafter says, in that order."""
    target, inputs = _repeating_target(), ragged_prompts(1)
    drafter = _drafter(target, "model")

    def sources(**options: Any) -> set[str]:
        target.generate(**inputs, **{**GREEDY, **options}, assistant_model=drafter)
        by_source = drafter.last_statistics.by_source
        return {name for name, counts in by_source.items() if counts.num_drafted}

    assert sources() == {"model"}
    assert sources(drafts="lookup") == {"lookup"}
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, drafts="lookup")
    assert sources(generation_config=config) == {"lookup"}
    assert sources(generation_config=config, drafts="model") == {"model"}
    # number of drafts at most, of either
    sources(drafts="lookup", num_assistant_tokens=2)
    assert max(one.num_looked_up[0] for one in drafter.last_statistics.rounds if one.num_looked_up) == 2


def test_what_cannot_be_served_is_refused():
    """A wrong word is taken for another, or refused after work was done."""
    target, inputs = _repeating_target(), ragged_prompts(1)
    with pytest.raises(ValueError, match=r"`drafts` must be one of model, lookup, both .* got 'none'"):
        target.generate(**inputs, **GREEDY, assistant_model=_drafter(target, "model"), drafts="none")
    with pytest.raises(ValueError, match=r"`drafts` must be one of lookup for LookupAssistant, got 'both'"):
        target.generate(**inputs, **GREEDY, assistant_model=LookupAssistant(), drafts="both")
    with pytest.raises(ValueError, match="`drafts` must be left out unless"):
        target.generate(**inputs, **GREEDY, drafts="lookup")
    for name in ("max_drafts", "min_match"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            LookupAssistant(**{name: 0})
        for value in (1.5, "2", True):
            with pytest.raises(TypeError, match=f"`{name}` must be a whole number of at least 1, got {value!r}"):
                LookupAssistant(**{name: value})
    (finished,) = generate_stream(
        target, [Request(inputs["input_ids"], {"drafts": "lookup"})], drafter=LookupAssistant()
    )
    assert "must leave out ['drafts']" in str(finished.error)


def test_text_of_the_prompt_without_its_padding():
    """Padding is looked up, as if it had been said."""
    target = _repeating_target(eos_token_id=0)
    prompt = torch.tensor([[0, 0, 0, 0, 5, 6], [3, 4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [1] * 6])
    assistant = LookupAssistant(min_match=1)
    target.generate(prompt, attention_mask=mask, max_new_tokens=2, do_sample=False, assistant_model=assistant)
    assert assistant.last_statistics.num_rounds
    assert all(not any(one.num_looked_up) for one in assistant.last_statistics.rounds)


def _costs(seconds_per_token: float, drafting: float = 0.5) -> CostTable:
    passes = {(1, 64, width): 1.0 + seconds_per_token * (width - 1) for width in (1, 2, 4, 8, 16)}
    return CostTable(CostCurves(passes), CostCurves({(1, 64, size): drafting for size in (1, 5)}))


@pytest.mark.parametrize(("price", "is_worth_it"), [(0.01, True), (3.0, False)])
def test_costs_decide_whether_to_look_up(price, is_worth_it):
    """The default looks up where a wide pass costs more than it yields, or does not where it costs nothing."""
    target, inputs = _repeating_target(), ragged_prompts(1)
    assistant = LookupAssistant()
    scheduler = AdaptiveScheduler(costs=_costs(price))
    output = target.generate(**inputs, **GREEDY, assistant_model=assistant, scheduler=scheduler)
    assert torch.equal(output, target.generate(**inputs, **GREEDY))
    looked_up = [one for one in assistant.last_statistics.rounds if any(one.num_looked_up)]
    # tried all the same, ever more rarely
    assert (len(looked_up) > 5) if is_worth_it else (len(looked_up) <= 3)


@pytest.mark.parametrize("streams", [False, True])
def test_every_token_tells_who_gave_it(streams):
    """A looked-up draft is shown as the drafter's, or the drafter's acceptance by position is that of lookups."""
    target, inputs = _repeating_target(), ragged_prompts(1)
    plain = target.generate(**inputs, **GREEDY)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.5)
    statistics = _statistics_of(target, inputs, drafter, streams=streams)
    (sources,), (origins,) = statistics.token_sources, statistics.origins
    assert len(sources) == plain.shape[1] - inputs["input_ids"].shape[1]
    assert [source != "target" for source in sources] == origins
    for source, counts in statistics.by_source.items():
        assert sources.count(source) == counts.num_accepted > 0
        assert sum(counts.accepted_by_position) >= counts.num_accepted
    # who drafted in each round, by what the round itself says
    expected = ["target"]
    for one in statistics.rounds:
        source = "lookup" if any(one.num_looked_up) else "model"
        expected += [source] * one.num_accepted[0] + ["target"]
    assert sources == expected[: len(sources)]
    assert statistics.verified_by_position == statistics.by_source["model"].verified_by_position


def _statistics_of(target: Any, inputs: Any, drafter: Any, *, streams: bool) -> Any:
    if not streams:
        target.generate(**inputs, **GREEDY, assistant_model=drafter, scheduler="fixed", drafts="both")
        return drafter.last_statistics
    request = Request(inputs["input_ids"][0].tolist(), dict(GREEDY))
    (finished,) = generate_stream(target, [request], drafter=drafter, scheduler="fixed", drafts="both")
    return finished.statistics
