"""The command line: `dspark-hf COMMAND`, or `python -m dspark_hf COMMAND`.

No file of `dspark_hf.cli` imports PyTorch, Transformers or what needs them outside of a function: see `dspark_hf_cli`.
"""

from typing import Annotated

import typer

from dspark_hf.cli.calibrate import calibrate
from dspark_hf.cli.chat import chat
from dspark_hf.cli.command import PackageCommand
from dspark_hf.cli.data import data
from dspark_hf.cli.demo import DRAFTERS, demo
from dspark_hf.cli.doctor import doctor
from dspark_hf.cli.estimate import estimate
from dspark_hf.cli.evaluate import evaluate
from dspark_hf.cli.examples import epilog
from dspark_hf.cli.export import export
from dspark_hf.cli.generate import generate
from dspark_hf.cli.lm_eval import lm_eval
from dspark_hf.cli.profile import profile
from dspark_hf.cli.serve import serve
from dspark_hf.cli.tiny_v4 import tiny_v4
from dspark_hf.cli.train import train

app = typer.Typer(
    name="dspark-hf",
    help="DSpark speculative decoding for Hugging Face Transformers.",
    no_args_is_help=True,
    # commands inherit it
    context_settings={"help_option_names": ["-h", "--help"]},
)
# without its drafters, as from an index or a source archive, it has nothing to show by itself
app.command(cls=PackageCommand, hidden=not any(DRAFTERS.glob("*/config.json")), epilog=epilog("demo"))(demo)
for command in (generate, chat, serve, data, train, calibrate, profile, export):
    app.command(cls=PackageCommand, epilog=epilog(command.__name__))(command)
# arithmetic on a configuration: no model, hence not the package
app.command(epilog=epilog("estimate"))(estimate)
app.command(cls=PackageCommand, epilog=epilog("tiny-v4"))(tiny_v4)
app.command("eval", cls=PackageCommand, epilog=epilog("eval"))(evaluate)
app.command(cls=PackageCommand, epilog=epilog("doctor"))(doctor)
# its options are the harness's, which says itself what is wrong with them
_ANY_OPTION = {"ignore_unknown_options": True}
app.command("lm-eval", cls=PackageCommand, epilog=epilog("lm-eval"), context_settings=_ANY_OPTION)(lm_eval)


@app.command(epilog=epilog("version"))
def version() -> None:
    """Print the versions of what decides the output."""
    # imported here, so that the help is instant
    from importlib import metadata

    from dspark_hf.version import __version__

    typer.echo(f"dspark-hf {__version__}")
    for package in ("transformers", "torch"):
        typer.echo(f"{package} {metadata.version(package)}")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from dspark_hf.version import __version__

        typer.echo(f"dspark-hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""
