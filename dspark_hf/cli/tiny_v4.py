"""`dspark-hf tiny-v4`: a tiny random DeepSeek-V4 checkpoint in the released layout."""

import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Experts(str, Enum):
    """How the routed experts are stored."""

    fp4 = "fp4"
    fp8 = "fp8"
    bf16 = "bf16"


def tiny_v4(
    output: Annotated[Path, typer.Option("--output", "--out", help="Folder to write, absent or empty.")],
    experts: Annotated[
        Experts,
        typer.Option(help="fp4 as Flash and Pro (other matrices FP8), fp8 as their -Base, bf16: nothing quantised."),
    ] = Experts.fp4,
    dspark: Annotated[bool, typer.Option(help="Put a DSpark module (mtp.*) inside.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write a tiny random DeepSeek-V4 checkpoint, to try everything on before the real weights."""
    # imported here, so that the help is instant
    from dspark_hf.files import write_whole_folder
    from dspark_hf.modeling.deepseek_v4.tiny import write_tiny_checkpoint

    def write(folder: Path) -> None:
        write_tiny_checkpoint(folder, seed=seed, experts=experts.value, with_dspark=dspark)

    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"`--output` must be absent or empty, got {str(output)!r}. Name another, or empty it.")
        write_whole_folder(output, write)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"Written: {output}")
    name = shlex.quote(str(output))
    typer.echo(f"Next: python examples/deepseek_v4_inference.py {name}, in a checkout, or load it in Python:")
    typer.echo(f"    dspark_hf.DeepseekV4DSparkForCausalLM.from_pretrained({str(output)!r})")
