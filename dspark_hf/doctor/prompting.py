"""What a target is asked, with its chat template's switch of thinking on or off.

T tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspark_hf.prompts import Prompt, encode_prompt, has_chat_template, user_turn

# different kinds of text: drafters are better at some than at others
QUESTIONS = (
    "A bakery sells 24 muffins in the morning and 18 in the afternoon. Each costs 3 dollars. How much does it take?",
    "Write a Python function that returns the largest of three numbers.",
    "Why is the sky blue?",
    "Write a short letter to a neighbour about the noise in the evening.",
)
# what templates call it: Qwen 3 and its kin, and DeepSeek, Granite and theirs
_SWITCHES = ("enable_thinking", "thinking")


def encode(prompts: Sequence[str | Prompt | Tensor], tokenizer: Any, **switch: bool) -> list[Tensor]:
    """Return prompts as token ids `(T,)`; a text is a user turn, and `switch` goes to the chat template.

    Raises:
        ValueError: if a text is to be encoded without a tokenizer.
    """
    return [_encode(prompt, tokenizer, switch) for prompt in prompts]


def _encode(prompt: str | Prompt | Tensor, tokenizer: Any, switch: dict[str, bool]) -> Tensor:
    if isinstance(prompt, Tensor):
        return prompt.reshape(-1).cpu()
    if tokenizer is None:
        raise ValueError(
            "`tokenizer` must be given where prompts are text, got None. Pass the target's, or prompts as token ids."
        )
    prompt = user_turn(prompt) if isinstance(prompt, str) else prompt
    if not switch or prompt.messages is None:
        return encode_prompt(prompt, tokenizer)
    text = tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True, tokenize=False, **switch)
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def other_mode(prompts: Sequence[str | Prompt | Tensor], tokenizer: Any) -> tuple[str, bool] | None:
    """Return the chat template's switch of thinking and the value that is not its default, or None without one."""
    asked = next((prompt for prompt in prompts if isinstance(prompt, str) or getattr(prompt, "messages", None)), None)
    if asked is None or tokenizer is None or not has_chat_template(tokenizer):
        return None
    usual = _encode(asked, tokenizer, {}).tolist()
    template = str(tokenizer.chat_template)
    for name in _SWITCHES:
        if name in template:
            for value in (True, False):
                if _encode(asked, tokenizer, {name: value}).tolist() != usual:
                    return name, value
    return None
