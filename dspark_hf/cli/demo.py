"""`dspark-hf demo`: a packaged model answers questions, plain and with its drafter."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dspark_hf.cli.hints import say_next
from dspark_hf.cli.options import PackagedModel

# part of the repository, not of the installed package
DRAFTERS = Path(__file__).parents[2] / "drafters"


class Dtype(str, Enum):
    """What target and drafter compute in; `auto` is what is faster here."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


def demo(
    model: Annotated[PackagedModel, typer.Option(help="Packaged target to answer.")] = PackagedModel.smollm2,
    dtype: Annotated[Dtype, typer.Option(help="auto: the faster one here. bf16 may decide near ties otherwise.")] = (
        Dtype.auto
    ),
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Length of an answer.")] = 96,
    num_prompts: Annotated[int, typer.Option("--num-prompts", "--prompts", min=1, help="Prompts of each kind.")] = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", "--runs", min=1, help="Answers to a prompt, plain and drafted; medians count.")
    ] = 3,
    drafter: Annotated[str | None, typer.Option(help="Folder or hub name of another drafter.")] = None,
    target: Annotated[str | None, typer.Option(help="Folder or hub name of another target; needs --drafter.")] = None,
) -> None:
    """Answer questions with and without a drafter: the same text, in fewer passes of the target."""
    # imported here, so that the help is instant
    from dspark_hf.demo.app import DemoOptions, run_demo
    from dspark_hf.demo.packaged import UnavailableError
    from dspark_hf.loading import check_slip, read_drafter_config

    console = Console()
    try:
        if drafter is not None:
            read_drafter_config(drafter)
        if target is not None:
            check_slip(target, "--target")
        options = DemoOptions(
            model=model.value,
            target=target,
            drafter=drafter,
            dtype=dtype.value,
            max_new_tokens=max_new_tokens,
            num_prompts=num_prompts,
            num_runs=repeats,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        is_right = run_demo(options, console)
    except UnavailableError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not is_right:
        raise typer.Exit(1)
    say_next(console, "chat", *((target, "--drafter", str(drafter)) if target is not None else (model.value,)))
