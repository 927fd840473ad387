"""`dspark-hf serve`: a model behind an address, as OpenAI's clients speak to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dspark_hf.cli.options import Dtype

if TYPE_CHECKING:
    from dspark_hf.generation.drafting.interface import Drafter

_SERVING = "Serving"
_BOUNDS = "Bounds"
# models by short names, whose weights install as packages
_PACKAGED = ("smollm2", "gemma")
_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the target, or smollm2 or gemma (packaged).")],
    drafter: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of its drafter; default: drafts looked up in the text."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto is the target's own; only fp32 is identical for sure.")] = (
        Dtype.auto
    ),
    device: Annotated[str, typer.Option(help="auto is the GPU if there is one.")] = "auto",
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
    from dspark_hf.demo.packaged import UnavailableError

    _check_extra()
    console = Console(stderr=True)
    try:
        if api_key is not None and not (api_key.isascii() and api_key.strip() == api_key != ""):
            raise ValueError("`--api-key` must be of visible ASCII characters, got others, or none. Choose another.")
        app = _build(
            console,
            model,
            drafter,
            dtype.value,
            device,
            name=name or model,
            context=context,
            engine_options={"max_rows": max_rows, "max_waiting": max_waiting},
            app_options={"api_key": api_key, "seconds": timeout, "max_body_bytes": max_body_bytes},
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except UnavailableError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    _run(console, app, host, port, is_open=api_key is None and host not in _LOCAL)


def _check_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "prometheus_client", "uvicorn") if find_spec(name) is None]
    if missing:
        typer.echo(f'`serve` needs {", ".join(missing)}: run `pip install "dspark-hf[serve]"`.', err=True)
        raise typer.Exit(2)


def _build(
    console: Console,
    model: str,
    drafter: str | None,
    dtype: str,
    device: str,
    *,
    name: str,
    context: int | None,
    engine_options: dict[str, Any],
    app_options: dict[str, Any],
) -> Any:
    """Return the application, with everything checked that can be before it is started."""
    from dspark_hf.console import quiet_transformers, say
    from dspark_hf.loading import load_target, load_tokenizer, read_drafter_config
    from dspark_hf.serving.app import create_app
    from dspark_hf.serving.engine import Engine
    from dspark_hf.serving.model import ServedModel

    if drafter is not None:
        read_drafter_config(drafter)
    with console.status("Loading the models ..."), quiet_transformers():
        folder = _folder(model)
        tokenizer = load_tokenizer(folder)
        target = load_target(folder, dtype=dtype, device=device)
        assistant = _drafter(drafter, model, target)
        served = ServedModel(name, target, tokenizer, context)
        engine = Engine(target, assistant, **engine_options)
    dtype_name = str(target.dtype).removeprefix("torch.")
    say(console, f"{name} ({dtype_name} on {target.device}), up to {assistant.block_size} drafts a round")
    return create_app(served, engine, **app_options)


def _folder(model: str) -> str:
    from dspark_hf.demo.packaged import converted_target

    is_packaged = model in _PACKAGED and not Path(model).exists()
    return str(converted_target(model)) if is_packaged else model


def _drafter(name: str | None, model: str, target: Any) -> Drafter:
    """Return the drafter that was named, else the one that is shipped for the model, else one that looks drafts up."""
    from dspark_hf.demo.packaged import PACKAGED_MODELS, UnavailableError, shipped_drafter
    from dspark_hf.generation.lookup_assistant import LookupAssistant
    from dspark_hf.loading import load_drafter

    if name is None and model in _PACKAGED and not Path(model).exists():
        try:
            name = str(shipped_drafter(PACKAGED_MODELS[model]))
        except UnavailableError:
            # an installed package has no drafters/ folder
            name = None
    if name is None:
        return LookupAssistant()
    return load_drafter(name, dtype=target.dtype).to(target.device)


def _run(console: Console, app: Any, host: str, port: int, *, is_open: bool) -> None:
    import uvicorn

    from dspark_hf.console import say

    if is_open:
        say(console, f"Whoever reaches {host} may ask: set a key (DSPARK_HF_API_KEY), and read docs/serving.md.")
    # answers that are being written have that long after Ctrl-C
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, ws="none", timeout_graceful_shutdown=10))
    server.run()
    if not server.started:
        raise typer.Exit(1)
