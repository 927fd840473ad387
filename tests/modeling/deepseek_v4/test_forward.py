"""The fast DeepSeek-V4 against the oracle, and ways to process a text that must agree."""

from __future__ import annotations

import pytest
import torch

from dspark_hf.modeling.deepseek_v4.indexer import choose_entries, hadamard, rotate_and_round
from tests.closeness import assert_close_mostly
from tests.modeling.deepseek_v4.tiny import VOCAB, official_weights, oracle_settings, tiny_config, tiny_model
from tests.reference.deepseek_v4 import fake_quantise_index, forward, hadamard_rotate
from tests.thinning import slow

CHANGES = [
    slow({}),
    slow({"rope_scaling": None}),
    slow({"cache_dtype": "fp8"}),
    slow({"indexer_dtype": "fp4"}),
    {"indexer_dtype": "fp4", "cache_dtype": "fp8"},
    slow({"indexer_dtype": "fp4", "cache_dtype": "fp8", "index_head_dim": 64, "index_topk": 3}),
    {"norm_topk_prob": False, "swiglu_limit": 0.5, "hc_sinkhorn_iters": 20},
    {"compress_ratios": [8, 4, 4, 8, 4], "num_hash_layers": 0, "index_topk": 3, "sliding_window": 5},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(change) or "plain")
def test_equals_the_oracle(change, monkeypatch):
    """Some equation of the model is not the released one: text comes out wrong on real weights."""
    model = tiny_model(1, **change)
    token_ids = torch.randint(VOCAB, (1, 45))
    chosen = []

    def record(*arguments):
        index, is_visible = choose_entries(*arguments)
        chosen.extend(row[seen].tolist() for row, seen in zip(index[0], is_visible[0], strict=True))
        return index, is_visible

    monkeypatch.setattr("dspark_hf.modeling.deepseek_v4.attention.choose_entries", record)
    with torch.no_grad():
        outputs = model(token_ids, use_cache=False, output_hidden_states=True)
    expected = forward(
        official_weights(model),
        oracle_settings(model.config),
        token_ids[0].tolist(),
        kv_fake_quant=model.config.cache_dtype == "fp8",
    )
    assert chosen == [sorted(entries) for layer in expected.chosen_entries.values() for entries in layer]
    # fp32 against fp64, through five layers; of what is rounded to 8 bits, some is rounded to the other side
    tolerance, largest = (2e-4, 2e-4) if model.config.cache_dtype is None else (5e-3, 3e-2)
    for layer, streams in enumerate(expected.layer_outputs):
        ours = outputs.hidden_states[layer + 1][0].flatten(1)
        assert_close_mostly(ours, streams.flatten(1), tolerance, largest)
    assert_close_mostly(outputs.logits[0], expected.logits, tolerance, largest)


