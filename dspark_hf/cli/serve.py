"""`dspark-hf serve`: a model behind an address, as OpenAI's clients speak to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dspark_hf.cli import options

if TYPE_CHECKING:
    from dspark_hf.cli.answering import Asked
    from dspark_hf.serving.engine import Engine
    from dspark_hf.serving.model import ServedModel

_SERVING = "Serving"
_BOUNDS = "Bounds"


def serve(
    model: options.ModelArgument,
    drafter: options.DrafterOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    host: Annotated[
        str, typer.Option(help="Address to listen at; others reach 0.0.0.0.", rich_help_panel=_SERVING)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.", rich_help_panel=_SERVING)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="DSPARK_HF_API_KEY",
            help="What clients must know; other users of this machine read options, but not variables.",
            rich_help_panel=_SERVING,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: MODEL.", rich_help_panel=_SERVING)
    ] = None,
    scheduler: options.SchedulerOption = None,
    num_drafts: options.NumDraftsOption = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Requests decoded together.", rich_help_panel=_BOUNDS)] = 8,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Requests that wait; more are told to come back.", rich_help_panel=_BOUNDS)
    ] = 64,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for a request, waiting included.", rich_help_panel=_BOUNDS)
    ] = 600.0,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of prompt and answer; default: the target's own.", rich_help_panel=_BOUNDS),
    ] = None,
    max_body_bytes: Annotated[
        int, typer.Option(min=1024, help="Size of a request's body.", rich_help_panel=_BOUNDS)
    ] = 2**20,
) -> None:
    """Serve a model to OpenAI's clients: chats and texts, many at a time, from this machine alone unless told."""
    # imported here, so that the help is instant
    from dspark_hf.cli.answering import Asked

    _check_extra()
    console = Console(stderr=True)
    try:
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
            raise ValueError("`--api-key` must be of visible ASCII characters, got others. Choose another.")
        if api_key == "":
            raise ValueError("`--api-key` must be a key, got an empty one. Leave it out to serve without.")
        asked = Asked(model, drafter, dtype.value, device, options.value_of(scheduler), num_drafts)
        served = _load(asked, name or model, context, console)
        drafting = {"scheduler": asked.scheduler, "num_drafts": num_drafts}
        engine = _start(served, console, max_rows=max_rows, max_waiting=max_waiting, **drafting)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    from dspark_hf.serving.app import create_app
    from dspark_hf.serving.gate import LOCAL_HOSTS

    bounds: dict[str, Any] = {"seconds": timeout, "max_body_bytes": max_body_bytes}
    has_no_key, is_here = api_key is None, host in LOCAL_HOSTS
    app = create_app(served[0], engine, api_key=api_key, is_local=has_no_key and is_here, **bounds)
    if has_no_key and is_here and port:
        _say_how_to_ask(console, f"http://{host}:{port}", served[0].name)
    _run(console, app, host, port, is_open=has_no_key and not is_here)


def _check_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "prometheus_client", "uvicorn") if find_spec(name) is None]
    if missing:
        typer.echo(f'`serve` needs {", ".join(missing)}: run `pip install "dspark-hf[serve]"`.', err=True)
        raise typer.Exit(2)


def _load(asked: Asked, name: str, context: int | None, console: Console) -> tuple[ServedModel, Any]:
    """Return the model with its tokenizer, and its drafter."""
    from dspark_hf.cli.answering import drafter_for, open_tokenizer
    from dspark_hf.console import quiet_transformers
    from dspark_hf.loading import load_target
    from dspark_hf.serving.model import ServedModel

    folder, tokenizer = open_tokenizer(asked, console)
    with console.status("Loading the models ..."), quiet_transformers():
        target = load_target(folder, dtype=asked.dtype, device=asked.device, option="MODEL")
        return ServedModel(name, target, tokenizer, context), drafter_for(target, asked)


def _start(served: tuple[ServedModel, Any], console: Console, **options: Any) -> Engine:
    """Return what will decode, after a word on who that is."""
    from dspark_hf.console import say
    from dspark_hf.serving.engine import Engine

    model, drafter = served
    engine = Engine(model.target, drafter, **options)
    dtype = str(model.target.dtype).removeprefix("torch.")
    say(
        console,
        f"{model.name} ({dtype} on {model.target.device}, {model.context} tokens of context), up to "
        f"{options['num_drafts'] or drafter.block_size} drafts a round{_origin(drafter)}",
    )
    return engine


def _origin(drafter: Any) -> str:
    from dspark_hf.generation.lookup_assistant import LookupAssistant

    return ", looked up in the text: no drafter known (--drafter names one)" * isinstance(drafter, LookupAssistant)


def _say_how_to_ask(console: Console, address: str, name: str) -> None:
    import json
    import shlex

    from dspark_hf.console import say

    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Name a planet."}]})
    words = ("curl", f"{address}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body)
    say(console, f"Once it runs: {shlex.join(words)}")


def _run(console: Console, app: Any, host: str, port: int, *, is_open: bool) -> None:
    import uvicorn

    from dspark_hf.console import say

    if is_open:
        say(console, f"Whoever reaches {host} may ask: set a key (DSPARK_HF_API_KEY), or listen at 127.0.0.1.")
    # answers that are being written have that long after Ctrl-C
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, ws="none", timeout_graceful_shutdown=10))
    server.run()
    if not server.started:
        raise typer.Exit(1)
