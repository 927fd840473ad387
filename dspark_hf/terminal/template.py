"""What a chat template can be told besides the messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dspark_hf.prompts import template_names

_THINKING = "enable_thinking"


def read_template_options(tokenizer: Any, pairs: Sequence[str], thinking: bool | None) -> dict[str, Any]:
    """Return what `--template-option key=value` and `--thinking` say, for `tokenizer.apply_chat_template`.

    Values are JSON where they can be read so, and text otherwise: `true`, `3`, `["a"]`, `high`.

    Raises:
        ValueError: if a pair is none, or the template does not ask for it: it would be ignored without a word.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise ValueError(
                f"`--template-option` must be KEY=VALUE, got {pair!r}. For example --template-option reasoning=high."
            )
        options[key] = _value(value)
    names = template_names(tokenizer)
    for key in options:
        if key not in names:
            raise ValueError(
                f"`--template-option` must name something that the target's chat template asks for, got {key!r}, "
                "which is not in it. Leave it out, or correct it."
            )
    if thinking is None:
        return options
    switch = "--thinking" if thinking else "--no-thinking"
    if _THINKING not in names:
        raise ValueError(
            f"`{switch}` must be left out for a target whose chat template has no `{_THINKING}`, got it. If it has a "
            "switch of another name, use --template-option."
        )
    if options.get(_THINKING, thinking) != thinking:
        raise ValueError(f"`{switch}` must agree with `--template-option`, got {_THINKING}. Leave out one of the two.")
    return {**options, _THINKING: thinking}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
