"""The fused objective equals the slow one, gradients included, and keeps its memory small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dspark_hf.training.losses import DraftLosses, LossWeights, Slots, TargetHead, cooled, draft_losses, slot_weights
from tests.reference.objective import OracleLosses, OracleSlot, objective

VOCAB_SIZE, HIDDEN_SIZE, RANK = 23, 8, 5
NUM_BLOCKS, BLOCK_SIZE, NUM_TOKENS = 4, 3, 6


@dataclass
class Problem:
    """A random problem: the full head, the proposable tokens and what the drafter computed."""

    weight: Tensor
    bias: Tensor | None
    factor: float
    cap: float | None
    draft_ids: list[int]
    hidden_states: Tensor
    latents: Tensor | None
    markov_weight: Tensor | None
    confidence_logits: Tensor | None
    target_states: Tensor
    target_rows: Tensor
    true_ids: Tensor
    valid: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """Return what has a gradient."""
        names = ("hidden_states", "latents", "markov_weight", "confidence_logits")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _problem(
    *,
    bias: bool = False,
    factor: float = 1.0,
    cap: float | None = None,
    reduced: bool = False,
    markov: bool = True,
    confidence: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    num_slots = NUM_BLOCKS * BLOCK_SIZE
    draft_ids = [0, 2, 3, 7, 11, 12, 22] if reduced else list(range(VOCAB_SIZE))

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    return Problem(
        weight=torch.randn(VOCAB_SIZE, HIDDEN_SIZE).to(dtype),
        bias=torch.randn(VOCAB_SIZE).to(dtype) if bias else None,
        factor=factor,
        cap=cap,
        draft_ids=draft_ids,
        hidden_states=leaf(num_slots, HIDDEN_SIZE),
        latents=leaf(num_slots, RANK) if markov else None,
        markov_weight=leaf(len(draft_ids), RANK) if markov else None,
        confidence_logits=leaf(num_slots) if confidence else None,
        target_states=torch.randn(NUM_TOKENS, HIDDEN_SIZE).to(dtype),
        # rows repeat within a chunk, as they do where blocks overlap
        target_rows=torch.randint(NUM_TOKENS, (num_slots,)),
        true_ids=torch.randint(VOCAB_SIZE, (num_slots,)),
        valid=torch.rand(NUM_BLOCKS, BLOCK_SIZE).lt(0.7).long().cumprod(-1).bool(),
    )


def _fused(problem: Problem, weights: LossWeights, chunk_size: int = 5, *, temperature: float = 1.0) -> DraftLosses:
    ids = torch.tensor(problem.draft_ids)
    whole = TargetHead(problem.weight, problem.bias, problem.factor, problem.cap)
    head = TargetHead(
        problem.weight[ids], None if problem.bias is None else problem.bias[ids], problem.factor, problem.cap
    )
    to_draft_id = torch.full((VOCAB_SIZE,), -1)
    to_draft_id[ids] = torch.arange(len(ids))
    slots = Slots(
        labels=to_draft_id[problem.true_ids],
        target_rows=problem.target_rows,
        target_states=problem.target_states,
        target_lse=cooled(whole.logits(problem.target_states), temperature).logsumexp(-1),
        weights=slot_weights(problem.valid, weights.decay).flatten(),
    )
    return draft_losses(
        problem.hidden_states,
        problem.latents,
        problem.markov_weight,
        problem.confidence_logits,
        head,
        slots,
        weights,
        temperature=temperature,
        chunk_size=chunk_size,
    )


def _logits(problem: Problem, states: Tensor) -> Tensor:
    logits = problem.weight.double() @ states
    if problem.bias is not None:
        logits = logits + problem.bias.double()
    logits = logits * problem.factor
    return logits if problem.cap is None else problem.cap * torch.tanh(logits / problem.cap)


def _slow(problem: Problem, leaves: dict[str, Tensor], weights: LossWeights, temperature: float = 1.0) -> OracleLosses:
    draft_logits, slots = [], []
    for index in range(NUM_BLOCKS * BLOCK_SIZE):
        logits = _logits(problem, leaves["hidden_states"][index])[problem.draft_ids]
        if problem.latents is not None:
            logits = logits + leaves["markov_weight"] @ leaves["latents"][index]
        draft_logits.append(logits / temperature)
        block, k = divmod(index, BLOCK_SIZE)
        believed = _logits(problem, problem.target_states[problem.target_rows[index]].double())
        slots.append(
            OracleSlot(k, bool(problem.valid[block, k]), int(problem.true_ids[index]), believed / temperature)
        )
    confidence = None if problem.confidence_logits is None else list(leaves["confidence_logits"])
    return objective(
        draft_logits,
        confidence,
        slots,
        problem.draft_ids,
        ce=weights.ce,
        tv=weights.tv,
        confidence=weights.confidence,
        decay=weights.decay,
    )


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "factor": {"factor": 0.25},
    "soft cap": {"cap": 3.0},
    "reduced vocabulary": {"reduced": True},
    "no Markov head": {"markov": False},
    "no confidence head": {"confidence": False},
    "all at once": {"bias": True, "factor": 0.5, "cap": 2.0, "reduced": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(
    "weights",
    [LossWeights(), LossWeights(ce=1.0, tv=0.0, confidence=0.0), LossWeights(ce=0.0, tv=1.0, decay=2.0)],
    ids=["paper", "cross-entropy", "distance"],
)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_equals_the_equations(case: dict[str, Any], weights: LossWeights, temperature: float) -> None:
    """Drafters would be trained towards something else than the paper's objective, or for another temperature."""
    problem = _problem(**case)
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in problem.leaves().items()}
    fused = _fused(problem, weights, temperature=temperature)
    slow = _slow(problem, leaves, weights, temperature)
    torch.testing.assert_close(fused.total.double(), slow.total, atol=1e-5, rtol=1e-5)
    for ours, theirs in (
        (fused.cross_entropy, slow.cross_entropy),
        (fused.distance, slow.distance),
        (fused.accept_rate, slow.accept_rate),
    ):
        torch.testing.assert_close(ours.double(), torch.tensor(theirs, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    # a factor on the objective must reach the gradients
    (3 * fused.total).backward()
    (3 * slow.total).backward()
    for name, leaf in problem.leaves().items():
        torch.testing.assert_close(leaf.grad.double(), leaves[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_chunk_size_is_only_memory() -> None:
    """Another chunk size would train another drafter."""
    results = []
    for chunk_size in (1, 5, 12, 100):
        torch.manual_seed(0)
        problem = _problem(reduced=True, cap=3.0)
        losses = _fused(problem, LossWeights(), chunk_size)
        losses.total.backward()
        results.append([losses.total.detach(), losses.distance, *[leaf.grad for leaf in problem.leaves().values()]])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_bf16_stays_close() -> None:
    """Training in bf16 would follow other gradients, not rounded ones."""
    torch.manual_seed(0)
    exact = _problem()
    torch.manual_seed(0)
    rounded = _problem(dtype=torch.bfloat16)
    losses = [_fused(problem, LossWeights()) for problem in (exact, rounded)]
    for loss in losses:
        loss.total.backward()
    assert losses[1].distance.dtype == torch.float32
    torch.testing.assert_close(losses[0].total, losses[1].total, atol=0.02, rtol=0.02)
    for ours, theirs in zip(rounded.leaves().values(), exact.leaves().values(), strict=True):
        similarity = torch.cosine_similarity(ours.grad.flatten().float(), theirs.grad.flatten(), dim=0)
        assert similarity > 0.99


@pytest.mark.parametrize("reduced", [False, True])
def test_confidence_of_greedy_decoding_is_whether_both_say_the_same(reduced: bool) -> None:
    """A head that is trained for greedy decoding learns how often sampled drafts are accepted."""
    problem = _problem(reduced=reduced, dtype=torch.bfloat16)
    drafted = _fused(problem, LossWeights(), temperature=0.0)
    weight = problem.weight.float()
    believed = (problem.target_states.float() @ weight.T)[problem.target_rows].argmax(-1)
    draft_logits = (problem.hidden_states @ problem.weight.T)[:, problem.draft_ids].float()
    assert problem.latents is not None and problem.markov_weight is not None
    draft_logits = draft_logits + (problem.latents @ problem.markov_weight.T).float()
    draft = torch.tensor(problem.draft_ids)[draft_logits.argmax(-1)]
    # two logits that round to the same number share the chance
    top = draft_logits.topk(2).values
    clear = top[:, 0] - top[:, 1] > 0.02
    assert clear.sum() > 8
    torch.testing.assert_close(drafted.accept_rate[clear], (draft == believed)[clear].float(), atol=1e-3, rtol=0)


def test_confidence_does_not_move_the_drafts() -> None:
    """The backbone would learn to be easy to judge: the label of the confidence must be a constant."""
    problem = _problem()
    weights = LossWeights(ce=0.0, tv=0.0, confidence=1.0)
    _fused(problem, weights).total.backward()
    assert problem.confidence_logits is not None
    assert problem.confidence_logits.grad.abs().sum() > 0
    for name in ("hidden_states", "latents", "markov_weight"):
        assert getattr(problem, name).grad.count_nonzero() == 0


def test_slot_weights() -> None:
    """Slots after the end of a conversation would count, or the decay would start at the wrong slot."""
    valid = torch.tensor([[True, True, False]])
    expected = torch.tensor([[1.0, 0.7788, 0.0]])
    torch.testing.assert_close(slot_weights(valid, 4.0), expected, atol=1e-4, rtol=0)


class _LargestTensor(TorchDispatchMode):
    """Remember the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return output


def test_memory_does_not_grow_with_the_slots() -> None:
    """A step would need slots x vocabulary of memory: gigabytes for a real target."""
    vocab_size, chunk_size = 2000, 16
    peaks = []
    for num_slots in (64, 512):
        states = torch.randn(num_slots, HIDDEN_SIZE, requires_grad=True)
        latents = torch.randn(num_slots, RANK, requires_grad=True)
        transition = torch.randn(vocab_size, RANK, requires_grad=True)
        head = TargetHead(torch.randn(vocab_size, HIDDEN_SIZE), None)
        target_states = torch.randn(NUM_TOKENS, HIDDEN_SIZE)
        slots = Slots(
            labels=torch.randint(vocab_size, (num_slots,)),
            target_rows=torch.randint(NUM_TOKENS, (num_slots,)),
            target_states=target_states,
            target_lse=head.logits(target_states).logsumexp(-1),
            weights=torch.ones(num_slots),
        )
        with _LargestTensor() as largest:
            losses = draft_losses(states, latents, transition, None, head, slots, LossWeights(), chunk_size=chunk_size)
            losses.total.backward()
        peaks.append(largest.num_elements)
    assert peaks == [chunk_size * vocab_size] * 2


def test_a_head_of_the_drafters_own_makes_its_logits() -> None:
    """A drafter with an output head of its own learns through the target's, whose logits it never drafts by."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    head, own = TargetHead(draw(9, 6), draw(9), factor=1.5), TargetHead(draw(9, 6), None, cap=2.0)
    states, target_states = draw(5, 6).requires_grad_(), draw(5, 6)
    labels, weights = torch.tensor([1, 8, -1, 0, 4]), torch.rand(5, generator=generator) + 0.1
    target_logits = head.logits(target_states)
    slots = Slots(labels, torch.arange(5), target_states, target_logits.logsumexp(-1), weights)
    found = draft_losses(states, None, None, None, head, slots, LossWeights(), draft_head=own)
    (gradient,) = torch.autograd.grad(found.total, states)

    logs = own.logits(states).log_softmax(-1)
    distance = (logs.exp() - target_logits.softmax(-1)).abs().sum(-1)
    cross_entropy = -logs.gather(-1, labels.clamp_min(0)[:, None])[:, 0] * (labels >= 0)
    expected = (weights * (0.1 * cross_entropy + 0.9 * distance)).sum() / weights.sum()
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, states)[0])
