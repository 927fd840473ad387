"""A tiny target that speaks, with its drafter: what the terminal's tests listen to."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.terminal.replies import Speaker, Writing
from tests.tiny import VOCAB_SIZE, tiny_target

NEW_TOKENS = 16
_ROLES = {"user": 5, "assistant": 6, "system": 7}
TEMPLATE = (
    "{% if enable_thinking %}w9 {% endif %}{% for message in messages %}{{ message['role'] }} "
    "{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}w8{% endif %}"
)


def word_tokenizer(*, has_template: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are `w4` to `w63`, and the roles of a chat."""
    words = {f"w{index}": index for index in range(VOCAB_SIZE) if index not in _ROLES.values()} | _ROLES
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w3")
    if has_template:
        fast.chat_template = TEMPLATE
    return fast


def speaker(**writing: Any) -> Speaker:
    """Return a target that answers with a drafter that is right now and then, and looks up what it can."""
    target = tiny_target(initializer_range=0.15)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=5)
    # no clock decides, so that every run is the same
    drafter.scheduler = "fixed"
    return Speaker(word_tokenizer(), target, drafter.eval(), Writing(**{"max_new_tokens": NEW_TOKENS, **writing}))
