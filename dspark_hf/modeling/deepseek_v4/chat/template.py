"""The chat template: the encoder in Jinja, for `tokenizer.apply_chat_template`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dspark_hf.modeling.deepseek_v4.chat.constants import DEFAULT_RELEASE
from dspark_hf.modeling.deepseek_v4.chat.efforts import efforts_of

_FILE = Path(__file__).with_name("deepseek_v4.jinja")


def chat_template(release: str = DEFAULT_RELEASE) -> str:
    """Return the Jinja chat template of a release: `"preview"`, `"0731"` or `"0813"`.

    Raises:
        ValueError: if there is no such release.
    """
    efforts_of(release)
    return f"{{%- set release = '{release}' %}}\n" + _FILE.read_text(encoding="utf-8")


def set_chat_template(tokenizer: Any, release: str = DEFAULT_RELEASE) -> None:
    """Give `tokenizer` the chat template of a release; `tokenizer.save_pretrained` keeps it.

    `tokenizer.apply_chat_template` then takes the keyword arguments of `encode_messages` and returns the same prompt.
    As everywhere in Transformers, `add_generation_prompt` is off by default.

    Raises:
        ValueError: if there is no such release.
    """
    tokenizer.chat_template = chat_template(release)
