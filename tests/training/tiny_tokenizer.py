"""A tokenizer of whole words for the tiny targets, with or without a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCAB_SIZE

SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<end>", "<unk>"]
WORDS = [*SPECIAL, *(f"w{index}" for index in range(len(SPECIAL), VOCAB_SIZE))]
CHAT_TEMPLATE = (
    "<bos> {% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token i is the word `w{i}`, apart from a few special ones."""
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<end>"],
    )
    fast.chat_template = chat_template
    return fast
