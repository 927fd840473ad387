"""The table of training's throughput."""

from __future__ import annotations

import pytest
import torch

import benchmarks.training as benchmark
from dspark_hf.training.conversations import Conversation
from tests.tiny import tiny_target

T = 40


def test_products_are_those_of_a_round() -> None:
    """A rate is said to be the most that could be, with the target's pass or the backward one left out."""
    target = tiny_target("qwen3")
    texts = [Conversation(torch.arange(T) % 50, torch.arange(T) >= 10)]
    kept = benchmark._trainer(target, texts, 1, {}, True)
    benchmark._round(kept)
    with_states = benchmark._products(kept)
    drafter = kept.accelerator.unwrap_model(kept.model)
    slots = 7 * benchmark._num_blocks(texts[0], kept.args.num_anchors)
    layers = sum(one.numel() for one in drafter.layers.parameters() if one.ndim == 2)
    # forward, and twice that backward; blocks at the text's end have fewer slots that count, but all are computed
    assert with_states >= 3 * 2 * layers * slots
    with_target = benchmark._products(benchmark._trainer(target, texts, 1, {}, False))
    linears = sum(one.numel() for one in target.model.layers.parameters() if one.ndim == 2)
    head = target.get_output_embeddings().weight.numel()
    # attention's products come on top
    least = 2 * T * (linears + head)
    assert least <= with_target - with_states <= 1.5 * least


def test_the_page_tells_how_near_the_limit_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant is measured against the products of another one, or the warming round counts."""
    monkeypatch.setattr(benchmark, "describe_run", list)
    seconds = {name: [4.0 / (number + 1)] * 2 for number, name in enumerate(benchmark.VARIANTS)}
    page = benchmark._page(seconds, 100, {True: 1e9, False: 2e9}, 200e9, layers=2)
    assert page[-4:] == [
        "| eager | 25 | 1.00 | 1.00 | 200 | 12% |",
        "| compiled loss | 50 | 2.00 | 1.00 | 200 | 25% |",
        "| compiled loss and drafter | 75 | 3.00 | 1.00 | 200 | 38% |",
        "| compiled, states computed | 100 | 4.00 | 2.00 | 100 | 100% |",
    ]
