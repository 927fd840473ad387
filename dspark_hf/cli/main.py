"""The command line: `dspark-hf COMMAND`, or `python -m dspark_hf COMMAND`."""

from __future__ import annotations

from importlib import metadata

import typer

from dspark_hf.cli.calibrate import calibrate
from dspark_hf.cli.data import data
from dspark_hf.cli.demo import demo
from dspark_hf.cli.estimate import estimate
from dspark_hf.cli.evaluate import evaluate
from dspark_hf.cli.profile import profile
from dspark_hf.cli.tiny_v4 import tiny_v4
from dspark_hf.cli.train import train

app = typer.Typer(
    name="dspark-hf",
    help="DSpark speculative decoding for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
)
for command in (demo, data, train, calibrate, profile, estimate, tiny_v4):
    app.command()(command)
app.command("eval")(evaluate)


@app.command()
def version() -> None:
    """Print the versions of what decides the output."""
    for package in ("dspark-hf", "transformers", "torch"):
        typer.echo(f"{package} {metadata.version(package)}")
