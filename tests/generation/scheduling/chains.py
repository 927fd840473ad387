"""A target that writes a Markov chain of known law: one long text holds thousands of independent transitions.

B batch, T tokens, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import tiny_target


@torch.no_grad()
def chain_target(transitions: Tensor) -> PreTrainedModel:
    """Return a target whose next token follows `transitions[last token]`, `(V, V)`, whatever stood before."""
    vocab_size, width = len(transitions), 16
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    target = tiny_target(vocab_size=vocab_size, bos_token_id=None, pad_token_id=0, **sizes, **heads)
    layer = target.model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    # one direction for each token: the last norm gives it the length sqrt(width)
    target.model.embed_tokens.weight.copy_(torch.eye(vocab_size, width))
    target.model.norm.weight.fill_(1.0)
    target.lm_head.weight.zero_()
    target.lm_head.weight[:, :vocab_size] = transitions.log().T / math.sqrt(width)
    return target


def first_places(counts: Sequence[int]) -> list[int]:
    """Return where each round's first token stands in a row's new tokens, from the numbers of accepted drafts."""
    places, place = [], 1
    for num_accepted in counts:
        places.append(place)
        place += num_accepted + 1
    return places
