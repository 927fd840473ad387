"""`generation_config`, which `transformers chat` sends beside the API's fields, as those fields."""

from __future__ import annotations

import json
from typing import Any

from dspark_hf.serving.errors import shorten

FIELD = "generation_config"
_SAME = ("temperature", "top_p", "top_k", "min_p")
# say whose a file is, not how to generate
_LABELS = ("transformers_version", "_from_model_config")


def read_generation_config(values: Any) -> Any:
    """Return the fields of a request, those of its `generation_config`, a JSON object as text, among them.

    Raises:
        ValueError: if it is no such text, holds what this server has no field for, or contradicts another field.
    """
    if not isinstance(values, dict) or values.get(FIELD) is None:
        return values
    rest = {name: value for name, value in values.items() if name != FIELD}
    for name, value in _translated(_parsed(values[FIELD])).items():
        if rest.get(name) not in (None, value):
            raise ValueError(
                f"`{FIELD}` must agree with `{name}`, got {shorten(value)} and {shorten(rest[name])}. Leave out one."
            )
        rest[name] = value
    return rest


def _parsed(text: Any) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"`{FIELD}` must be a JSON object as text, got {shorten(text)}. Correct it.")
    return fields


def _translated(fields: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in fields.items() if value is not None and name not in _LABELS}
    does_sample = given.pop("do_sample", False)
    if not isinstance(does_sample, bool):
        raise ValueError(f"`{FIELD}` must have true or false as do_sample, got {shorten(does_sample)}. Correct it.")
    found = {name: given.pop(name) for name in _SAME if name in given}
    if "max_new_tokens" in given:
        found["max_tokens"] = given.pop("max_new_tokens")
    if given:
        raise ValueError(
            f"`{FIELD}` must hold do_sample, max_new_tokens, {', '.join(_SAME)} alone, got {shorten(sorted(given))}. "
            "Leave the others out: the target's own hold."
        )
    # greedy, as `generate` is without it, whatever the temperature
    return found if does_sample else {**found, "temperature": 0}
