"""The cache of DeepSeek-V4: any rollback equals a fresh prefill."""

from __future__ import annotations

import pytest
import torch

from dspark_hf.modeling.deepseek_v4.cache import DeepseekV4DSparkCache
from dspark_hf.modeling.deepseek_v4.storage import Fp4Codec, Fp8Codec
from tests.closeness import assert_close_mostly
from tests.modeling.deepseek_v4.tiny import VOCAB, tiny_config, tiny_model
from tests.thinning import slow


@pytest.mark.parametrize(
    ("width", "indexer_dtype"), [slow(2, None), slow(5, None), slow(9, None), (16, None), (5, "fp4"), slow(16, "fp4")]
)
@pytest.mark.parametrize("seed", [0, slow(1)])
def test_any_accept_and_reject_pattern(seed, width, indexer_dtype):
    """Rejected drafts leave a trace in the cache, and the text after them is wrong."""
    model = tiny_model(seed, indexer_dtype=indexer_dtype)
    torch.manual_seed(100 + seed)
    text = torch.randint(VOCAB, (3, 66))
    lengths = [7, 1, 20]
    mask = torch.tensor([[column >= 20 - length for column in range(20)] for length in lengths])
    prompt = torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate(lengths):
        prompt[row, 20 - length :] = text[row, :length]
    seen, wanted = [], []
    with torch.no_grad():
        expected = model(text, use_cache=False).logits
        cache = model(prompt, attention_mask=mask).past_key_values
        while max(lengths) + width < text.shape[1]:
            kept = torch.randint(0, width + 1, (3,)).tolist()
            # the first tokens are the text's, the rest are rejected drafts
            drafts = torch.randint(VOCAB, (3, width))
            for row, count in enumerate(kept):
                drafts[row, :count] = text[row, lengths[row] : lengths[row] + count]
            logits = model(drafts, past_key_values=cache).logits
            for row, count in enumerate(kept):
                seen.append(logits[row, :count])
                wanted.append(expected[row, lengths[row] : lengths[row] + count])
            cache.take_back([width - count for count in kept])
            lengths = [length + count for length, count in zip(lengths, kept, strict=True)]
            assert cache.lengths == lengths
    if indexer_dtype is None:
        torch.testing.assert_close(torch.cat(seen), torch.cat(wanted), atol=5e-4, rtol=5e-4)
    else:
        # a key rounded to another value may let a token read another entry
        assert_close_mostly(torch.cat(seen), torch.cat(wanted), 5e-4)


@pytest.mark.parametrize("indexer_dtype", [None, "fp4"])
def test_state_equals_a_fresh_prefill(indexer_dtype):
    """Entries or window after a rollback differ from those of a text that was never longer."""
    model = tiny_model(0, indexer_dtype=indexer_dtype)
    text = torch.randint(VOCAB, (1, 60))
    with torch.no_grad():
        cache = model(text[:, :40]).past_key_values
        for _ in range(4):
            model(torch.randint(VOCAB, (1, 11)), past_key_values=cache)
            cache.take_back([11])
        fresh = model(text[:, :40]).past_key_values
    for layer, expected in zip(cache.layers, fresh.layers, strict=True):
        length = torch.tensor([40])
        near = layer.window.positions(length) > 40 - model.config.sliding_window
        torch.testing.assert_close(layer.window.read()[near], expected.window.read()[near])
        for store, other in ((layer.compressed, expected.compressed), (layer.index, expected.index)):
            if store is not None:
                count = 40 // (4 if layer.index is not None else 8)
                torch.testing.assert_close(store.entries.read(0, count), other.entries.read(0, count))


