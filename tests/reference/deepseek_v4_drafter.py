"""Oracle of the DSpark module in a DeepSeek-V4 checkpoint: one block, row by row (arXiv 2607.05147).

Takes an already dequantised checkpoint by its official names `mtp.*`; knows nothing of `dspark_hf`.
No round leaves a trace: the context of a block is computed anew from the target's tapped features.

D hidden, K block_size, M tapped layers, P context positions, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tests.reference.deepseek_v4 import (
    Settings,
    Weights,
    attend,
    best_first,
    cast,
    enter,
    layer_frequencies,
    leave,
    merge_streams,
    moe_sub_block,
    project_heads,
    queries,
    rms_norm,
    shared_kv,
)


class Draft(NamedTuple):
    """The drafts, the logits `(K, V)` they are chosen from and the confidence before its sigmoid `(K,)`."""

    token_ids: list[int]
    logits: Tensor
    confidence_logits: Tensor


def argmax(logits: Tensor) -> int:
    """Return the index of the largest logit, the first of equal ones."""
    return best_first(logits, 1)[0]


def draft(
    weights: Weights,
    settings: Settings,
    main_hidden: Tensor,
    anchor: int,
    anchor_position: int,
    embed_weight: Tensor,
    head_weight: Tensor,
    *,
    block_size: int,
    noise_token_id: int,
    choose: Callable[[Tensor], int] = argmax,
    kv_fake_quant: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Draft:
    """Return the block drafted after `anchor`, the first token that the target has not processed.

    `main_hidden` `(P, M * D)` holds the tapped features of the positions 0 to P - 1, all that are processed: the
    anchor's position is P, so the block's rows, anchor first, stand at P to P + K - 1.
    """
    if anchor_position != len(main_hidden):
        raise ValueError(
            f"`anchor_position` must be the number of processed tokens, {len(main_hidden)}, got {anchor_position}. "
            "Pass the features of all tokens before the anchor and of no other."
        )
    weights = cast(weights, dtype)
    embed_weight, head_weight = embed_weight.to(dtype), head_weight.to(dtype)
    num_stages = sum(f"mtp.{stage}.attn.wkv.weight" in weights for stage in range(len(weights)))
    last = f"mtp.{num_stages - 1}"

    # one projection for all stages; each of them keeps the last `window` positions
    kept = range(max(0, anchor_position - settings.window), anchor_position)
    context = {position: context_features(weights, settings, main_hidden[position].to(dtype)) for position in kept}
    token_ids = [anchor] + [noise_token_id] * (block_size - 1)
    rows = [torch.stack([embed_weight[token]] * settings.hc_mult) for token in token_ids]
    positions = [anchor_position + k for k in range(block_size)]
    for stage in range(num_stages):
        rows = run_stage(weights, f"mtp.{stage}", settings, context, rows, positions, kv_fake_quant)

    drafts: list[int] = []
    logits: list[Tensor] = []
    confidences: list[Tensor] = []
    previous = anchor
    for streams in rows:
        x = merge_streams(weights, f"{last}.hc_head", streams, settings)
        embedded = weights[f"{last}.markov_head.markov_w1.weight"][previous]
        bias = weights[f"{last}.markov_head.markov_w2.weight"] @ embedded
        logits.append(head_weight @ rms_norm(x, weights[f"{last}.norm.weight"], settings.rms_eps) + bias)
        # the confidence reads x before the norm, and the token before its draft
        confidences.append(weights[f"{last}.confidence_head.proj.weight"][0] @ torch.cat([x, embedded]))
        previous = choose(logits[-1])
        drafts.append(previous)
    return Draft(drafts, torch.stack(logits), torch.stack(confidences))


def context_features(weights: Weights, settings: Settings, tapped: Tensor) -> Tensor:
    """Return what every stage makes its context of: main_norm(main_proj(tapped features))."""
    projected = weights["mtp.0.main_proj.weight"] @ tapped
    return rms_norm(projected, weights["mtp.0.main_norm.weight"], settings.rms_eps)


def run_stage(
    weights: Weights,
    name: str,
    settings: Settings,
    context: dict[int, Tensor],
    rows: Sequence[Tensor],
    positions: Sequence[int],
    kv_fake_quant: bool,
) -> list[Tensor]:
    """Return the block's streams after one stage: a window layer whose rows see all context and each other."""
    frequencies = layer_frequencies(settings, is_compressing=False)
    entered = [enter(weights, f"{name}.hc_attn", f"{name}.attn_norm", h, settings) for h in rows]
    # context enters without the stage's attn_norm, rows with it
    sources = list(context.items()) + list(zip(positions, [block.inputs for block in entered], strict=True))
    kvs = torch.stack(
        [
            shared_kv(weights, f"{name}.attn", x, position, frequencies, settings, kv_fake_quant)
            for position, x in sources
        ]
    )
    outputs = []
    for h, block, position in zip(rows, entered, positions, strict=True):
        _, query = queries(weights, f"{name}.attn", block.inputs, position, frequencies, settings)
        heads = attend(query, kvs, weights[f"{name}.attn.attn_sink"])
        y = project_heads(weights, f"{name}.attn", heads, position, frequencies, settings)
        # the experts are chosen by the gate, whatever the row's token
        outputs.append(moe_sub_block(weights, name, leave(block, y, h), settings, token_id=None))
    return outputs
