"""Manifold-constrained hyper-connections: n residual streams around every sub-block, in fp32.

n streams, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig


@dataclass
class StreamMixing:
    """How streams take a sub-block's output: `post` `(*, n)` writes it, `comb` `(*, n, n)` mixes the streams."""

    post: Tensor
    comb: Tensor

    def __call__(self, streams: Tensor, output: Tensor) -> Tensor:
        """Return the streams `(*, n, D)` after a sub-block that gave `output` `(*, D)`."""
        # the first index of comb is contracted: stream j's share in stream k
        mixed = torch.einsum("...jk,...jd->...kd", self.comb, streams.float())
        return (mixed + self.post[..., None] * output.float()[..., None, :]).to(streams.dtype)


def read_streams(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: DeepseekV4DSparkConfig
) -> tuple[Tensor, StreamMixing]:
    """Return a sub-block's input `(*, D)`, the weighted sum of the streams, and how to write its output back.

    `fn` `((2 + n) * n, n * D)`, `base` `((2 + n) * n)` and `scale` `(3)` are the layer's parameters.
    """
    n = config.hc_mult
    pre, post, comb = _coefficients(streams, fn, config.rms_norm_eps).split([n, n, n * n], dim=-1)
    pre = torch.sigmoid(pre * scale[0] + base[:n]) + config.hc_eps
    post = 2 * torch.sigmoid(post * scale[1] + base[n : 2 * n])
    comb = comb.unflatten(-1, (n, n)) * scale[2] + base[2 * n :].view(n, n)
    mixing = StreamMixing(post, sinkhorn(comb, config.hc_eps, config.hc_sinkhorn_iters))
    return _weighted_sum(streams, pre), mixing


def sinkhorn(logits: Tensor, eps: float, num_iterations: int) -> Tensor:
    """Return matrices `(*, n, n)` that are nearly doubly stochastic, by normalising rows and columns in turn."""
    matrix = logits.softmax(-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(num_iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def join_streams(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: DeepseekV4DSparkConfig) -> Tensor:
    """Return the final state `(*, D)` of the streams; `fn` `(n, n * D)`, `base` `(n)`, `scale` `(1)`."""
    return _weighted_sum(
        streams, torch.sigmoid(_coefficients(streams, fn, config.rms_norm_eps) * scale + base) + config.hc_eps
    )


def _coefficients(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    flat = streams.flatten(-2).float()
    return nn.functional.linear(flat, fn.float()) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def _weighted_sum(streams: Tensor, weights: Tensor) -> Tensor:
    return (weights[..., None] * streams.float()).sum(-2).to(streams.dtype)
