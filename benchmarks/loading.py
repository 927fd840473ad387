"""What several benchmarks load, and the clock that they go by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pages import FOLDER
from dspark_hf import DSparkAssistantModel
from dspark_hf.demo.packaged import PACKAGED_MODELS, converted_target, shipped_drafter

PROMPTS = FOLDER / "prompts.jsonl"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PromptsFile = Annotated[Path, typer.Option(help='JSON Lines, each {"turns": [...]}.')]
PackagedName = Annotated[str, typer.Option(help=f"A packaged target: {', '.join(PACKAGED_MODELS)}.")]
DtypeName = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
ProcessorTime = Annotated[
    bool, typer.Option("--processor-time", help="For a busy machine: seconds of the processor, on one thread.")
]


@dataclass(frozen=True)
class Packaged:
    """A packaged target, its tokenizer and the drafter that is shipped for it."""

    title: str
    target: Any
    tokenizer: Any
    drafter: DSparkAssistantModel


def load_packaged(name: str, dtype: str) -> Packaged:
    """Return a packaged target and what belongs to it, in a dtype of `DTYPES`.

    Raises:
        typer.BadParameter: if there is no such target, or no such dtype.
    """
    for option, given, known in (("--model", name, PACKAGED_MODELS), ("--dtype", dtype, DTYPES)):
        if given not in known:
            raise typer.BadParameter(f"`{option}` must be one of {', '.join(known)}, got {given!r}. Correct it.")
    folder = converted_target(name)
    return Packaged(
        PACKAGED_MODELS[name].title,
        AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]),
        AutoTokenizer.from_pretrained(folder),
        DSparkAssistantModel.from_pretrained(shipped_drafter(PACKAGED_MODELS[name]), dtype=DTYPES[dtype]),
    )


def weight_bytes(target: Any) -> int:
    """Return the bytes of a model's weights; what is tied counts once."""
    return sum({weight.data_ptr(): weight.nbytes for weight in target.parameters()}.values())


def choose_clock(*, processor_time: bool) -> Callable[[], float]:
    """Return a clock in seconds; for the processor's own time Torch keeps to one thread from now on."""
    if not processor_time:
        return perf_counter
    torch.set_num_threads(1)
    return process_time


def time_word(*, processor_time: bool) -> str:
    """Return what that clock measures, as a page says it."""
    return "processor time of one thread" if processor_time else "time"
