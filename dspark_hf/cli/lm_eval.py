"""`dspark-hf lm-eval`: lm-evaluation-harness's own command, which knows the model `dspark-hf` here."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def lm_eval(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="WORDS", help="What `lm-eval` takes; its own help: dspark-hf lm-eval -- run -h"),
    ] = None,
) -> None:
    """Run lm-evaluation-harness (`lm-eval`), where the model `dspark-hf` is `hf` with a drafter: the same scores."""
    # imported here, so that the help is instant
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        typer.echo('`lm-eval` needs lm_eval: run `pip install "dspark-hf[lm-eval]"`.', err=True)
        raise typer.Exit(2)
    from lm_eval.__main__ import cli_evaluate

    # it reads the process's arguments
    sys.argv = ["lm-eval", *(words or [])]
    cli_evaluate()
