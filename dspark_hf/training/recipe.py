"""From a user's choices to a trained drafter: presets, the fresh drafter, the saved folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dspark_hf.files import replace_whole_folder
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.training.checkpoints import is_own
from dspark_hf.training.conversations import Conversation, most_frequent_tokens
from dspark_hf.training.trainer import DSparkTrainer

# an earlier result's, whatever number of files it had
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

# what a choice is when it is left open
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # as released: the drafter and the schedule of the paper, for days on several GPUs
    "paper": {
        "layers": 5,
        "markov_rank": 256,
        "draft_vocab": None,
        "warm_start": False,
        "anchors": 512,
        "learning_rate": 6e-4,
        "state_cache_gb": 0.0,
    },
    # an evening on one GPU, or a night on two cores
    "small": {
        "layers": 2,
        "markov_rank": 64,
        "draft_vocab": 8192,
        "warm_start": False,
        "anchors": 128,
        "learning_rate": 4e-3,
        "state_cache_gb": 8.0,
    },
}


def build_drafter(
    target: PreTrainedModel,
    conversations: Sequence[Conversation],
    *,
    layers: int = 2,
    markov_head: str = "vanilla",
    markov_rank: int = 64,
    block_size: int = 7,
    draft_vocab: int | None = 8192,
    warm_start: bool = False,
    target_layer_ids: Sequence[int] | None = None,
) -> DSparkAssistantModel:
    """Return a fresh drafter in fp32; the defaults are those of the preset `small`.

    Args:
        target: the target.
        conversations: the text whose most frequent tokens the drafter may propose.
        layers: number of drafter layers; never more than the target has.
        markov_head: `"vanilla"`, `"gated"`, `"rnn"`, or `"none"` for a plain DFlash drafter.
        markov_rank: rank of that head.
        block_size: drafts per round.
        draft_vocab: number of proposable tokens; None, or as many as there are, for all.
        warm_start: copy the target's last layers.
        target_layer_ids: layers to read; None for evenly spaced ones.

    Raises:
        ValueError: as `DSparkAssistantModel.from_target`.
    """
    config = target.config.get_text_config(decoder=True)
    draft_token_ids = None
    if draft_vocab is not None and draft_vocab < config.vocab_size:
        draft_token_ids = most_frequent_tokens(conversations, draft_vocab, config.vocab_size)
    has_head = markov_head != "none"
    drafter = DSparkAssistantModel.from_target(
        target,
        num_hidden_layers=min(layers, config.num_hidden_layers),
        target_layer_ids=target_layer_ids,
        block_size=block_size,
        markov_head_type=markov_head if has_head else "vanilla",
        markov_rank=markov_rank if has_head else 0,
        draft_token_ids=draft_token_ids,
        markov_over_draft_vocab=draft_token_ids is not None and has_head,
        warm_start=warm_start,
    )
    return drafter.float()


def save_trained(trainer: DSparkTrainer, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Save the drafter of a trainer in `dtype`, with the target's tokenizer and the log of its evaluations.

    An earlier result in `folder` is replaced, what else lies in it stays; there is a whole folder or none.

    Raises:
        ValueError: if `folder` is there and holds no drafter.
    """
    if (folder.exists() or folder.is_symlink()) and not is_own(folder):
        raise ValueError(
            f"`folder` must be new, or hold a drafter that is to be replaced, got {str(folder)!r}. Name another."
        )
    drafter = trainer.accelerator.unwrap_model(trainer.model).eval().to(dtype=dtype)
    log = [json.dumps(record) + "\n" for record in trainer.state.log_history if "eval_loss" in record]

    def write(empty: Path) -> None:
        drafter.save_pretrained(empty)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(empty)
        (empty / "training_log.jsonl").write_text("".join(log), encoding="utf-8")

    replace_whole_folder(folder, write, lambda name: _WEIGHTS.fullmatch(name) is not None)
