"""Reasoning efforts: what each release calls them, and what they put before the conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_hf.modeling.deepseek_v4.chat.constants import NO_REASONING, REASONING_EFFORTS

# switches of other engines and templates, by what each of their values says of thinking
SWITCHES: Mapping[str, Mapping[Any, bool]] = {
    "thinking": {True: True, False: False},
    "enable_thinking": {True: True, False: False},
    "thinking_mode": {"thinking": True, "chat": False},
}
# and of those that the format has nothing for
REFUSED_SWITCHES = (
    "think",
    "reasoning",
    "enable_reasoning",
    "disable_thinking",
    "no_think",
    "thinking_budget",
    "clear_thinking",
    "preserve_thinking",
    "documents",
    "context",
)


def efforts_of(release: str) -> dict[str, str]:
    """Return the efforts of a release, and the text that the prompt starts with for each.

    Raises:
        ValueError: if there is no such release.
    """
    if release not in REASONING_EFFORTS:
        known = ", ".join(REASONING_EFFORTS)
        raise ValueError(f"`release` must be one of {known}, got {release!r}. Pass the release of the target.")
    return REASONING_EFFORTS[release]


def effort_text(reasoning_effort: str | None, release: str) -> str:
    """Return what the prompt starts with, empty for no reasoning and for the default effort.

    Raises:
        ValueError: if there is no such release, or the release has no such effort.
    """
    efforts = efforts_of(release)
    if reasoning_effort is None or reasoning_effort == NO_REASONING:
        return ""
    if reasoning_effort not in efforts:
        known = ", ".join([NO_REASONING, *efforts])
        raise ValueError(
            f"`reasoning_effort` must be one of {known} for release {release}, got {reasoning_effort!r}. "
            "Pass one of them, or the right release."
        )
    return efforts[reasoning_effort]


def with_switches(reasoning_effort: str | None, switches: Mapping[str, Any]) -> str | None:
    """Return the reasoning effort that `reasoning_effort` and other engines' `switches` ask for together.

    Switches that are None say nothing.

    Raises:
        ValueError: if a switch is unknown or of no use here, has no value that it knows, or contradicts the effort or
            another switch.
    """
    said = None if reasoning_effort is None else reasoning_effort != NO_REASONING
    for name, value in switches.items():
        if value is None:
            continue
        if name not in SWITCHES:
            raise ValueError(
                f"`{name}` must be left out: DeepSeek-V4's prompts have no such switch, got {value!r}. Use "
                "`reasoning_effort`."
            )
        meanings = SWITCHES[name]
        # 1 equals True
        known = [key for key in meanings if type(key) is type(value) and key == value]
        if not known:
            raise ValueError(f"`{name}` must be one of {_listed(meanings)}, got {value!r}. Pass one of them.")
        thinks = meanings[known[0]]
        if said not in (None, thinks):
            raise ValueError(
                f"`{name}` must agree with `reasoning_effort` and other switches, got {value!r}. Pass one of them."
            )
        said = thinks
    if said is False:
        return NO_REASONING
    return reasoning_effort


def _listed(values: Mapping[Any, bool]) -> str:
    return ", ".join(str(value).lower() for value in values)
