"""Tiny checkpoints on disk, and what tests ask of them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dspark_hf import DeepseekV4DSparkForCausalLM
from tests.closeness import assert_same_up_to_rounding

NUM_TOKENS = 30


def read_files(folder: Path) -> dict[str, Tensor]:
    """Return all tensors in a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bytes(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check names, dtypes, shapes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        # a number alone has no bytes to be viewed as
        assert torch.equal(actual[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def assert_same_logits(actual: DeepseekV4DSparkForCausalLM, expected: DeepseekV4DSparkForCausalLM) -> None:
    """Check that two models say the same, as far as sums over weights in other places of memory can."""
    assert_same_up_to_rounding(logits(actual), logits(expected), expected.dtype)


def assert_same_model(actual: DeepseekV4DSparkForCausalLM, expected: DeepseekV4DSparkForCausalLM) -> None:
    """Check that two models in memory hold the same bits, and say the same."""
    assert_same_bytes(actual.state_dict(), expected.state_dict())
    assert_same_logits(actual, expected)


def logits(model: DeepseekV4DSparkForCausalLM) -> Tensor:
    """Return a model's logits for a fixed random text."""
    most = min(200, model.config.vocab_size)
    token_ids = torch.randint(most, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(token_ids).logits


def load(folder: Path, **options) -> DeepseekV4DSparkForCausalLM:
    """Return the model in a folder."""
    return DeepseekV4DSparkForCausalLM.from_pretrained(folder, **options)