@pytest.mark.parametrize(("cache_dtype", "indexer_dtype"), [(None, None), slow("fp8", None), (None, "fp4")])
@pytest.mark.parametrize("steps", [slow([1] * 60), slow([6] * 10), slow([17, 17, 17, 9]), [3, 41, *[1] * 12, 4]])
def test_pieces_equal_the_whole(steps, cache_dtype, indexer_dtype):
    """A text processed in pieces through the cache differs from one processed at once."""
    model = tiny_model(2, cache_dtype=cache_dtype, indexer_dtype=indexer_dtype)
    token_ids = torch.randint(VOCAB, (2, 60))
    with torch.no_grad():
        whole = model(token_ids, use_cache=False).logits
        cache, pieces = None, []
        for piece in token_ids.split(steps, dim=1):
            outputs = model(piece, past_key_values=cache)
            cache = outputs.past_key_values
            pieces.append(outputs.logits)
    pieces = torch.cat(pieces, dim=1)
    if indexer_dtype is not None:
        # a key rounded to another value may let a token read another entry
        assert_close_mostly(pieces, whole, 2e-4)
    else:
        # a difference in the last bit may fall to the other side of an 8-bit rounding
        tolerance = 2e-4 if cache_dtype is None else 3e-2
        torch.testing.assert_close(pieces, whole, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("pads", [slow((0, 13)), (16, 5), (0, 39)])
def test_padding_changes_nothing(pads):
    """A row is disturbed by padding, its own or its neighbours'."""
    model = tiny_model(3)
    width = 40
    rows = [torch.randint(VOCAB, (1, width - pad)) for pad in pads]
    # what stands in a padded column must not matter
    token_ids = torch.randint(VOCAB, (2, width + 6))
    mask = torch.ones_like(token_ids)
    for row, pad in enumerate(pads):
        token_ids[row, pad:width] = rows[row]
        mask[row, :pad] = 0
    with torch.no_grad():
        first = model(token_ids[:, :width], attention_mask=mask[:, :width])
        second = model(token_ids[:, width:], attention_mask=mask, past_key_values=first.past_key_values)
        for row, pad in enumerate(pads):
            single = model(token_ids[row : row + 1, pad:]).logits[0]
            together = torch.cat([first.logits[row, pad:], second.logits[row]])
            torch.testing.assert_close(together, single, atol=1e-4, rtol=1e-4)


def test_long_prompts_in_blocks(monkeypatch):
    """Queries taken in small blocks see something else than in one."""
    model = tiny_model(4)
    token_ids = torch.randint(VOCAB, (2, 70))
    with torch.no_grad():
        expected = model(token_ids).logits
        monkeypatch.setattr("dspark_hf.modeling.deepseek_v4.attention._MAX_BLOCK", 20_000)
        monkeypatch.setattr("dspark_hf.modeling.deepseek_v4.indexer._MAX_SCORES", 1_000)
        torch.testing.assert_close(model(token_ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_entries_that_tie():
    """Equal index scores are broken by chance: the same text gives other tokens in another batch or width."""
    scores = torch.tensor([[[1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0]]])
    chosen, is_visible = choose_entries(scores, torch.tensor([[6]]), 4)
    assert chosen.tolist() == [[[0, 1, 2, 3]]]
    assert is_visible.all()
    chosen, is_visible = choose_entries(scores, torch.tensor([[2]]), 4)
    assert chosen[is_visible].tolist() == [0, 1]


@pytest.mark.parametrize("num_values", [2, 5, 1_000_000])
def test_chosen_entries_are_those_of_a_stable_sort(num_values):
    """The indexer passes over a better entry, or over an earlier one that is as good."""
    torch.manual_seed(num_values)
    scores = torch.randint(num_values, (3, 11, 40)).float()
    num_visible = torch.randint(41, (3, 11))
    chosen, is_visible = choose_entries(scores, num_visible, 7)
    assert torch.equal(is_visible, chosen < num_visible[..., None])
    for row, token in torch.cartesian_prod(torch.arange(3), torch.arange(11)).tolist():
        seen = scores[row, token, : num_visible[row, token]]
        expected = seen.sort(descending=True, stable=True).indices[:7].sort().values
        assert torch.equal(chosen[row, token][is_visible[row, token]], expected)


@pytest.mark.parametrize("size", [2, 16, 128])
def test_rotation_of_the_indexer(size):
    """The indexer's vectors are rotated otherwise than released, and round to other keys."""
    vectors = torch.randn(7, size)
    expected = torch.stack([hadamard_rotate(vector.double()) for vector in vectors])
    torch.testing.assert_close(hadamard(vectors).double(), expected, atol=1e-5, rtol=1e-5)
    assert hadamard(vectors.bfloat16()).dtype == torch.bfloat16
    # a vector's result does not depend on its neighbours, bit for bit
    assert torch.equal(hadamard(vectors)[3], hadamard(vectors[3]))
    expected = torch.stack([fake_quantise_index(vector.double()) for vector in vectors])
    assert torch.equal(rotate_and_round(vectors).double(), expected)


def test_rotation_alone_changes_no_score(monkeypatch):
    """What the rotation adds is more than a better rounding: queries and keys are turned differently."""
    token_ids = torch.randint(VOCAB, (2, 60))
    with torch.no_grad():
        expected = tiny_model(1)(token_ids).logits
        rounded = tiny_model(1, indexer_dtype="fp4")(token_ids).logits
        monkeypatch.setattr("dspark_hf.modeling.deepseek_v4.indexer.rotate_and_round", hadamard)
        rotated = tiny_model(1, indexer_dtype="fp4")(token_ids, use_cache=False).logits
    torch.testing.assert_close(rotated, expected, atol=1e-4, rtol=1e-4)
    # the rounding chooses other entries
    assert (rounded - expected).abs().max() > 0.01


def test_ties_do_not_depend_on_the_width():
    """With few index heads many scores are exactly zero, and a verify pass reads other entries than plain decoding."""
    model = tiny_model(5, index_n_heads=1, index_topk=4)
    token_ids = torch.randint(VOCAB, (1, 80))
    with torch.no_grad():
        whole = model(token_ids, use_cache=False).logits
        cache, pieces = None, []
        for piece in token_ids.split([30] + [1] * 14 + [6] * 6, dim=1):
            outputs = model(piece, past_key_values=cache)
            cache = outputs.past_key_values
            pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_embeddings_instead_of_tokens():
    """Embeddings alone are taken although the first layers need the tokens, or both together fail."""
    model = tiny_model(6)
    token_ids = torch.randint(VOCAB, (1, 9))
    embeds = model.get_input_embeddings()(token_ids)
    with torch.no_grad():
        with pytest.raises(ValueError, match="`input_ids` must be given"):
            model(inputs_embeds=embeds)
        both = model(token_ids, inputs_embeds=embeds).logits
        torch.testing.assert_close(both, model(token_ids).logits, atol=1e-4, rtol=1e-4)
        hashless = tiny_model(6, num_hash_layers=0)
        embeds = hashless.get_input_embeddings()(token_ids)
        expected = hashless(token_ids).logits
        torch.testing.assert_close(hashless(inputs_embeds=embeds).logits, expected, atol=1e-4, rtol=1e-4)


def test_bad_input_is_named():
    """A mask or cache of the wrong form is taken, and corrupts the text."""
    model = tiny_model(7)
    token_ids = torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        with pytest.raises(ValueError, match="`attention_mask` must have the shape"):
            model(token_ids, attention_mask=torch.ones(2, 12))
        cache = model(token_ids).past_key_values
        with pytest.raises(ValueError, match="must hold as many rows"):
            model(token_ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="`compress_ratios` must name a ratio"):
        tiny_config(compress_ratios=[0, 4])
    with pytest.raises(ValueError, match="`indexer_dtype` must be None or 'fp4', got 'fp8'"):
        tiny_config(indexer_dtype="fp8")
    with pytest.raises(ValueError, match="`index_head_dim` must be a power of two, .* got 24. Correct it"):
        tiny_config(indexer_dtype="fp4", index_head_dim=24)
    assert tiny_config(index_head_dim=24).index_head_dim == 24


def test_dtypes_of_the_released_code():
    """A bf16 model routes, mixes, compresses or scores tokens in bf16, and picks other experts and tokens."""
    model = tiny_model(8).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("hc_", "attn_sink", "gate", "compressor", "head")) and "tid2eid" not in name:
            parameter.data = parameter.data.float()
    token_ids = torch.randint(VOCAB, (1, 30))
    with torch.no_grad():
        outputs = model(token_ids, output_hidden_states=True, output_router_logits=True)
    assert outputs.logits.dtype == torch.float32
    assert {affinity.dtype for affinity in outputs.router_logits} == {torch.float32}
    assert {streams.dtype for streams in outputs.hidden_states} == {torch.bfloat16}
    assert torch.isfinite(outputs.logits).all()
