"""`dspark-hf estimate`: memory and FLOPs of a DeepSeek-V4 model from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
    json: Annotated[Path | None, typer.Option(help="File to write all numbers to.")] = None,
) -> None:
    """Estimate memory and FLOPs from the configuration alone, beside DeepSeek-V3.2; which devices suffice."""
    # imported here, so that the help is instant
    from dspark_hf.files import write_whole
    from dspark_hf.modeling.deepseek_v4.estimation.display import print_report
    from dspark_hf.modeling.deepseek_v4.estimation.report import EstimationSettings, make_report, to_json

    console = Console()
    try:
        if json is not None and json.is_dir():
            raise ValueError(f"`--json` must be a file, got the folder {str(json)!r}. Name a file in it.")
        report = make_report(model, EstimationSettings(context, batch_size, dtype, cache_dtype))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    print_report(report, console)
    if json is not None:
        try:
            write_whole(json, to_json(report).encode())
        except OSError as error:
            raise typer.BadParameter(
                f"`--json` must be a file that can be written, got {str(json)!r}. Name another. ({error})"
            ) from error
        console.print(f"Written: {json}", soft_wrap=True, markup=False)