@pytest.mark.parametrize("seed", [0, slow(1), slow(2), slow(3)])
@pytest.mark.parametrize("indexer_dtype", [slow(None), "fp4"])
def test_rows_that_join_and_leave(seed, indexer_dtype):
    """A row that joins a batch, or stays when others leave, goes on from another state than that of its own text."""
    model = tiny_model(seed, indexer_dtype=indexer_dtype)
    torch.manual_seed(200 + seed)
    text = torch.randint(VOCAB, (6, 90))
    with torch.no_grad():
        expected = model(text, use_cache=False).logits
        rows, lengths, cache = [], [], None
        for newcomer in range(len(text)):
            # none, one or many entries; some rows were longer before
            length = int(torch.randint(1, 45, ()))
            joined = model(text[newcomer : newcomer + 1, :length]).past_key_values
            model(torch.randint(VOCAB, (1, 5)), past_key_values=joined)
            joined.take_back([5])
            rows.append(newcomer)
            lengths.append(length)
            if cache is None:
                cache = joined
            else:
                cache.append_rows(joined)
            for _ in range(2):
                kept = torch.randint(0, 6, (len(rows),)).tolist()
                drafts = torch.randint(VOCAB, (len(rows), 5))
                for index, count in enumerate(kept):
                    drafts[index, :count] = text[rows[index], lengths[index] : lengths[index] + count]
                logits = model(drafts, past_key_values=cache).logits
                for index, count in enumerate(kept):
                    wanted = expected[rows[index], lengths[index] : lengths[index] + count]
                    torch.testing.assert_close(logits[index, :count], wanted, atol=5e-4, rtol=5e-4)
                cache.take_back([5 - count for count in kept])
                lengths = [length + count for length, count in zip(lengths, kept, strict=True)]
            assert cache.lengths == lengths
            staying = torch.randperm(len(rows))[:3]
            cache.select_rows(staying)
            rows, lengths = ([values[index] for index in staying.tolist()] for values in (rows, lengths))
        for index, row in enumerate(rows):
            fresh = model(text[row : row + 1, : lengths[index]]).past_key_values
            _assert_same_state(model, cache, index, fresh, lengths[index])


