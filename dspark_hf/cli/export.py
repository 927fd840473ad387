"""`dspark-hf export`: a drafter in the layout of another project."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dspark_hf.cli.hints import say_next
from dspark_hf.cli.options import packaged_folder
from dspark_hf.console import say


class Layout(str, Enum):
    """Layouts that a drafter can be written in."""

    deepspec = "deepspec"
    speculators = "speculators"
    specforge = "specforge"
    custom_generate = "custom_generate"


def export(
    drafter: Annotated[str, typer.Argument(help="Folder or hub name of the drafter, in any layout that is read.")],
    to: Annotated[Layout, typer.Option(help="Whose layout to write; custom_generate: code for Transformers alone.")],
    output: Annotated[Path, typer.Option(help="Folder to write, absent or empty.")],
    target: Annotated[
        str | None,
        typer.Option(help="Its target, for drafters that borrow the target's vocabulary.", callback=packaged_folder),
    ] = None,
) -> None:
    """Write a drafter in the layout of another project, bit for bit."""
    # imported here, so that the help is instant
    from dspark_hf.console import quiet_transformers
    from dspark_hf.files import write_whole_folder
    from dspark_hf.generation.targets.adapter import TargetAdapter
    from dspark_hf.loading import load_target
    from dspark_hf.modeling.formats import writing
    from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel

    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"`--output` must be absent or empty, got {str(output)!r}. Name another, or empty it.")
        with quiet_transformers():
            loaded = DSparkAssistantModel.from_pretrained(drafter)
            lender = None if target is None else TargetAdapter(load_target(target, device="cpu"))
            write_whole_folder(output, lambda folder: writing.export(loaded, to.value, folder, lender))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    console = Console()
    say(console, f"Written: {output}")
    if to is Layout.custom_generate:
        # needs no dspark-hf any more
        say(console, f"Next: target.generate(**inputs, custom_generate={str(output)!r}, trust_remote_code=True)")
        return
    say_next(console, "eval", "--target", target or "TARGET", "--drafter", str(output), "questions.jsonl")
