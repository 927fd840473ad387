"""Drafts that branch: a node is scored as behind its ancestors alone, and what is kept is a text like any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from dspark_hf.generation.compat import CACHE_KEY, empty_cache_like
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.cropped import SingleRowTarget
from dspark_hf.generation.targets.ragged import RaggedTarget
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.modeling.deepseek_v4.tiny import tiny_model
from tests.thinning import slow
from tests.tiny import VOCAB_SIZE, tiny_target

# deep trees reach past the tiny window of sliding layers
WIDTH = 18
# GPT-2 has learned positions; Gemma 4 layers that share keys and values
FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gemma4_text", "gpt2", "llama4_text")
# Gemma 2 caps its attention scores, which SDPA cannot
CASES = [
    (family, "sdpa") if family in ("gemma3_text", "gpt2") else slow(family, "sdpa")
    for family in FAMILIES
    if family != "gemma2"
]
CASES += [((family, "eager") if family == "llama" else slow(family, "eager")) for family in FAMILIES]


def _tree(generator: torch.Generator, *, is_deep: bool) -> list[int]:
    """Return random parents."""
    parents = [-1]
    for index in range(1, WIDTH):
        first = max(index - 2, 0) if is_deep else 0
        parents.append(int(torch.randint(first, index, (), generator=generator)))
    return parents


def _path(parents: list[int], node: int) -> list[int]:
    """Return the indices from the anchor to `node`."""
    return [] if node < 0 else [*_path(parents, parents[node]), node]


def _ragged(adapter: TargetAdapter, inputs: dict[str, Tensor], widest: int = WIDTH, cache: Any = None) -> RaggedTarget:
    kwargs = {CACHE_KEY: cache or empty_cache_like(adapter.model), "attention_mask": inputs["attention_mask"]}
    target = RaggedTarget(adapter, inputs["input_ids"], GenerationConfig(), kwargs, widest=widest)
    target.prefill()
    return target


def _assert_equal(own: Tensor, expected: Tensor) -> None:
    # each number comes from sums over some hundreds of products in a handful of layers
    allowed = 512 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    assert float((own - expected).abs().max()) <= allowed


@pytest.mark.parametrize("is_deep", [True, slow(False)])
@pytest.mark.parametrize(("family", "attention"), CASES)
@torch.no_grad()
def test_nodes_and_kept_paths_are_those_of_chains(family, attention, is_deep):
    """A node sees a sibling, stands at a wrong position, or leaves a trace when it is not kept."""
    model = tiny_target(family, attn_implementation=attention)
    inputs = ragged_prompts(4)
    prompts = [inputs["input_ids"][row, skipped:] for row, skipped in enumerate(num_padded(inputs))]
    generator = torch.Generator().manual_seed(int(is_deep))
    with TargetAdapter(model, [0]) as adapter:
        target = _ragged(adapter, inputs)
        # the second tree stands behind what was kept of the first
        for _ in range(2):
            parents = _tree(generator, is_deep=is_deep)
            tokens = torch.randint(2, VOCAB_SIZE, (4, WIDTH), generator=generator)
            target_pass = target.verify(tokens, torch.tensor(parents))
            paths = [_path(parents, node) for node in range(WIDTH)]
            for row, prompt in enumerate(prompts):
                for node, path in enumerate(paths):
                    text = torch.cat([prompt, tokens[row, path]])
                    _assert_equal(target_pass.logits[row, node], model(input_ids=text[None]).logits[0, -1])
                    assert int(target_pass.positions[row, node]) == len(text) - 1
            nodes = torch.randint(0, WIDTH, (4,), generator=generator).tolist()
            # one row keeps nothing
            kept = [paths[node] if row else [] for row, node in enumerate(nodes)]
            target.keep(kept)
            prompts = [torch.cat([prompt, tokens[row, kept[row]]]) for row, prompt in enumerate(prompts)]
            assert target.cache.lengths == [len(prompt) for prompt in prompts]
            _assert_state(model, target, prompts)


def _assert_state(model: Any, target: RaggedTarget, texts: list[Tensor]) -> None:
    cache: Any = target.cache
    for row, text in enumerate(texts):
        fresh = getattr(model(input_ids=text[None], use_cache=True), CACHE_KEY)
        for layer, expected in zip(cache.layers, fresh.layers, strict=True):
            if getattr(expected, "keys", None) is None:
                continue
            # a sliding layer of Transformers kept its window only
            held = expected.keys.shape[2]
            for own, wanted in ((layer.store.keys, expected.keys), (layer.store.values, expected.values)):
                _assert_equal(own[row, :, len(text) - held : len(text)], wanted[0])


@torch.no_grad()
def test_a_chain_written_as_a_tree_is_a_chain():
    """Parents that form a chain, or indices in a list, are treated as a tree and cost its masks."""
    model = tiny_target("llama")
    inputs, tokens = ragged_prompts(3), torch.randint(2, VOCAB_SIZE, (3, 5))
    with TargetAdapter(model, [0]) as adapter:
        one, other = _ragged(adapter, inputs), _ragged(adapter, inputs)
        plain, written = one.verify(tokens), other.verify(tokens, torch.arange(-1, 4))
        assert torch.equal(plain.logits, written.logits)
        one.keep([range(2), range(0), range(5)])
        other.keep([[0, 1], (), [0, 1, 2, 3, 4]])
        assert one.cache.lengths == other.cache.lengths
        assert torch.equal(one.verify(tokens).logits, other.verify(tokens).logits)


@pytest.mark.parametrize("parents", [[-1, 0, 3, 1], [-1, 0, -1, 1], [0, 0, 1, 2], [-1, 0, 1], [-1, 0, 2, 1]])
def test_parents_that_form_no_tree(parents):
    """A loop, a second root or a missing parent gives nonsense instead of an error."""
    model = tiny_target("llama")
    with torch.no_grad(), TargetAdapter(model, [0]) as adapter:
        target = _ragged(adapter, ragged_prompts(2))
        with pytest.raises(ValueError, match="`parents` must be -1 for the first of 4 tokens"):
            target.verify(torch.ones(2, 4, dtype=torch.long), torch.tensor(parents))


@pytest.mark.parametrize("kept", [[0, 2, 3], [1], [0, 1, 2], [0, 1, 4], [0, 0]])
def test_kept_tokens_that_form_no_path(kept):
    """A token is kept without the one that it continues, and the text is not what the target scored."""
    model = tiny_target("llama")
    with torch.no_grad(), TargetAdapter(model, [0]) as adapter:
        target = _ragged(adapter, ragged_prompts(2))
        target.verify(torch.ones(2, 4, dtype=torch.long), torch.tensor([-1, 0, 0, 1]))
        with pytest.raises(ValueError, match="`kept` must lead from the anchor of a pass of 4 tokens"):
            target.keep([range(0), kept])
        target.verify(torch.ones(2, 4, dtype=torch.long))
        with pytest.raises(ValueError, match="`kept` must lead from the anchor of a pass of 4 tokens"):
            target.keep([range(5), range(1)])


def _single(adapter: TargetAdapter, prompt: Tensor, cache: Any = None) -> SingleRowTarget:
    kwargs = {CACHE_KEY: empty_cache_like(adapter.model) if cache is None else cache}
    target = SingleRowTarget(adapter, prompt[None], GenerationConfig(), kwargs)
    target.prefill()
    return target


# Gemma 4 shares layers, and the last ones hold nothing
# the window lies behind the longer prompt
@pytest.mark.parametrize(
    ("family", "prompt_length"),
    [("llama", 3), ("mistral", 29), slow("mistral", 3), slow("gemma2", 29), slow("gemma3_text", 3), ("gemma4_text", 5)]
    + [slow("gpt2", 29)],
)
@torch.no_grad()
def test_one_unpadded_row(family, prompt_length):
    """In Transformers' own cache a node sees a sibling, stands at a wrong position, or leaves a trace."""
    model = tiny_target(family)
    generator = torch.Generator().manual_seed(prompt_length)
    text = torch.randint(2, VOCAB_SIZE, (prompt_length,), generator=generator)
    with TargetAdapter(model, [0]) as adapter:
        target = _single(adapter, text)
        assert target.takes_trees
        for is_deep in (True, False):
            parents = _tree(generator, is_deep=is_deep)
            tokens = torch.randint(2, VOCAB_SIZE, (1, WIDTH), generator=generator)
            target_pass = target.verify(tokens, torch.tensor(parents))
            for node in range(0, WIDTH, 2):
                path = _path(parents, node)
                expected = model(input_ids=torch.cat([text, tokens[0, path]])[None]).logits[0, -1]
                _assert_equal(target_pass.logits[0, node], expected)
                assert int(target_pass.positions[0, node]) == len(text) + len(path) - 1
            kept = _path(parents, int(torch.randint(0, WIDTH, (), generator=generator)))
            target.keep([kept])
            text = torch.cat([text, tokens[0, kept]])
            # a chain goes on from there
            chain = torch.randint(2, VOCAB_SIZE, (1, 4), generator=generator)
            whole = model(input_ids=torch.cat([text, chain[0]])[None])
            _assert_equal(target.verify(chain).logits[0], whole.logits[0, -4:])
            target.keep([range(0)])
        cache = target.returned_cache(text[None])
        fresh = getattr(model(input_ids=text[None], use_cache=True), CACHE_KEY)
        assert cache.get_seq_length() == len(text)
        for own, expected in zip(cache.layers, fresh.layers, strict=True):
            if getattr(expected, "keys", None) is not None:
                _assert_equal(own.keys, expected.keys[:, :, -own.keys.shape[2] :])
                _assert_equal(own.values, expected.values[:, :, -own.keys.shape[2] :])


