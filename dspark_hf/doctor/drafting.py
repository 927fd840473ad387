"""Draft at many places of a recorded text at once, and see how far each block agrees with it.

N blocks, K drafts, T tokens, V vocab, M tapped layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_hf.doctor.readings import Reading, read_as
from dspark_hf.doctor.recording import Recorded
from dspark_hf.generation.drafting.chain import sample_block
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel

# numbers in the logits of the blocks that are drafted at once
_MOST_LOGITS = 2**25


@dataclass(frozen=True)
class Outcome:
    """Of every block the number of accepted drafts `(N,)`, and the confidences `(N, K)`, or None without a head."""

    num_accepted: Tensor
    confidence: Tensor | None
    block_size: int


def draft(
    drafter: DSparkAssistantModel,
    reading: Reading,
    texts: Sequence[Recorded],
    target: TargetAdapter,
    *,
    blocks_per_text: int,
) -> Outcome:
    """Return what becomes of a drafter's greedy blocks under a reading; places are the same for every reading."""
    read = read_as(drafter, reading)
    layer_ids = reading.layer_ids(drafter.config)
    outcomes = [
        _draft_text(read, reading, text, layer_ids, places, target)
        for text in texts
        if len(places := anchor_places(text, drafter.config.num_slots, blocks_per_text))
    ]
    size = read.block_size
    if not outcomes:
        return Outcome(torch.zeros(0), None, size)
    confidences = [confidence for _, confidence in outcomes if confidence is not None]
    return Outcome(
        torch.cat([accepted for accepted, _ in outcomes]), torch.cat(confidences) if confidences else None, size
    )


def anchor_places(text: Recorded, num_slots: int, most: int) -> Tensor:
    """Return places of anchors in the answer, at most `most`, evenly spaced, behind each of which a block is known."""
    places = torch.arange(text.start, len(text.token_ids) - num_slots)
    if len(places) <= most:
        return places
    return places[torch.linspace(0, len(places) - 1, most).long()]


@torch.no_grad()
def _draft_text(
    drafter: DSparkAssistantModel,
    reading: Reading,
    text: Recorded,
    layer_ids: Sequence[int],
    places: Tensor,
    target: TargetAdapter,
) -> tuple[Tensor, Tensor | None]:
    device, size = drafter.device, drafter.block_size
    states = torch.cat([text.states[layer_id].to(device) for layer_id in layer_ids], dim=-1)
    positions = torch.arange(states.shape[1], device=device)[None]
    context = drafter.context_keys_and_values(drafter.project_context(states), positions)
    truth = text.token_ids[places[:, None] + 1 + torch.arange(size)]
    token_ids = text.token_ids.to(device)
    count = max(1, _MOST_LOGITS // (drafter.config.num_draft_logits * size))
    parts = [
        _draft_blocks(drafter, reading, token_ids, part.to(device), context, target) for part in places.split(count)
    ]
    drafts = torch.cat([drafted.cpu() for drafted, _ in parts])
    confidences = [confidence.cpu() for _, confidence in parts if confidence is not None]
    num_accepted = (drafts == truth).long().cumprod(-1).sum(-1)
    return num_accepted, torch.cat(confidences) if confidences else None


def _draft_blocks(
    drafter: DSparkAssistantModel,
    reading: Reading,
    token_ids: Tensor,
    places: Tensor,
    context: Sequence[tuple[Tensor, Tensor]],
    target: TargetAdapter,
) -> tuple[Tensor, Tensor | None]:
    """Return drafts `(N, K)` and their confidences after the anchors at `places` `(N,)` of one text."""
    config, anchors = drafter.config, token_ids[places]
    # of each anchor's context, how far back it lies
    age = (places[:, None] - torch.arange(len(token_ids), device=places.device))[None]
    windows = [config.window_of(layer) for layer in range(len(drafter.layers))]
    masks = {window: age > 0 if window is None else (age > 0) & (age <= window) for window in set(windows)}
    normed, unnormed = drafter.run_blocks(
        anchors[None],
        places[None] + reading.position_shift,
        config.num_slots,
        context,
        [masks[window] for window in windows],
        target,
    )
    hidden_states, unnormed, state = drafter.drafting_slots(normed[0], unnormed[0], anchors)
    drafts, _, previous_ids = sample_block(
        drafter.draft_head(target)(hidden_states),
        hidden_states,
        anchors,
        _best,
        markov_head=drafter.markov_head,
        vocab_size=config.vocab_size,
        proposable_ids=drafter.draft_token_ids,
        markov_top_k=drafter.markov_top_k,
        state=state,
    )
    logits = drafter.confidence_logits(drafter.confidence_features(hidden_states, unnormed), previous_ids)
    if logits is not None and config.sts_temperatures is not None:
        logits = logits / torch.tensor(config.sts_temperatures, device=logits.device)
    return drafts, None if logits is None else logits.sigmoid()


def _best(slot: int, logits: Tensor, drafted: Tensor) -> tuple[Tensor, None]:
    return logits.argmax(-1), None
