"""`dspark-hf data`: training conversations in the target's own words."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dspark_hf.cli.hints import say_next
from dspark_hf.cli.options import MODELS, WRITING, Dtype, packaged_folder


def data(
    target: Annotated[
        str, typer.Option(help="Folder or hub name of the model the drafter is for.", callback=packaged_folder)
    ],
    output: Annotated[Path, typer.Option(help="File of conversations, JSON Lines; what is there is continued.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts, JSON Lines, or .txt with one a line.", rich_help_panel="Prompts"),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Dataset of prompts, on the hub or a folder.", rich_help_panel="Prompts")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Its configuration.", rich_help_panel="Prompts")] = None,
    split: Annotated[str, typer.Option(help="Its split.", rich_help_panel="Prompts")] = "train",
    column: Annotated[str, typer.Option(help="Its column.", rich_help_panel="Prompts")] = "prompt",
    opening: Annotated[
        list[str] | None,
        typer.Option(
            help="What the prompts that the target writes start with; may be given several times.",
            rich_help_panel="Prompts",
        ),
    ] = None,
    max_prompt_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Longest user turn the target writes; for base models, the length texts are cut to.",
            rich_help_panel="Prompts",
        ),
    ] = 256,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of prompts never to train on, such as an evaluation set; may be given several times.",
            rich_help_panel="Prompts",
        ),
    ] = None,
    num_conversations: Annotated[
        int | None, typer.Option(min=1, help="Conversations the file is to hold; default: all prompts.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.", rich_help_panel=WRITING)] = 512,
    sampling: Annotated[
        list[str] | None,
        typer.Option(
            help="greedy, TEMPERATURE or TEMPERATURE,TOP_P; several take turns. "
            "Default: greedy, then 0.7,0.95, then 1.0.",
            rich_help_panel=WRITING,
        ),
    ] = None,
    samples_per_prompt: Annotated[
        int, typer.Option(min=1, help="Answers to each prompt, at most one greedy.", rich_help_panel=WRITING)
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is sampled.", rich_help_panel=WRITING)] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts at once; with --server, requests at once.", rich_help_panel=WRITING)
    ] = 32,
    dtype: Annotated[Dtype, typer.Option(help="auto is the target's own.", rich_help_panel=MODELS)] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto is the GPU if there is one.", rich_help_panel=MODELS)] = "auto",
    drafter: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a drafter that speeds the target up.", rich_help_panel=MODELS),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Address of an OpenAI-compatible server of the target, such as http://localhost:8000. Its key, if it "
            "wants one, is read from DSPARK_HF_API_KEY.",
            rich_help_panel="Server",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The target's name there; default: --target.", rich_help_panel="Server")
    ] = None,
    server_token_ids: Annotated[
        bool,
        typer.Option(
            "--server-token-ids", help="Ask for the exact tokens, which vLLM tells.", rich_help_panel="Server"
        ),
    ] = False,
) -> None:
    """Write training conversations in the target's own words; Ctrl-C keeps what is written, the same command goes on.

    Prompts come from a file, from a dataset, or, without either, from the target itself.
    """
    # imported here, so that the help is instant
    from dspark_hf.console import printable
    from dspark_hf.data.server import ServerError
    from dspark_hf.data.session import DataOptions, collect
    from dspark_hf.data.sources import NoNewPromptsError
    from dspark_hf.data.writers import DEFAULT_SAMPLINGS, Sampling
    from dspark_hf.journal import InUseError

    try:
        options = DataOptions(
            target=target,
            output=output,
            prompts=prompts,
            dataset=dataset,
            subset=subset,
            split=split,
            column=column,
            openings=tuple(opening or ()),
            exclude=tuple(exclude or ()),
            num_conversations=num_conversations,
            samplings=tuple(map(Sampling.parse, sampling)) if sampling else DEFAULT_SAMPLINGS,
            samples_per_prompt=samples_per_prompt,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens,
            batch_size=batch_size,
            drafter=drafter,
            server=server,
            model=model,
            server_token_ids=server_token_ids,
            dtype=dtype.value,
            device=device,
            seed=seed,
        )
        result = collect(options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except (InUseError, NoNewPromptsError, ServerError, ImportError, OSError) as error:
        typer.echo(printable(str(error)), err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. {output} is whole; the same command goes on where it was.", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{result.num_conversations} conversations in {output}, {result.num_new} of them new.")
    if result.num_too_long:
        typer.echo(f"{result.num_too_long} prompts were left out: the target has no room for them and an answer.")
    if result.num_refused:
        typer.echo(
            f"{result.num_refused} prompts were left out: the server refused them, the last one {result.last_refusal}",
            err=True,
        )
        if not result.num_conversations:
            raise typer.Exit(1)
    if not result.is_complete:
        typer.echo("There are no more prompts. Give others, or raise --samples-per-prompt.", err=True)
    say_next(Console(), "train", "--target", target, "--data", str(output), "--output", "run")
