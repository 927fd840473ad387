"""A tiny random target with a tiny random drafter: what examples run on where no real weights are installed."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel

__all__ = ["write_tiny_pair"]

_SPECIAL_WORDS = ["<pad>", "<bos>", "<eos>", "<unk>"]
_SYLLABLES = ["ba", "du", "fo", "ka", "li", "mo", "ne", "ra"]
_WORDS = [first + second for first in _SYLLABLES for second in _SYLLABLES]


def write_tiny_pair(folder: Path) -> tuple[Path, Path]:
    """Write a random target and a drafter for it, both with a tokenizer. Returns their folders.

    They speak nonsense, quickly, and exercise every line that real ones do.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = LlamaForCausalLM(_target_config()).eval()
        drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, warm_start=True)
    folders = folder / "target", folder / "drafter"
    for model, path in zip((target, drafter), folders, strict=True):
        model.save_pretrained(path)
        _tokenizer().save_pretrained(path)
    return folders


def _target_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(_SPECIAL_WORDS) + len(_WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        # large enough that greedy text wanders instead of repeating one token
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(_SPECIAL_WORDS + _WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
