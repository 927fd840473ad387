"""Assistants that a call names, `assistant_model="folder"`: whoever knows how to load them hands that in.

The decoding loop knows no model classes, so nothing is loaded here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AssistantFinder(Protocol):
    """Loads assistants by name."""

    def __call__(self, name: str, target: PreTrainedModel, *, only_drafters: bool = False) -> Any:
        """Return the assistant called `name`; with `only_drafters` None if it is none of ours."""


# at most one: what was handed in last
_FINDERS: list[AssistantFinder] = []


def serve_names(find: AssistantFinder) -> None:
    """Let `find` load the assistants that calls name."""
    _FINDERS[:] = [find]


def find_assistant(name: str, target: PreTrainedModel, *, only_drafters: bool = False) -> Any:
    """Return the assistant called `name` for `target`; with `only_drafters` None if it is none of ours.

    Raises:
        TypeError: if nobody has said how to load one.
    """
    if not _FINDERS:
        raise TypeError(
            f"`assistant_model` must be a model, got the name {name!r}. Load it once: `drafter = "
            f"AutoModelForCausalLM.from_pretrained({name!r})`, after `import dspark_hf` if it is a drafter."
        )
    return _FINDERS[0](name, target, only_drafters=only_drafters)
