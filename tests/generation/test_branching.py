"""Drafts of one row that branch: the text is the target's own, whatever tree it is."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.call.rows import CallRows
from dspark_hf.generation.compat import CACHE_KEY, empty_cache_like
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.interface import TargetPass
from dspark_hf.generation.walking import walk
from tests.closeness import assert_same_up_to_rounding
from tests.generation.drafters import ScriptedDrafter, ScriptedTreeDrafter
from tests.generation.frequencies import PrefixDependent
from tests.generation.prompts import ragged_prompts
from tests.recurrent import recurrent_target
from tests.reference.sampling import SMALLEST_P_VALUE, p_value
from tests.thinning import slow
from tests.tiny import tiny_target

NEW_TOKENS = 16
# longer than the tiny window
LENGTH = 13


def _prompt() -> dict[str, Tensor]:
    return ragged_prompts(1, lengths=(LENGTH,))


def _untrained(target: Any, **fields: Any) -> DSparkAssistantModel:
    """Return a drafter that makes every draft itself."""
    options = {"num_hidden_layers": 1, "markov_rank": 8, "block_size": 5, "initializer_range": 0.5}
    drafter = DSparkAssistantModel.from_target(target, **{**options, **fields})
    drafter.scheduler, drafter.drafts = "fixed", "model"
    return drafter


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", slow("qwen3"), slow("gemma2"), slow("gemma3_text"), "gemma4_text", slow("gpt2")],
)
def test_greedy_text_is_token_identical(family):
    """A wrong branch is taken, or what was not taken leaves a trace in the cache or in what the drafter has read."""
    target, inputs = tiny_target(family), _prompt()
    options = {**inputs, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    plain = target.generate(**options)
    for accuracy, num_drafts in ((1.0, 3), (0.0, 9), (0.7, 2), (0.7, 20)):
        drafter = ScriptedTreeDrafter(target, plain, [0], accuracy)
        assert torch.equal(target.generate(**options, assistant_model=drafter, draft_tree=num_drafts), plain)
        statistics = drafter.last_statistics
        assert statistics.num_committed == NEW_TOKENS - 1
        assert (statistics.num_accepted > 0) == (accuracy > 0)
        assert statistics.num_target_passes < NEW_TOKENS or not accuracy
    assert torch.equal(target.generate(**options, assistant_model=_untrained(target), draft_tree=23), plain)


def test_a_tree_goes_further_than_a_chain():
    """Alternatives are drafted and never taken."""
    target, inputs = tiny_target(), _prompt()
    options = {**inputs, "max_new_tokens": NEW_TOKENS, "do_sample": False, "assistant_model": _untrained(target)}
    passes = []
    for num_drafts in (2, 60):
        target.generate(**options, draft_tree=num_drafts)
        statistics = options["assistant_model"].last_statistics
        passes.append(statistics.num_target_passes)
        # a place is tried once a round at most
        assert statistics.verified_by_position[0] <= statistics.num_rounds
        assert sum(statistics.accepted_by_position) == statistics.num_accepted
    assert passes[1] < passes[0]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_cache_is_that_of_the_text(family):
    """A cache that is handed back holds drafts that were not taken, or the tokens of a path in the wrong order."""
    target, inputs = tiny_target(family), _prompt()
    options = {**inputs, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    plain = target.generate(**options)
    for cache in (empty_cache_like(target), DynamicCache()):
        drafter = ScriptedTreeDrafter(target, plain, [0], 0.7)
        output = target.generate(**options, assistant_model=drafter, draft_tree=12, **{CACHE_KEY: cache})
        assert torch.equal(output, plain)
        fresh = getattr(target(input_ids=plain[:, :-1], use_cache=True), CACHE_KEY)
        assert cache.get_seq_length() == plain.shape[1] - 1
        for own, expected in zip(cache.layers, fresh.layers, strict=True):
            length = min(own.keys.shape[2], expected.keys.shape[2])
            assert_same_up_to_rounding(own.keys[:, :, -length:], expected.keys[:, :, -length:])
            assert_same_up_to_rounding(own.values[:, :, -length:], expected.values[:, :, -length:])


def test_the_drafter_reads_what_was_taken(monkeypatch):
    """The drafter is shown hidden states of drafts that were not taken, or at other positions."""
    target, inputs = tiny_target("mistral"), _prompt()
    options = {**inputs, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    plain = target.generate(**options)
    drafter, read = ScriptedTreeDrafter(target, plain, [0], 0.7), []
    start = drafter.start

    def watched(adapter, batch_size):
        context = start(adapter, batch_size)
        context.extend = lambda states, positions, counts: read.append(
            (states[0, : counts[0]], positions[0, : counts[0]])
        )
        return context

    monkeypatch.setattr(drafter, "start", watched)
    target.generate(**options, assistant_model=drafter, draft_tree=12)
    states, positions = (torch.cat(parts) for parts in zip(*read, strict=True))
    with torch.no_grad(), TargetAdapter(target, drafter.target_layer_ids) as adapter:
        target(plain)
        expected = adapter.pop_context_hidden_states()[0]
    # what the last round has left is not read any more
    assert len(states) > LENGTH + 10
    assert positions.tolist() == list(range(len(states)))
    assert_same_up_to_rounding(states, expected[: len(states)])


@pytest.mark.parametrize("said_by", ["configuration", "call"])
def test_a_target_that_gives_its_routers_logits(said_by):
    """The loss that comes with them takes a tree's mask for one of tokens, which ends in an error of PyTorch's."""
    is_set = said_by == "configuration"
    target, inputs = tiny_target("qwen3_moe", output_router_logits=is_set), _prompt()
    options = {**inputs, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {} if is_set else {"output_router_logits": True}
    plain = target.generate(**options)
    drafter = ScriptedTreeDrafter(target, plain, [0], 0.7)
    assert torch.equal(target.generate(**options, assistant_model=drafter, draft_tree=12), plain)
    assert max(drafter.widths) == 12
    assert drafter.last_statistics.num_accepted > 0


PROCESSORS = {
    "repetition": {"repetition_penalty": 1.7},
    "n-grams": {"no_repeat_ngram_size": 2},
    "prefix": {"logits_processor": LogitsProcessorList([PrefixDependent()])},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors(name):
    """A node's scores are processed behind another node's text."""
    target, inputs = tiny_target(), _prompt()
    options = {**inputs, "max_new_tokens": NEW_TOKENS, "do_sample": False, **PROCESSORS[name]}
    plain = target.generate(**options)
    drafter = ScriptedTreeDrafter(target, plain, [0], 0.8)
    assert torch.equal(target.generate(**options, assistant_model=drafter, draft_tree=12), plain)
    assert drafter.last_statistics.num_accepted > 0


def test_an_end_within_a_tree():
    """Drafts behind an end are kept."""
    target, inputs = tiny_target(), _prompt()
    options = {**inputs, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    whole = target.generate(**options)
    options |= {"eos_token_id": int(whole[0, LENGTH + 8]), "pad_token_id": 0, "draft_tree": 12}
    drafter = ScriptedTreeDrafter(target, whole, [0], 1.0)
    output = target.generate(**options, assistant_model=drafter)
    assert torch.equal(output, whole[:, : output.shape[1]])
    assert output.tolist()[0].index(options["eos_token_id"], LENGTH) == output.shape[1] - 1
    assert drafter.last_statistics.num_accepted > 0


def test_outputs_are_those_of_the_text():
    """Scores, logits and hidden states come in the order of the pass, and not of the text."""
    target, inputs = tiny_target(), _prompt()
    wanted = {f"output_{name}": True for name in ("scores", "logits", "hidden_states")}
    options = {**inputs, "max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, **wanted}
    plain = target.generate(**options)
    drafter = ScriptedTreeDrafter(target, plain.sequences, [0], 0.7)
    output = target.generate(**options, assistant_model=drafter, draft_tree=12)
    assert torch.equal(output.sequences, plain.sequences)
    for name in ("scores", "logits"):
        assert_same_up_to_rounding(torch.stack(output[name]), torch.stack(plain[name]))
    for own, expected in zip(output.hidden_states, plain.hidden_states, strict=True):
        assert_same_up_to_rounding(torch.cat(own), torch.cat(expected))


@pytest.mark.parametrize("rule", ["block", "invariant"])
def test_sampled_text_depends_on_no_tree(rule):
    """A tree decides what is drawn: with the same random numbers another one leads to another text."""
    target, inputs = tiny_target(initializer_range=0.2), _prompt()
    options = {**inputs, "max_new_tokens": NEW_TOKENS, "do_sample": True, "top_k": 0, "sampling": rule}
    texts = []
    for num_drafts, seed in ((2, 1), (9, 2), (60, 4)):
        torch.manual_seed(seed)
        drafter = _untrained(target)
        torch.manual_seed(0)
        texts.append(target.generate(**options, assistant_model=drafter, draft_tree=num_drafts))
        assert drafter.last_statistics.num_verified > 0
    assert drafter.last_statistics.num_accepted > 0
    if rule == "invariant":
        # chains draw by the same noise
        torch.manual_seed(0)
        texts.append(target.generate(**options, assistant_model=drafter))
    assert all(torch.equal(text, texts[0]) for text in texts)
    torch.manual_seed(1)
    assert not torch.equal(target.generate(**options, assistant_model=drafter, draft_tree=9), texts[0])


# two alternatives behind the anchor, and behind the first of them; V = 4
PARENTS, TOKENS = (-1, 0, 0, 1, 1, 2), (0, 3, 1, 2, 0, 1)
NUM_WALKS, NUM_TOKENS = 2000, 4


def _rows(**options: Any) -> CallRows:
    return CallRows(
        torch.tensor([[1]]),
        GenerationConfig(do_sample=True),
        LogitsProcessorList(),
        StoppingCriteriaList(),
        None,
        num_drafts=3,
        returns_cache=False,
        **options,
    )


def _pass() -> TargetPass:
    logits = torch.randn(1, len(TOKENS), NUM_TOKENS, generator=torch.Generator().manual_seed(5))
    nothing = torch.zeros(1, len(TOKENS), 0)
    return TargetPass(logits, nothing, torch.zeros(1, len(TOKENS), dtype=torch.long), [len(TOKENS)])


def _by_the_equations(probs: Tensor) -> Tensor:
    """Return the chance of every two tokens behind the anchor, 4 standing for none where the first is no draft."""
    chances = torch.zeros(NUM_TOKENS, NUM_TOKENS + 1, dtype=torch.float64)
    for first, second in product(range(NUM_TOKENS), repeat=2):
        node = {3: 1, 1: 2}.get(first)
        if node is None:
            chances[first, NUM_TOKENS] = probs[0, first]
        else:
            chances[first, second] = probs[0, first] * probs[node, second]
    return chances


def test_frequencies_of_walks():
    """A walk prefers what was drafted, or draws a rejected token's successor from another node's distribution."""
    torch.manual_seed(3)
    rows, target_pass = _rows(), _pass()
    tokens, parents = torch.tensor([TOKENS]), torch.tensor(PARENTS)
    probs = target_pass.logits[0].double().softmax(-1)
    expected, seen, greedy_about_drafts = _by_the_equations(probs), [], []
    for _ in range(NUM_WALKS):
        found = walk(rows, target_pass, tokens, parents)
        text = [*tokens[0, found.path[1:]].tolist(), int(found.bonus), NUM_TOKENS]
        seen.append(text[:2])
        assert [PARENTS[node] for node in found.path] == [-1, *found.path[:-1]]
        assert torch.equal(found.scores, target_pass.logits[:, found.path])
        # the first draft wherever one of the two is drawn
        greedy_about_drafts.append([3, text[1]] if text[0] == 1 else text[:2])
    assert p_value(torch.tensor(seen), expected) > SMALLEST_P_VALUE
    assert p_value(torch.tensor(greedy_about_drafts), expected) < SMALLEST_P_VALUE


def test_places_that_were_tried():
    """Positions are counted where there was no draft to accept."""
    rows, tokens, parents = _rows(is_invariant=True), torch.tensor([TOKENS]), torch.tensor(PARENTS)
    for wanted, tried in (((2, 0), 1), ((3, 1), 2), ((3, 2), 2), ((1, 1), 2)):
        logits = torch.full((1, len(TOKENS), NUM_TOKENS), -1e4)
        logits[0, 0, wanted[0]] = 1e4
        logits[0, 1:3, wanted[1]] = 1e4
        logits[0, 3:, 0] = 1e4
        found = walk(rows, replace(_pass(), logits=logits), tokens, parents)
        assert found.num_tried == tried, wanted


@pytest.mark.parametrize(
    "case", ["rows", "a processor that remembers", "a static cache", "a drafter of chains", "a recurrent target"]
)
def test_chains_where_trees_do_not_go(case):
    """A tree is drafted where it cannot be verified exactly, and the call ends in an error or in another text."""
    target = recurrent_target("lfm2") if case == "a recurrent target" else tiny_target()
    options: dict[str, Any] = {**_prompt(), "max_new_tokens": 10, "do_sample": False}
    if case == "rows":
        options |= ragged_prompts(2)
    elif case == "a static cache":
        options["cache_implementation"] = "static"
    elif case == "a processor that remembers":
        # what a user wrote makes no promise
        options["logits_processor"] = LogitsProcessorList([lambda ids, scores: scores.roll(1, -1)])
    plain = target.generate(**options)
    kind = ScriptedDrafter if case == "a drafter of chains" else ScriptedTreeDrafter
    drafter = kind(target, plain, [0, 8], 0.7)
    assert torch.equal(target.generate(**options, assistant_model=drafter, draft_tree=12), plain)
    # of a tree all drafts are verified
    assert max(drafter.widths) <= drafter.block_size


def test_the_knob_and_its_typos():
    """A typo switches trees off without a word, or a configuration's word does not count."""
    target, inputs = tiny_target(), _prompt()
    options = {**inputs, "max_new_tokens": 12, "do_sample": False}
    plain = target.generate(**options)
    drafter = ScriptedTreeDrafter(target, plain, [0], 0.7)
    for value in ("of", "on", 1, 64, True, 7.5):
        with pytest.raises(ValueError, match="`draft_tree` must be one of auto, off, or a number of drafts in"):
            target.generate(**options, assistant_model=drafter, draft_tree=value)
    with pytest.raises(ValueError, match="Did you mean 'draft_tree'"):
        target.generate(**options, assistant_model=drafter, generation_config=GenerationConfig(draft_trees=9))
    with pytest.raises(ValueError, match="`draft_tree` must be left out unless a DSpark drafter assists"):
        target.generate(**options, draft_tree=9)
    assert not drafter.widths
    through_configuration = {**options, "generation_config": GenerationConfig(draft_tree=20)}
    assert torch.equal(target.generate(**through_configuration, assistant_model=drafter), plain)
    assert max(drafter.widths) == 20
    drafter.widths.clear()
    assert torch.equal(target.generate(**through_configuration, assistant_model=drafter, draft_tree="off"), plain)
    assert max(drafter.widths) <= drafter.block_size
    own = _untrained(target)
    assert torch.equal(target.generate(**options, custom_generate=own.decode, draft_tree=9), plain)
    assert own.last_statistics.num_verified > own.block_size * own.last_statistics.num_rounds
