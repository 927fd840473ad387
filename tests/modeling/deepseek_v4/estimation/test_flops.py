"""FLOPs of one decoded token."""

from __future__ import annotations

import pytest

from dspark_hf.modeling.deepseek_v4.estimation.flops import count_flops
from dspark_hf.modeling.deepseek_v4.estimation.reading import model_from_fields, read_model
from tests.modeling.deepseek_v4.estimation.native import TINY_V4

FLASH, PRO, V32 = (f"deepseek-ai/DeepSeek-{name}" for name in ("V4-Flash", "V4-Pro", "V3.2"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (FLASH, {"projections": 10.2, "attention": 23.6, "indexer scores": 90.2, "experts": 15.2, "head": 1.06}),
        (PRO, {"projections": 39.1, "attention": 76.7, "indexer scores": 128.9, "experts": 56.8, "head": 1.85}),
        (V32, {"projections": 24.5, "attention": 34.8, "indexer scores": 1048, "experts": 48.6, "head": 1.85}),
    ],
    ids=str,
)
def test_parts_at_a_million_tokens(name, expected):
    """A part at 2^20 tokens differs from an independent account, in GFLOPs."""
    parts = count_flops(read_model(name).shape, 2**20).parts
    assert {key: part.plain / 1e9 for key, part in parts.items()} == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(("name", "published"), [(FLASH, 0.10), (PRO, 0.27)])
@pytest.mark.parametrize("context", [1_000_000, 2**20])
def test_published_ratios(name, published, context):
    """The FP8 equivalents are more than a percentage point from the technical report, which gives 10% and 27%."""
    ours, theirs = (count_flops(read_model(one).shape, context) for one in (name, V32))
    assert ours.fp8_equivalent / theirs.fp8_equivalent == pytest.approx(published, abs=0.01)


def test_plain_ratios_are_not_the_published_ones():
    """The documentation says that a plain count gives 26% and 12%, and it no longer does."""
    theirs = count_flops(read_model(V32).shape, 2**20).plain
    assert [f"{count_flops(read_model(name).shape, 2**20).plain / theirs:.1%}" for name in (FLASH, PRO)] == [
        "12.1%",
        "26.2%",
    ]


@pytest.mark.parametrize("context", [1, 15, 16, 19, 20, 40, 203])
def test_attention_equals_a_count_by_entry(context):
    """A token attends to more entries than there are, or than it may."""
    shape = model_from_fields("tiny", TINY_V4).shape
    pairs = scored = 0
    for layer in shape.layers:
        pairs += sum(position > context - 1 - 16 for position in range(context))
        complete = [end for end in range(1, context + 1) if layer.compress_rate and end % layer.compress_rate == 0]
        if layer.kind.value == "csa":
            scored += len(complete)
            complete = complete[:5]
        pairs += len(complete)
    parts = count_flops(shape, context).parts
    # 6 heads of size 32, each entry multiplied as key and as value
    assert parts["attention"].plain == pairs * 6 * 32 * 2 * 2
    assert parts["attention"].fp8_equivalent == 2 * parts["attention"].plain
    # 3 heads of size 16
    assert parts["indexer scores"].plain == scored * 3 * 16 * 2
    assert parts["indexer scores"].fp8_equivalent == parts["indexer scores"].plain / 2


def test_only_attention_grows_with_the_context():
    """A projection is counted per token of the context."""
    short, long = (count_flops(read_model(PRO).shape, context).parts for context in (1000, 100_000))
    assert {name for name in short if short[name] != long[name]} == {"attention", "indexer scores"}


def test_a_tied_head_is_computed_all_the_same():
    """A model without a head of its own seems to need no product with it."""
    tied = model_from_fields("tiny", {**TINY_V4, "tie_word_embeddings": True}).shape
    assert count_flops(tied, 10) == count_flops(model_from_fields("tiny", TINY_V4).shape, 10)
