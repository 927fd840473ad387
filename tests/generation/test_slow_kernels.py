"""Kernels that take PyTorch's CPU hundreds of times as long in bf16 as others that do the same."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dspark_hf import DSparkAssistantModel, generate_stream
from dspark_hf.generation.requests.request import Request
from tests.generation.prompts import ragged_prompts
from tests.thinning import mostly_slow
from tests.tiny import tiny_target


class _SlowKernels(TorchDispatchMode):
    """Collect the names of the slow ones: `scatter` in bf16, and products that read their weights once per row.

    Shapes of other products by batches, for each of which oneDNN makes a kernel, are collected as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.batched_shapes: set[tuple[torch.Size, torch.Size]] = set()
        self.num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.num_products += name in ("aten::mm", "aten::addmm")
        if name.startswith("aten::scatter") and args[0].dtype is torch.bfloat16:
            self.found.add(name)
        if name == "aten::bmm":
            is_bf16 = args[0].dtype is torch.bfloat16
            # heads of attention are several, and no two of them are the same; one product in fp32 may turn positions
            if (len(args[1]) == 1 and is_bf16) or (len(args[1]) > 1 and args[1].stride(0) == 0):
                self.found.add(name)
            if is_bf16:
                self.batched_shapes.add((args[0].shape, args[1].shape))
        return func(*args, **(kwargs or {}))


def _drafter(target, *, sample_from_anchor=True):
    # a block with more slots than drafts are asked for, and a copy of some of the head's rows
    drafter = DSparkAssistantModel.from_target(
        target,
        num_hidden_layers=1,
        markov_rank=8,
        block_size=5,
        sample_from_anchor=sample_from_anchor,
        draft_token_ids=list(range(2, 50)),
    )
    return drafter.to(torch.bfloat16)


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("sample_from_anchor", [True, False])
@pytest.mark.parametrize("family", mostly_slow(("llama", "gemma3_text", "qwen3"), ("llama",)))
def test_rows_of_a_batch(family, sample_from_anchor, do_sample, num_rows):
    """A row or a batch in bf16 waits for its keys and values to be written, or for the logits of its drafts."""
    target = tiny_target(family).to(torch.bfloat16)
    drafter = _drafter(target, sample_from_anchor=sample_from_anchor)
    options = {"max_new_tokens": 10, "do_sample": do_sample, "num_assistant_tokens": 3, "scheduler": "fixed"}
    with _SlowKernels() as slow:
        target.generate(**ragged_prompts(num_rows), **options, assistant_model=drafter)
    assert slow.num_products > 50
    assert not slow.found


@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_context_that_grows(num_rows):
    """A new kernel for every new length of what the drafter has read takes longer than the product that it is for."""
    target = tiny_target("llama").to(torch.bfloat16)
    shapes = []
    for max_new_tokens in (8, 40):
        options = {"max_new_tokens": max_new_tokens, "eos_token_id": None, "drafts": "model", "scheduler": "fixed"}
        with _SlowKernels() as slow:
            target.generate(**ragged_prompts(num_rows), **options, assistant_model=_drafter(target))
        shapes.append(slow.batched_shapes)
    assert len(shapes[1]) <= len(shapes[0]) + 2


def test_rows_of_a_stream():
    """So does a stream."""
    target = tiny_target("llama").to(torch.bfloat16)
    requests = [Request(torch.arange(5, 9 + length), {"max_new_tokens": 8}) for length in range(5)]
    with _SlowKernels() as slow:
        finished = list(generate_stream(target, requests, drafter=_drafter(target), max_rows=3))
    assert len(finished) == 5 and slow.num_products > 50
    assert not slow.found
