"""Which dtype a machine computes faster in, found out in about a second."""

from __future__ import annotations

from statistics import median
from time import perf_counter, process_time

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedConfig

_SECONDS = 1.0
# as much as no cache holds, and little enough for any machine that runs the demo
_MOST_NUMBERS = 2**26
# a plain step, and a pass over some drafts
_WIDTHS = (1, 8)
# what bf16 must gain to be preferred: in fp32 texts are identical for sure
_WORTH = 1.1


def measure_bf16(config: PreTrainedConfig, seconds: float = _SECONDS) -> float:
    """Return how many times as fast passes are in bf16 as in fp32 on this machine's processor.

    Matrices of the target's size are read from memory one after another, as a decoding step reads them.
    """
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    num_matrices = max(min(3 * config.num_hidden_layers, _MOST_NUMBERS // (hidden * inner)), 1)
    weights = {
        dtype: [torch.ones(inner, hidden, dtype=dtype) for _ in range(num_matrices)]
        for dtype in (torch.float32, torch.bfloat16)
    }
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in weights}
    end = perf_counter() + seconds
    # the first round warms up
    while len(times[torch.bfloat16]) < 3 or perf_counter() < end:
        for dtype, matrices in weights.items():
            times[dtype].append(_pass_seconds(matrices))
    return median(times[torch.float32][1:]) / median(times[torch.bfloat16][1:])


def choose_dtype(bf16_gain: float) -> str:
    """Return `"bf16"` if it gains enough, else `"fp32"`, in which texts are identical for sure."""
    return "bf16" if bf16_gain >= _WORTH else "fp32"


def _pass_seconds(matrices: list[Tensor]) -> float:
    # the processor's own time: others may be busy on the machine
    start = process_time()
    for width in _WIDTHS:
        hidden_states = torch.ones(width, matrices[0].shape[1], dtype=matrices[0].dtype)
        for matrix in matrices:
            linear(hidden_states, matrix)
    return process_time() - start
