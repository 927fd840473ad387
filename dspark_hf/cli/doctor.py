"""`dspark-hf doctor`: whether a drafter belongs to a target, how it is to be read, and what to set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dspark_hf.cli.hints import say_next
from dspark_hf.cli.options import Attention, Dtype, packaged_folder


def doctor(
    target: Annotated[
        str, typer.Argument(help="Folder or hub name of the model to accelerate.", callback=packaged_folder)
    ],
    drafter: Annotated[str, typer.Argument(help="Folder or hub name of its drafter.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts in your own manner, JSON Lines; default: four short questions.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="First prompts of the file.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Length of an answer.")] = 48,
    dtype: Annotated[Dtype, typer.Option(help="auto is the target's own; only fp32 is identical for sure.")] = (
        Dtype.auto
    ),
    device: Annotated[str, typer.Option(help="auto is the GPU if there is one.")] = "auto",
    attention: Annotated[Attention, typer.Option(help="auto is what Transformers chooses.")] = Attention.auto,
    costs: Annotated[bool, typer.Option(help="Time passes and drafts on this machine.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Find out in half a minute why a drafter is of little use: the verdict is also the exit status."""
    # imported here, so that the help is instant
    from dspark_hf.console import printable, quiet_transformers
    from dspark_hf.doctor.diagnosing import diagnose
    from dspark_hf.doctor.display import print_diagnosis
    from dspark_hf.loading import load_drafter, load_target, load_tokenizer, read_drafter_config
    from dspark_hf.prompts import read_prompts

    # what is being done goes beside what was found
    console = Console(stderr=True)
    try:
        asked: Any = None if prompts is None else read_prompts(_file(prompts), num_prompts)
        read_drafter_config(drafter, "DRAFTER")
        with console.status("Loading the models ...") as status:
            with quiet_transformers():
                model = load_target(
                    target, dtype=dtype.value, device=device, attention=attention.value, option="TARGET"
                )
                assistant = load_drafter(drafter, "DRAFTER", dtype=model.dtype).to(model.device)
                tokenizer = load_tokenizer(target, "TARGET")
            diagnosis = diagnose(
                model,
                assistant,
                tokenizer,
                prompts=asked,
                max_new_tokens=max_new_tokens,
                measures_costs=costs,
                say=lambda text: status.update(f"{text} ..."),
            )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(printable(json.dumps(diagnosis.to_dict(), indent=2, allow_nan=False)))
    else:
        shown = Console()
        print_diagnosis(diagnosis, shown)
        if diagnosis.verdict.exit_status == 0:
            say_next(shown, "chat", target, "--drafter", drafter)
    raise typer.Exit(diagnosis.verdict.exit_status)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"`--prompts` must be a file, got {str(path)!r}, which is none. Correct the path.")
    return path
