"""Choices that several commands offer."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(str, Enum):
    """What models compute in; `auto` is the target's own."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Attention(str, Enum):
    """How attention is computed; `auto` is what Transformers chooses."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"


class Scheduler(str, Enum):
    """Who decides how far to draft, by the names that `generate(scheduler=)` takes."""

    fixed = "fixed"
    threshold = "threshold"
    hardware_aware = "hardware_aware"
    asynchronous = "asynchronous"
    counted = "counted"
    adaptive = "adaptive"


_SCHEDULERS = ", ".join(scheduler.value for scheduler in Scheduler)


class PackagedModel(str, Enum):
    """A model by a short name, whose weights install as a package."""

    smollm2 = "smollm2"
    gemma = "gemma"


# of the folders that short names have led to
_SHORT_NAMES: dict[str, str] = {}


def is_packaged(name: str) -> bool:
    """Return whether a packaged model is meant: its short name, unless a folder is called so."""
    return name in {model.value for model in PackagedModel} and not Path(name).exists()


def packaged_folder(name: str | None) -> str | None:
    """Return the folder of the packaged model that is meant, any other name as it is.

    Raises:
        typer.BadParameter: if the packaged model is not installed.
    """
    if name is None or not is_packaged(name):
        return name
    # imported here, so that the help is instant
    from dspark_hf.console import quiet_transformers
    from dspark_hf.demo.packaged import UnavailableError, converted_target

    try:
        with quiet_transformers():
            folder = str(converted_target(name))
    except UnavailableError as error:
        raise typer.BadParameter(str(error)) from error
    _SHORT_NAMES[folder] = name
    return folder


def as_given(word: str) -> str:
    """Return the short name that the user gave for a folder of a packaged model, any other word as it is."""
    return _SHORT_NAMES.get(word, word)


def value_of(choice: Enum | None) -> str | None:
    """Return what was chosen, as the package calls it."""
    return None if choice is None else str(choice.value)


# the panels of long helps
MODELS = "Models"
DRAFTING = "Drafting"
PROMPT = "Prompt"
WRITING = "Writing"
FIT = "Fit"
MEASURING = "Measuring"
OUTPUT = "Output"

# options of every command that answers somebody
ModelArgument = Annotated[
    str, typer.Argument(help="Folder or hub name of the target, or smollm2 or gemma (packaged).")
]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub name of its drafter; default: the one known for it, else drafts looked up in the text.",
        rich_help_panel=MODELS,
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="auto is the target's own.", rich_help_panel=MODELS)]
DeviceOption = Annotated[str, typer.Option(help="auto is the GPU if there is one.", rich_help_panel=MODELS)]
SchedulerOption = Annotated[
    Scheduler | None,
    typer.Option(
        metavar="NAME",
        help=f"Who decides how far to draft: {_SCHEDULERS}. Default: adaptive, or counted where a seed is to repeat.",
        rich_help_panel=DRAFTING,
    ),
]
NumDraftsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Drafts a round at most; default: the drafter's block size.", rich_help_panel=DRAFTING),
]
SystemOption = Annotated[str | None, typer.Option(help="System prompt.", rich_help_panel=PROMPT)]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="What the chat template is told besides; may be given several times.",
        rich_help_panel=PROMPT,
    ),
]
ThinkingOption = Annotated[
    bool | None,
    typer.Option(help="Think before answering, or not; for targets that can do both.", rich_help_panel=PROMPT),
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Length of an answer.", rich_help_panel=WRITING)]
TemperatureOption = Annotated[float, typer.Option(min=0, help="0 is greedy.", rich_help_panel=WRITING)]
TopPOption = Annotated[
    float, typer.Option(min=0, max=1, help="Sample from this share of probability.", rich_help_panel=WRITING)
]
SeedOption = Annotated[
    int | None, typer.Option(help="Seed of each sampled answer; default: another every time.", rich_help_panel=WRITING)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object per answer, once it is whole.", rich_help_panel=OUTPUT)
]
