"""An existing drafter made ready to learn another target: a fine-tune, a grown vocabulary, another language."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.from_target import check_match, check_servable
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.modeling.provenance import target_fields
from dspark_hf.modeling.vocabulary import choose_vocabulary
from dspark_hf.training.conversations import Conversation, most_frequent_tokens

logger = logging.get_logger(__name__)

# 8,192 tokens, chosen from other text of the same target, are 93% of SmolLM2's
_USUAL_SHARE = 0.9


def adapt_drafter(
    drafter: DSparkAssistantModel,
    target: PreTrainedModel,
    conversations: Sequence[Conversation],
    *,
    draft_vocab: int | None = None,
) -> DSparkAssistantModel:
    """Return `drafter` as the one to train for `target`, in fp32.

    A grown or shrunken vocabulary is followed; tokens that the target gained take its rows where the drafter has an
    embedding or a head of its own. Temperatures of the confidence are dropped: they were fitted to what it was before.
    The result's configuration names `target`.

    Args:
        drafter: the drafter to begin with, of any packaging; it is changed.
        target: the target that it is to draft for from now on.
        conversations: text of that target.
        draft_vocab: None keeps the proposable tokens; else so many are chosen anew, those that `conversations` hold
            most often; 0, or as many as there are, for all.

    Raises:
        ValueError: if the two do not fit: other hidden sizes, fewer layers, or a vocabulary without tokens that the
            drafter needs.
    """
    target = check_servable(target)
    adapter = TargetAdapter(target)
    # weights in bf16 would lose small updates; a module of DeepSeek-V4 comes frozen
    drafter = drafter.float().requires_grad_(True)
    _follow_size(drafter, adapter)
    check_match(drafter.config, adapter)
    if draft_vocab is not None:
        drafter = _choose(drafter, adapter, conversations, draft_vocab)
    share = proposable_share(drafter, conversations)
    if share < _USUAL_SHARE:
        logger.warning(
            f"The drafter can propose only {share:.0%} of this text's tokens, and no more can be accepted. "
            "`--draft-vocab` (`draft_vocab=`) chooses its tokens anew, from this text."
        )
    config = drafter.config
    if config.sts_temperatures is not None:
        config.sts_temperatures = None
        logger.warning(
            "The drafter's temperatures are dropped, which were fitted before this training: calibrate it anew."
        )
    fields = {**target_fields(adapter), "num_target_layers": adapter.num_layers}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields[name] = getattr(adapter.config, name, None)
    for name, value in fields.items():
        setattr(config, name, value)
    return drafter


def proposable_share(drafter: DSparkAssistantModel, conversations: Sequence[Conversation]) -> float:
    """Return the share of the target's own tokens in `conversations` that the drafter can propose; 1.0 without any."""
    ids = drafter.draft_token_ids
    own = [one.input_ids[one.loss_mask] for one in conversations]
    if ids is None or not sum(map(len, own)):
        return 1.0
    return float(torch.isin(torch.cat(own), ids.cpu()).double().mean())


def _follow_size(drafter: DSparkAssistantModel, target: TargetAdapter) -> None:
    """Give the drafter as many tokens as its target has."""
    before, after = drafter.config.vocab_size, target.vocab_size
    # of another model altogether, which `check_match` names
    if before == after or drafter.config.hidden_size != target.hidden_size:
        return
    drafter.resize_token_embeddings(after)
    gained = torch.arange(before, after)
    if len(gained) and drafter.config.owns_embeddings:
        with torch.no_grad():
            rows = target.embed_bare(gained)
            if rows.shape[1] == drafter.config.hidden_size:
                drafter.embed_tokens.weight[before:] = rows.to(drafter.embed_tokens.weight)
    head = target.head_rows(gained) if len(gained) else None
    if head is not None and drafter.config.owns_head and drafter.config.draft_vocab_size is None:
        with torch.no_grad():
            drafter.lm_head.weight[before:] = head[0].to(drafter.lm_head.weight)
    logger.warning(f"The drafter's vocabulary was resized from {before} to {after} tokens, as the target's is.")


def _choose(
    drafter: DSparkAssistantModel, target: TargetAdapter, conversations: Sequence[Conversation], count: int
) -> DSparkAssistantModel:
    size = target.vocab_size
    chosen = most_frequent_tokens(conversations, count, size) if 0 < count < size else None
    old, all_ids = drafter.draft_token_ids, torch.arange(size)
    had, has = all_ids if old is None else old.cpu(), all_ids if chosen is None else chosen
    num_shared = int(torch.isin(has, had).sum())
    if num_shared == len(had) == len(has):
        return drafter
    logger.warning(
        f"The draft vocabulary was chosen anew: {num_shared} tokens kept, {len(has) - num_shared} new ones."
    )
    return choose_vocabulary(drafter, chosen, target)
