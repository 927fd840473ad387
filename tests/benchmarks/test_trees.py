"""The benchmark of drafts that branch: its trees are the best ones, its chains those of `generate`."""

from __future__ import annotations

from itertools import product
from math import log
from typing import Any

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks import trees as benchmark
from benchmarks.loading import Packaged
from benchmarks.loads import random_prompts
from benchmarks.recordings import CONTEXT
from benchmarks.recordings import record as record_blocks
from benchmarks.trees import Block, Costs, Node, Policy, Text, grow, record, replay
from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.scheduling.costs.table import CostCurves

LENGTH = 24
PROMPTS = random_prompts(2, 6, seed=0)


def _curve(**seconds: float) -> CostCurves:
    return CostCurves({(1, CONTEXT, int(size[1:])): value for size, value in seconds.items()})


COSTS = Costs(_curve(w1=1.0, w24=3.3), _curve(w1=2.0, w24=4.3), 0.5, 0.01, _curve(w1=0.02, w16=0.17))


@pytest.fixture(scope="module")
def target() -> Any:
    """So few tokens that a drafter without training is often right."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def _drafter(target: Any, head: str) -> DSparkAssistantModel:
    torch.manual_seed(1)
    drafter = DSparkAssistantModel.from_target(
        target, num_hidden_layers=1, markov_rank=8, markov_head_type=head, block_size=4, mask_token_id=0
    )
    # a fresh head says hardly anything
    torch.nn.init.normal_(drafter.markov_head.markov_w1.weight)
    torch.nn.init.normal_(drafter.markov_head.markov_w2.weight)
    return drafter


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@torch.no_grad()
def test_trees_hold_the_most_probable_paths(kind, target):
    """A more probable path is left out, or its probability is another one's."""
    drafter = _drafter(target, kind)
    head, base, states = drafter.markov_head, torch.randn(3, 6), torch.randn(3, 32)
    expected = []
    for length in (1, 2, 3):
        for path in product(range(6), repeat=length):
            state, previous, total = head.initial_state(states[:1]), 4, 0.0
            for slot, token in enumerate(path):
                latent, state = head.step(torch.tensor([previous]), states[slot : slot + 1], state)
                total += float((base[slot] + head.project(latent)[0]).log_softmax(-1)[token])
                previous = token
            expected.append((total, path))
    expected.sort(reverse=True)
    found = grow(base, states, 4, head, torch.arange(6), 20)
    assert [path for _, path in found] == [path for _, path in expected[:20]]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected[:20]], abs=1e-4)


def test_chains_are_those_of_generate(target):
    """Chains are drafted from other states, or judged by another part of the text, than in `generate`."""
    drafter = _drafter(target, "vanilla")
    # drafts each token once more, which is sometimes right
    drafter.markov_head.markov_w1.weight.data = torch.eye(6, 8)
    drafter.markov_head.markov_w2.weight.data = 9 * torch.eye(6, 8)
    texts = record(target, drafter, PROMPTS, LENGTH)
    blocks = record_blocks(target, drafter, PROMPTS, LENGTH - 4)
    assert [len(text.blocks) for text in texts] == [LENGTH - 4] * 2
    rights = [
        [max((node.depth for node in one.chain if node.is_right), default=0) for one in text.blocks] for text in texts
    ]
    assert rights == [[one.num_right for one in text.blocks] for text in blocks]
    # the drafter is neither always right nor always wrong
    assert len({count for row in rights for count in row}) > 2


def test_rounds_cost_what_was_measured():
    """A tree pays for a chain, for steps of the head that it does not need, or for drafts that it leaves out."""
    chain = (Node(log(0.6), 1, True), Node(log(0.3), 2, False))
    tree = (chain[0], Node(log(0.4), 1, False), chain[1], Node(log(0.2), 2, True))
    texts = [Text((1, 2), tuple(range(3, 12)), (Block(chain, tree),) * 6)]
    of_chain = replay(texts, Policy(False, 7, 0.0), COSTS, looks_up=False)
    assert (of_chain.tokens, of_chain.rounds, of_chain.seconds) == ([6], [3], [pytest.approx(3 * (0.5 + 1.2))])
    of_tree = replay(texts, Policy(True, 4, 0.0), COSTS, looks_up=False)
    # the head runs once for the anchor, and once for both drafts behind it
    expected = 2 * (0.5 + 2.4 + 0.02 + 0.03 - 2 * 0.01)
    assert (of_tree.tokens, of_tree.rounds, of_tree.seconds) == ([6], [2], [pytest.approx(expected)])
    cut = replay(texts, Policy(True, 4, 0.35), COSTS, looks_up=False)
    assert cut.seconds == [pytest.approx(3 * (0.5 + 2.2 + 0.02 + 0.03 - 2 * 0.01))]
    assert replay(texts, None, COSTS, looks_up=False).seconds == [pytest.approx(6.0)]


def test_repeated_text_is_looked_up():
    """The gain beside lookups is that of the drafter alone."""
    block = Block((Node(-1.0, 1, False),), (Node(-1.0, 1, False),))
    texts = [Text((5, 6, 7, 8) * 4, (5, 6, 7, 8) * 8, (block,) * 16)]
    assert replay(texts, Policy(False, 1, 0.0), COSTS, looks_up=False).rounds == [16]
    assert replay(texts, Policy(False, 1, 0.0), COSTS, looks_up=True).rounds[0] < 4


def test_a_page_is_written(target, tmp_path, monkeypatch):
    """The page misses a set, or the costs of a dtype."""
    packaged = Packaged("A target", target, None, _drafter(target, "vanilla"))
    monkeypatch.setattr(benchmark.loading, "load_packaged", lambda name, dtype: packaged)
    monkeypatch.setattr(benchmark, "make_sets", lambda *args: {"chat": PROMPTS, "copying": PROMPTS})
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    app = typer.Typer()
    app.command()(benchmark.main)
    page = tmp_path / "page.md"
    few = ["--sets", "chat,copying", "--num-prompts", "2", "--length", "24", "--output", str(page)]
    assert CliRunner().invoke(app, few, catch_exceptions=False).exit_code == 0
    text = page.read_text(encoding="utf-8")
    # accepted lengths once, and for the costs of each dtype with and without lookups
    assert text.count("\n| chat |") == text.count("\n| copying |") == 5
    assert "## Costs of bf16" in text and "## Costs of fp32" in text
