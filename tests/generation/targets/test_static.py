"""A static cache with a drafter: the text of plain `generate`, in passes that are compiled once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig, StaticCache

from dspark_hf import DSparkAssistantModel, LookupAssistant
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.ragged_store import StaticStore
from dspark_hf.generation.scheduling.interface import Batch, CallInfo, RoundOutcome, Schedule, Scheduler
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.static import StaticTarget, pass_widths
from tests.closeness import assert_same_up_to_rounding
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.generation.waits import Waits, counted_waits
from tests.recurrent import recurrent_target
from tests.thinning import slow
from tests.tiny import VOCAB_SIZE, tiny_target

NEW_TOKENS = 16
STATIC: dict[str, Any] = {"cache_implementation": "static", "do_sample": False, "pad_token_id": 0}
QUICK = [("llama", 1), ("gemma3_text", 3)]
CASES = [
    ("llama", 3),
    ("qwen3", 1),
    ("qwen3", 3),
    ("gemma3_text", 1),
    ("gemma2", 3),
    ("gemma4_text", 1),
    ("gemma4_text", 3),
    ("mistral", 1),
    ("mistral", 3),
    ("gpt2", 3),
]


def _compiled(backend: str) -> CompileConfig:
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    # as Transformers' own tests do on a CPU
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize(("family", "num_rows"), [*QUICK, *(slow(*case) for case in CASES)])
def test_text_is_plain_static_generates(family, num_rows):
    """A drafter changes the text that is written over a static cache, or the call is refused."""
    target, inputs = tiny_target(family), ragged_prompts(num_rows)
    plain = target.generate(**inputs, **STATIC, max_new_tokens=NEW_TOKENS)
    for accuracy in (0.7, 0.0):
        drafter = ScriptedDrafter(target, plain, num_padded(inputs), accuracy)
        assisted = target.generate(**inputs, **STATIC, max_new_tokens=NEW_TOKENS, assistant_model=drafter)
        assert torch.equal(assisted, plain)
    assert drafter.last_statistics.num_target_passes == NEW_TOKENS
    # rows that end early stay in the batch
    ends = {**STATIC, "max_new_tokens": NEW_TOKENS, "eos_token_id": [int(plain[0, -9])]}
    plain = target.generate(**inputs, **ends)
    assert torch.equal(target.generate(**inputs, **ends, assistant_model=drafter), plain)


def test_lookups_are_wider_than_drafts():
    """What is looked up does not fit into a pass, or the last of it not into the cache."""
    target = tiny_target("llama")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12] * 4])
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    plain = target.generate(ids, **STATIC, max_new_tokens=40)
    options = {**STATIC, "max_new_tokens": 40, "scheduler": "fixed"}
    assert torch.equal(target.generate(ids, **options, assistant_model=drafter), plain)
    assert drafter.last_statistics.by_source["lookup"].num_verified


@pytest.mark.parametrize("num_rows", [slow(1), 3])
def test_samples_are_those_of_a_dynamic_cache(num_rows):
    """Sampled text follows another distribution over a static cache: the same noise gives other tokens."""
    target, inputs = tiny_target("gemma3_text"), ragged_prompts(num_rows)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    texts = []
    for implementation in (None, "static"):
        torch.manual_seed(3)
        options = {"do_sample": True, "cache_implementation": implementation, "scheduler": "fixed"}
        texts.append(target.generate(**inputs, **options, max_new_tokens=NEW_TOKENS, assistant_model=drafter))
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_returned_cache_is_plain_generates(family):
    """A static cache comes back without the text, or with a rejected draft in it."""
    target, inputs = tiny_target(family), ragged_prompts(3)
    options = {**STATIC, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
    plain = target.generate(**inputs, **options)
    drafter = ScriptedDrafter(target, plain.sequences, num_padded(inputs), 0.7)
    ours = target.generate(**inputs, **options, assistant_model=drafter)
    assert torch.equal(ours.sequences, plain.sequences)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW_TOKENS - 1), value=1).bool()
    for one, other in zip(ours[CACHE_KEY].layers, plain[CACHE_KEY].layers, strict=True):
        assert type(one) is type(other)
        assert int(one.get_seq_length()) == int(other.get_seq_length()) == mask.shape[1]
        held = mask[:, -other.get_max_length() :]
        for states, expected in ((one.keys, other.keys), (one.values, other.values)):
            pair = (x[:, :, : held.shape[1]].transpose(1, 2)[held] for x in (states, expected))
            assert_same_up_to_rounding(*pair)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_state_is_that_of_a_fresh_prefill(family):
    """A rejected draft, or the filling of a pass, leaves a trace in what the target remembers."""
    target, inputs = tiny_target(family), ragged_prompts(3)
    generator = torch.Generator().manual_seed(0)
    config, ids, texts = target.generation_config, inputs["input_ids"], []
    config.max_length = 60
    with torch.no_grad(), TargetAdapter(target, [0]) as adapter:
        kwargs = {CACHE_KEY: StaticCache(config=target.config, max_cache_len=60)}
        kwargs["attention_mask"] = inputs["attention_mask"]
        state = StaticTarget(adapter, ids, config, kwargs, widest=6)
        state.prefill()
        for row, mask in zip(ids, inputs["attention_mask"], strict=True):
            texts.append(row[mask.bool()].tolist())
        where = [layer.store.keys.data_ptr() for layer in state.cache.layers]
        for width in (1, 3, 6, 5, 2, 6, 4):
            tokens = torch.randint(2, 60, (3, width), generator=generator)
            kept = torch.randint(0, width + 1, (3,), generator=generator).tolist()
            target_pass = state.verify(tokens)
            assert target_pass.logits.shape[1] == width
            for row, count in enumerate(kept):
                alone = torch.tensor([texts[row] + tokens[row].tolist()])
                expected = target(alone).logits[0, -width:]
                assert_same_up_to_rounding(target_pass.logits[row], expected)
                texts[row] += tokens[row, :count].tolist()
            state.keep([range(count) for count in kept])
        assert [layer.store.keys.data_ptr() for layer in state.cache.layers] == where


def test_widths_are_few():
    """Passes have as many widths as there are numbers of drafts, and each is compiled."""
    assert [pass_widths(widest) for widest in (1, 2, 6, 8, 20)] == [
        [1], [1, 2], [1, 4, 6], [1, 4, 8], [1, 4, 8, 16, 20]
    ]  # fmt: skip


class _Watch(Scheduler):
    """Verify every draft, and note how many waits there were by the end of each round."""

    def __init__(self, waits: Waits):
        self.waits, self.counts = waits, []

    def start(self, call: CallInfo) -> Schedule:
        return _WatchSchedule(self)


class _WatchSchedule(Schedule):
    def __init__(self, watch: _Watch):
        self._watch = watch

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        return batch.cut(drafted.num_drafts)

    def observe(self, outcome: RoundOutcome) -> None:
        self._watch.counts.append(self._watch.waits.count)


@pytest.mark.parametrize(("do_sample", "num_rows"), [(False, 1), (True, 3), slow(False, 3), slow(True, 1)])
def test_one_wait_a_round(do_sample, num_rows):
    """The host waits for the device more than once a round, and kernels cannot be queued ahead."""
    target, inputs = tiny_target("llama"), ragged_prompts(num_rows)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    options = {**STATIC, "do_sample": do_sample, "assistant_model": drafter, "eos_token_id": VOCAB_SIZE + 1}
    with counted_waits() as waits:
        watch = _Watch(waits)
        target.generate(**inputs, **options, scheduler=watch, max_new_tokens=10)
    steps = [after - before for before, after in zip(watch.counts, watch.counts[1:], strict=False)]
    assert len(steps) > 2
    # on a processor, drawing asks whether there is a distribution at all; an accelerator checks that by itself
    assert set(steps) == {1 + do_sample}


def _graphs(target: Any, inputs: Any, drafter: Any, backend: str, **options: Any) -> tuple[Any, int]:
    """Return the text, and how many graphs were compiled for it."""
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    options = {**STATIC, **options, "compile_config": _compiled(backend)}
    text = target.generate(**inputs, **options, assistant_model=drafter)
    return text, torch._dynamo.utils.counters["stats"]["unique_graphs"] - before


def _count_stores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    make = StaticStore.make
    monkeypatch.setattr(StaticStore, "make", lambda *args: made.append(1) or make(*args))
    return made


def test_shapes_are_compiled_once(monkeypatch):
    """Passes are compiled again as a text grows, a store is made anew, or a block reads other context."""
    torch._dynamo.reset()
    target, inputs = tiny_target("llama"), ragged_prompts(3)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, block_size=1, target_layer_ids=[0])
    options = {"max_new_tokens": 12, "scheduler": "fixed", "drafts": "model"}
    eager = target.generate(**inputs, **STATIC, **options, assistant_model=drafter)
    expected = drafter.last_statistics.rounds
    made = _count_stores(monkeypatch)
    text, num_graphs = _graphs(target, inputs, drafter, "eager", **options)
    assert torch.equal(text, eager)
    # the target's pass, the block, and what reads the pass
    assert num_graphs == 3
    assert len(made) == target.config.num_hidden_layers + 1
    for ours, theirs in zip(drafter.last_statistics.rounds, expected, strict=True):
        if theirs.confidence is not None:
            assert_same_up_to_rounding(ours.confidence, theirs.confidence)
    # in another cache
    text, num_graphs = _graphs(target, inputs, drafter, "eager", **{**options, "max_new_tokens": 30})
    assert torch.equal(text, target.generate(**inputs, **STATIC, max_new_tokens=30))
    assert num_graphs == 0
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "num_rows", "backend"),
    [("llama", 3, "aot_eager"), ("gemma3_text", 3, "eager"), ("qwen3", 1, "inductor")],
)
def test_a_width_is_compiled_once(family, num_rows, backend):
    """A backend changes the text, or a graph reads another text's cache."""
    torch._dynamo.reset()
    target, inputs = tiny_target(family), ragged_prompts(num_rows)
    plain = target.generate(**inputs, **STATIC, max_new_tokens=40)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 1.0)
    text, num_graphs = _graphs(target, inputs, drafter, backend, max_new_tokens=39, num_assistant_tokens=1)
    assert torch.equal(text, plain[:, :-1])
    # an anchor and a draft in every pass
    assert num_graphs == 1
    # another text, rejections, and a last pass without a draft, which is not worth a graph
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.0)
    text, num_graphs = _graphs(target, inputs, drafter, backend, max_new_tokens=7, num_assistant_tokens=1)
    assert torch.equal(text, plain[:, : text.shape[1]])
    assert num_graphs == 0
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "offloaded_static"}, "`cache_implementation` must keep its layers"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "`output_attentions` must be False"),
    ],
)
def test_what_is_refused(options, message):
    """What a static cache cannot serve exactly ends in other text, or deep inside a pass."""
    target = tiny_target("llama", attn_implementation="eager")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    with pytest.raises(ValueError, match=message):
        target.generate(**ragged_prompts(1), **{**STATIC, **options}, max_new_tokens=4, assistant_model=drafter)


