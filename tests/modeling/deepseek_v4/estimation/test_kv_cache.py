"""Bytes of KV caches."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_hf.modeling.deepseek_v4.estimation.formats import CacheFormat
from dspark_hf.modeling.deepseek_v4.estimation.kv_cache import (
    count_drafter_cache,
    count_kv_cache,
    v4_entry_bytes,
    v4_index_key_bytes,
    v32_entry_bytes,
    v32_index_key_bytes,
)
from dspark_hf.modeling.deepseek_v4.estimation.reading import model_from_fields, read_model
from tests.modeling.deepseek_v4.estimation.native import TINY_V4

FLASH, PRO, V32 = (f"deepseek-ai/DeepSeek-{name}" for name in ("V4-Flash", "V4-Pro", "V3.2"))


def test_bytes_of_an_entry():
    """An entry has other bytes than the kernels of the releases store."""
    v4, v32 = read_model(PRO).shape, read_model(V32).shape
    # 448 in FP8 with 7 scales, 64 in bf16
    assert v4_entry_bytes(v4, CacheFormat.released) == 448 + 7 + 128
    assert v4_index_key_bytes(v4, CacheFormat.released) == 64 + 4
    assert v4_entry_bytes(v4, CacheFormat.bf16) == 1024
    # 512 in FP8 with 4 fp32 scales, 64 in bf16
    assert v32_entry_bytes(v32, CacheFormat.released) == 656
    assert v32_index_key_bytes(v32, CacheFormat.released) == 132
    assert v32_entry_bytes(v32, CacheFormat.fp32) == 2304


@pytest.mark.parametrize(
    ("name", "mixed", "bf16"), [(FLASH, 3.43, 6.72), (PRO, 4.91, 9.62), (V32, 46.94, 83.875)], ids=str
)
def test_bytes_at_a_million_tokens(name, mixed, bf16):
    """The cache at 2^20 tokens differs from an independent account, which leaves pending tokens out."""
    for cache_format, expected in ((CacheFormat.released, mixed), (CacheFormat.bf16, bf16)):
        cache = count_kv_cache(read_model(name).shape, 2**20, 1, cache_format)
        pending = cache.parts["pending tokens"].num_bytes if name != V32 else 0
        assert (cache.bytes_per_sequence - pending) / 2**30 == pytest.approx(expected, abs=6e-3)
        assert pending < 0.005 * cache.bytes_per_sequence


@pytest.mark.parametrize(("name", "share", "factor"), [(FLASH, "7%", 13.7), (PRO, "10%", 9.5)])
@pytest.mark.parametrize("context", [1_000_000, 2**20])
def test_published_ratios(name, share, factor, context):
    """The cache contradicts the technical report, which gives 7% (13.7x) and 10% (9.5x)."""
    ours, theirs = (
        count_kv_cache(read_model(one).shape, context, 1, CacheFormat.released).num_bytes for one in (name, V32)
    )
    assert f"{ours / theirs:.0%}" == share
    assert theirs / ours == pytest.approx(factor, rel=0.01)


@settings(deadline=None, max_examples=30)
@given(context=st.integers(1, 300))
def test_entries_equal_a_count_by_token(context):
    """An entry is counted before its tokens are there, or a window grows past its size."""
    shape = model_from_fields("tiny", TINY_V4).shape
    windows, entries, keys = 0, {"CSA": 0, "HCA": 0}, 0
    for position in range(context):
        windows += len(shape.layers) if position < shape.sliding_window else 0
        for layer in shape.layers:
            if layer.compress_rate and (position + 1) % layer.compress_rate == 0:
                entries[layer.kind.value.upper()] += 1
                keys += layer.kind.value == "csa"
    cache = count_kv_cache(shape, context, 3, CacheFormat.bf16)
    assert cache.parts["sliding windows"].num_bytes == windows * 32 * 2
    assert cache.parts["CSA entries"].num_bytes == entries["CSA"] * 32 * 2
    assert cache.parts["HCA entries"].num_bytes == entries["HCA"] * 32 * 2
    assert cache.parts["CSA indexer keys"].num_bytes == keys * 16 * 2
    assert cache.num_bytes == 3 * cache.bytes_per_sequence


def test_growth_by_token():
    """What a token adds is not what the cache grows by."""
    shape = read_model(FLASH).shape
    small, large = (count_kv_cache(shape, context, 1, CacheFormat.released) for context in (2**16, 2**17))
    assert large.bytes_per_sequence - small.bytes_per_sequence == small.bytes_per_token * 2**16


def test_drafter_keeps_a_window_per_stage():
    """The drafter's cache grows with the context."""
    shape = read_model(PRO).shape
    for context, kept in ((2**20, 128), (100, 100)):
        cache = count_drafter_cache(shape, shape.drafter, context, 2, CacheFormat.released)
        assert cache.num_bytes == 2 * 3 * kept * 583
