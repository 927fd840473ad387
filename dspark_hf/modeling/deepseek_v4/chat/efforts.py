"""Reasoning efforts: what each release calls them, and what they put before the conversation."""

from __future__ import annotations

from dspark_hf.modeling.deepseek_v4.chat.constants import NO_REASONING, REASONING_EFFORTS


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