@pytest.mark.parametrize("name", ["hybrid", "sliding_window"])
def test_old_names(name):
    """What Transformers still takes for a static cache is refused, or changes the text."""
    target, inputs = tiny_target("gemma3_text"), ragged_prompts(1)
    options = {**STATIC, "cache_implementation": name, "max_new_tokens": 12}
    plain = target.generate(**inputs, **options)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter), plain)


def test_a_static_cache_of_the_users():
    """An empty static cache is refused, or comes back empty; one that holds a text, or is too small, is used up."""
    target, inputs = tiny_target("llama"), ragged_prompts(1)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    cache = StaticCache(config=target.config, max_cache_len=20)
    options = {"max_new_tokens": 8, "do_sample": False, CACHE_KEY: cache}
    plain = target.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter), plain)
    assert int(cache.get_seq_length()) == plain.shape[1] - 1
    with pytest.raises(ValueError, match="must be empty or a dynamic cache"):
        target.generate(plain, **options, assistant_model=drafter)
    options |= {CACHE_KEY: StaticCache(config=target.config, max_cache_len=12)}
    with pytest.raises(ValueError, match=r"must have room for `max_length` - 1 = 18 tokens"):
        target.generate(**inputs, **options, assistant_model=drafter)


def test_states_over_a_static_cache():
    """A recurrent state is taken back in a cache that no way of taking back was made for."""
    target = recurrent_target("qwen3_next")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    with pytest.raises(ValueError, match="`cache_implementation` must be a dynamic cache for this target"):
        target.generate(**ragged_prompts(1), **STATIC, max_new_tokens=4, assistant_model=drafter)


@pytest.mark.slow
def test_lookups_without_a_drafter():
    """Where no hidden states are read, a compiled pass is asked for them, or for none, in vain."""
    torch._dynamo.reset()
    target, ids = tiny_target("llama"), torch.tensor([[5, 6, 7, 8, 9] * 3])
    plain = target.generate(ids, **STATIC, max_new_tokens=6)
    drafter = LookupAssistant(max_drafts=1)
    text, num_graphs = _graphs(target, {"input_ids": ids}, drafter, "eager", max_new_tokens=6)
    assert torch.equal(text, plain)
    assert 1 <= num_graphs <= 2
    torch._dynamo.reset()