def _assert_same_state(model, cache, row, fresh, length):
    """Compare what a row may read: its window, its complete entries and the tokens behind them."""
    at = torch.tensor([length])
    for layer, expected in zip(cache.layers, fresh.layers, strict=True):
        near = (layer.window.positions(at) > length - model.config.sliding_window)[0]
        near &= layer.window.positions(at)[0] >= 0
        _assert_close(layer.window.read()[row, near], expected.window.read()[0, near])
        for store, other in ((layer.compressed, expected.compressed), (layer.index, expected.index)):
            if store is None:
                continue
            ratio = 4 if layer.index is not None else 8
            if length >= ratio:
                entries = (which.entries.read(0, length // ratio) for which in (store, other))
                own, wanted = entries
                _assert_close(own[row], wanted[0])
            needed = (store.tail.positions(at) >= max((length // ratio - 1) * ratio, 0))[0]
            _assert_close(store.tail.read()[row, needed], other.tail.read()[0, needed])


def _assert_close(own, wanted):
    torch.testing.assert_close(own, wanted, atol=5e-4, rtol=5e-4)


def test_too_long_a_rollback_is_refused():
    """More tokens are taken back than the rings remember, and the text goes on from a corrupt state."""
    model = tiny_model(0, max_rollback=4)
    with torch.no_grad():
        cache = model(torch.randint(VOCAB, (1, 30))).past_key_values
    cache.crop(-3)
    assert cache.get_seq_length() == 27
    with pytest.raises(ValueError, match="`max_rollback` must be at least the tokens taken back, 5"):
        cache.crop(-2)
    assert cache.lengths == [27]
    with pytest.raises(ValueError, match="`tokens_to_remove` must be 0 or negative"):
        cache.crop(3)


def test_rows_can_be_chosen_and_repeated():
    """A row that stays is mixed up with one that leaves the batch."""
    model = tiny_model(1)
    text = torch.randint(VOCAB, (3, 50))
    with torch.no_grad():
        expected = model(text, use_cache=False).logits
        cache = model(text[:, :33]).past_key_values
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = [2, 2, 0, 0]
        logits = model(text[rows, 33:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[rows, 33:], atol=2e-4, rtol=2e-4)


def test_reset_forgets():
    """A cache that was reset still knows its old text."""
    model = tiny_model(1)
    text = torch.randint(VOCAB, (1, 30))
    with torch.no_grad():
        cache = model(torch.randint(VOCAB, (2, 44))).past_key_values
        cache.reset()
        logits = model(text, past_key_values=cache).logits
        torch.testing.assert_close(logits, model(text).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("indexer_dtype", [None, slow("fp4")])
def test_memory_is_that_of_the_theory(indexer_dtype):
    """The cache holds more than window, entries and tails, for example copies for every head."""
    config = tiny_config(index_head_dim=128, indexer_dtype=indexer_dtype)
    model = tiny_model(2, index_head_dim=128, indexer_dtype=indexer_dtype)
    cache = DeepseekV4DSparkCache(config)
    length = 1600
    with torch.no_grad():
        for _ in range(4):
            model(torch.randint(VOCAB, (1, length // 4)), past_key_values=cache)
    window = 5 * 4 * config.head_dim * (config.sliding_window + config.max_rollback)
    # two numbers a byte, a byte for 32
    key = 64 + 4 if indexer_dtype == "fp4" else 4 * config.index_head_dim
    csa = 2 * (4 * config.head_dim + key) * (length // 4)
    csa += 2 * 4 * 2 * 2 * (config.head_dim + config.index_head_dim) * (2 * 4 + config.max_rollback)
    hca = 4 * config.head_dim * (length // 8) + 4 * 2 * config.head_dim * (8 + config.max_rollback)
    assert cache.num_bytes == pytest.approx(window + csa + hca, rel=0.04)
    for layer in (1, 3):
        entries = cache.store(layer).index.entries
        # room for at most 16 more
        assert 0 <= entries.num_bytes - key * (length // 4) <= 16 * key
        assert entries.num_bytes % key == 0


def test_fp8_storage_is_the_released_format():
    """Stored key/value vectors are rounded otherwise than the released code rounds them."""
    codec = Fp8Codec(64, torch.float32)
    vectors = torch.randn(3, 5, 512) * torch.logspace(-5, 5, 5)[:, None]
    stored = codec.encode(vectors)
    assert [part.dtype for part in stored] == [torch.uint8, torch.uint8, torch.float32]
    assert [part.shape[-1] for part in stored] == [448, 7, 64]
    back = codec.decode(stored)
    torch.testing.assert_close(back[..., 448:], vectors[..., 448:], atol=0, rtol=0)
    groups, rounded = vectors[..., :448].unflatten(-1, (7, 64)), back[..., :448].unflatten(-1, (7, 64))
    # three mantissa bits, or the spacing of the smallest numbers, half a step either way
    scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448)))
    allowed = torch.maximum(groups.abs() / 16, scale * 2.0**-10)
    assert ((groups - rounded).abs() <= allowed * 1.0001).all()
    assert all(torch.equal(a, b) for a, b in zip(codec.encode(back), stored, strict=True)) or torch.equal(
        codec.decode(codec.encode(back)), back
    )


def test_fp4_storage_is_the_released_format():
    """Stored keys of the indexer are rounded otherwise than the released code rounds them, or take more room."""
    codec = Fp4Codec()
    vectors = torch.randn(3, 5, 128) * torch.logspace(-5, 5, 5)[:, None]
    vectors[0, 0] = 0
    stored = codec.encode(vectors)
    assert [part.dtype for part in stored] == [torch.uint8, torch.uint8]
    assert [part.shape[-1] for part in stored] == [64, 4]
    groups, rounded = vectors.unflatten(-1, (4, 32)), codec.decode(stored).unflatten(-1, (4, 32))
    maxima = groups.abs().amax(-1, keepdim=True).clamp_min(6 * 2.0**-126)
    scale = torch.exp2(torch.ceil(torch.log2(maxima.double() / 6)))
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    nearest = (groups.abs().double()[..., None] - scale[..., None] * magnitudes).abs().amin(-1)
    assert torch.equal((groups.double() - rounded.double()).abs(), nearest)
    back = codec.decode(stored)
    assert torch.equal(codec.decode(codec.encode(back)), back)


@pytest.mark.parametrize("size", [2, 16, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp4_rounding_is_what_comes_back(dtype, size):
    """Keys of a text processed at once and those read back from the cache differ, or take no gradient."""
    codec = Fp4Codec()
    vectors = (torch.randn(3, 5, size) * torch.logspace(-5, 5, 5)[:, None]).to(dtype).requires_grad_()
    rounded = codec.round(vectors)
    assert rounded.dtype == dtype
    assert torch.equal(rounded.float(), codec.decode(codec.encode(vectors.detach())))
    rounded.sum().backward()
    assert torch.equal(vectors.grad, torch.ones_like(vectors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_what_comes_back(dtype):
    """A text processed at once and one read back from an 8-bit cache differ."""
    codec = Fp8Codec(64, dtype)
    vectors = (torch.randn(3, 5, 512) * torch.logspace(-5, 5, 5)[:, None]).to(dtype)
    rounded = codec.round(vectors)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, codec.decode(codec.encode(vectors)))