def test_targets_of_chains_refuse_trees():
    """A target that knows chains only scores a tree as one."""
    tokens, parents = torch.ones(1, 3, dtype=torch.long), torch.tensor([-1, 0, 0])
    # a cache without windows, whose layers do not say what the model sees of them
    plain, own = tiny_target("mistral"), tiny_model()
    inputs = ragged_prompts(1)
    with torch.no_grad(), TargetAdapter(plain, [0]) as adapter:
        single = _single(adapter, inputs["input_ids"][0], DynamicCache())
        assert not single.takes_trees
        assert _ragged(adapter, inputs).takes_trees
        with pytest.raises(ValueError, match="`parents` must describe a chain for one unpadded row"):
            single.verify(tokens, parents)
    with torch.no_grad(), TargetAdapter(own, [0]) as adapter:
        rowwise = _ragged(adapter, inputs, 3, cache=getattr(own(inputs["input_ids"][:, :1]), CACHE_KEY))
        assert not rowwise.takes_trees
        with pytest.raises(ValueError, match="`parents` must describe a chain for DeepseekV4DSparkForCausalLM"):
            rowwise.verify(tokens, parents)


def test_decoding_refuses_a_block_with_parents(monkeypatch):
    """A tree that nobody asked for is accepted as if it were a chain."""
    target = tiny_target("llama")
    inputs = ragged_prompts(2)
    plain = target.generate(**inputs, max_new_tokens=8, do_sample=False)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 1.0)
    start = drafter.start

    def with_parents(adapter, batch_size):
        context = start(adapter, batch_size)
        draft = context.draft

        def draft_tree(*arguments):
            block = draft(*arguments)
            block.parents = torch.zeros(1 + block.num_drafts, dtype=torch.long) - torch.eye(1 + block.num_drafts)[0]
            return block

        context.draft = draft_tree
        return context

    monkeypatch.setattr(drafter, "start", with_parents)
    with pytest.raises(ValueError, match="`parents` of a drafted block must be None where a chain was asked for"):
        target.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=drafter)
