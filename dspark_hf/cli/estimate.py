"""`dspark-hf estimate`: memory and FLOPs of a DeepSeek-V4 model from its configuration alone."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dspark_hf.cli.hints import say_next
from dspark_hf.modeling.deepseek_v4.estimation.formats import CacheFormat, WeightFormat


def estimate(
    model: Annotated[
        str,
        typer.Argument(
            help="deepseek-ai/DeepSeek-V4-Flash, -V4-Pro (also their -Base, -DSpark, -0731, -0813) or -V3.2, known "
            "offline; or a folder or hub name of a deepseek_v4 or deepseek_v32 configuration."
        ),
    ],
    context: Annotated[int, typer.Option(help="Tokens in each sequence.")] = 2**20,
    batch_size: Annotated[int, typer.Option(help="Sequences.")] = 1,
    dtype: Annotated[
        WeightFormat, typer.Option(help="How the matrices that the release quantises are stored.")
    ] = WeightFormat.released,
    cache_dtype: Annotated[
        CacheFormat, typer.Option(help="How the entries of the KV cache are stored.")
    ] = CacheFormat.released,
    output: Annotated[Path | None, typer.Option("--output", "--json", help="JSON file of all numbers.")] = None,
) -> None:
    """Estimate memory and FLOPs from the configuration alone, beside DeepSeek-V3.2; which devices suffice."""
    # imported here, so that the help is instant
    from dspark_hf.files import write_whole
    from dspark_hf.modeling.deepseek_v4.estimation.report import EstimationSettings, make_report, to_json
    from dspark_hf.modeling.deepseek_v4.estimation.report_tables import print_report

    console = Console()
    try:
        if output is not None and output.is_dir():
            raise ValueError(f"`--output` must be a file, got the folder {str(output)!r}. Name a file in it.")
        report = make_report(model, EstimationSettings(context, batch_size, dtype, cache_dtype))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    print_report(report, console)
    if output is not None:
        try:
            write_whole(output, to_json(report).encode())
        except OSError as error:
            raise typer.BadParameter(
                f"`--output` must be a file that can be written, got {str(output)!r}. Name another. ({error})"
            ) from error
        console.print(f"Written: {output}", soft_wrap=True, markup=False)
    say_next(console, "tiny-v4", "--output", "tiny")
