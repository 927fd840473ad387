"""What `generate` and `chat` do before the first answer: models, drafter, prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dspark_hf.cli.options import is_packaged, packaged_folder

if TYPE_CHECKING:
    from dspark_hf.generation.drafting.interface import Drafter
    from dspark_hf.terminal.replies import Speaker, Writing


@dataclass(frozen=True)
class Asked:
    """Whom a command asks, by the names that its user gave."""

    model: str
    drafter: str | None
    dtype: str
    device: str
    scheduler: str | None = None
    num_drafts: int | None = None


def open_tokenizer(asked: Asked, console: Console) -> tuple[str, Any]:
    """Return the target's folder or hub name and its tokenizer, after all checks that need no weights.

    Raises:
        ValueError: if a model cannot be read.
        typer.BadParameter: if the packaged model is not installed.
    """
    # imported here, so that the help is instant
    from dspark_hf.loading import check_num_drafts, check_slip, load_tokenizer, read_drafter_config

    if asked.drafter is not None:
        check_num_drafts(asked.num_drafts, read_drafter_config(asked.drafter).block_size, asked.drafter)
    if not is_packaged(asked.model):
        check_slip(asked.model, "MODEL")
        return asked.model, load_tokenizer(asked.model, "MODEL")
    with console.status("Looking for the model (the first time, its weights are converted) ..."):
        folder = str(packaged_folder(asked.model))
    return folder, load_tokenizer(folder, "MODEL")


def open_speaker(asked: Asked, folder: str, tokenizer: Any, writing: Writing, console: Console) -> Speaker:
    """Return who answers: the target of `folder` with its drafter.

    Raises:
        ValueError: if a model cannot be read, or the drafter does not fit.
    """
    from dspark_hf.console import quiet_transformers
    from dspark_hf.generation.targets.adapter import TargetAdapter
    from dspark_hf.loading import load_target
    from dspark_hf.prompts import end_token_id, has_chat_template
    from dspark_hf.terminal.replies import Speaker

    with console.status("Loading the models ..."), quiet_transformers():
        target = load_target(folder, dtype=asked.dtype, device=asked.device, option="MODEL")
        drafter = drafter_for(target, asked)
        drafter.check_target(TargetAdapter(target, drafter.target_layer_ids))
    end = end_token_id(tokenizer) if has_chat_template(tokenizer) else None
    return Speaker(tokenizer, target, drafter, writing, () if end is None else (end,))


def drafter_for(target: Any, asked: Asked) -> Drafter:
    """Return the drafter that was named, else the one that is known for the target, else one that looks drafts up.

    Raises:
        ValueError: if it cannot be read, or proposes fewer drafts than were asked for.
    """
    from dspark_hf.loading import check_num_drafts, load_drafter
    from dspark_hf.registry.finding import load_drafter_for

    if asked.drafter is not None:
        return load_drafter(asked.drafter, dtype=target.dtype).to(target.device)
    drafter = load_drafter_for(target)
    check_num_drafts(asked.num_drafts, drafter.block_size, "the drafter that is known")
    return drafter


def describe(speaker: Speaker, asked: Asked) -> str:
    """Return who answers and who drafts, in a line or two."""
    from dspark_hf.generation.lookup_assistant import LookupAssistant

    target = f"{asked.model} ({str(speaker.target.dtype).removeprefix('torch.')} on {speaker.target.device})"
    if isinstance(speaker.drafter, LookupAssistant):
        return f"{target}, no drafter known: drafts are looked up in the text (--drafter names one)"
    return f"{target}, up to {asked.num_drafts or speaker.drafter.block_size} drafts a round"


def read_prompt(prompt: str | None) -> str:
    """Return the prompt that was given, or, without one or with `-`, what standard input holds.

    Raises:
        ValueError: if there is nothing to answer.
    """
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise ValueError('`PROMPT` must be given, or come through a pipe, got neither. Add "..." to the command.')
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input must be UTF-8, got other bytes. Convert it. ({error})") from error
    if not prompt.strip():
        raise ValueError("`PROMPT` must hold some text, got none. Give it something to answer.")
    return prompt


def check_sampling(temperature: float, top_p: float, seed: int | None) -> None:
    """Raise a `ValueError` where options of sampling would mean nothing, or are no numbers to sample with."""
    given: Sequence[tuple[str, bool]] = (("--top-p", top_p != 1.0), ("--seed", seed is not None))
    for option, is_given in given:
        if is_given and temperature == 0:
            raise ValueError(f"`{option}` must be left out of greedy answers, got it. Raise `--temperature`, too.")
    if not temperature < float("inf"):
        raise ValueError(f"`--temperature` must be a number from 0 on, got {temperature}. Try 0.7.")
    if not top_p > 0:
        raise ValueError(f"`--top-p` must lie in (0, 1], got {top_p}. Try 0.95.")
