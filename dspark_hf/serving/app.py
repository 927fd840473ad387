"""The server's addresses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dspark_hf.serving.engine import Engine
from dspark_hf.serving.errors import ApiError, describe_slips, shorten
from dspark_hf.serving.gate import Gate
from dspark_hf.serving.metrics import Metrics
from dspark_hf.serving.model import ServedModel
from dspark_hf.serving.schemas import ChatBody, CompletionBody, LoadBody
from dspark_hf.serving.service import Service

_PATHS = (
    "POST /v1/chat/completions, POST /v1/completions, POST /load_model, GET /v1/models, GET /health and GET /metrics"
)


def create_app(
    model: ServedModel,
    engine: Engine,
    *,
    api_key: str | None = None,
    seconds: float = 600.0,
    max_body_bytes: int = 2**20,
    is_local: bool = False,
) -> FastAPI:
    """Return the application that serves a model; starting it starts the engine, and so on.

    Args:
        model: what is served.
        engine: what decodes; it belongs to the application.
        api_key: what clients must know, or None.
        seconds: how long a request may take, waiting included.
        max_body_bytes: size of a request's body at most.
        is_local: whether only requests are answered that were sent to a name of this machine itself.
    """
    metrics = Metrics(engine)
    service = Service(model, engine, metrics, seconds)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            # its thread may be in the middle of a round
            await asyncio.to_thread(engine.close)
            service.close()

    # no pages: they would load scripts from elsewhere
    app = FastAPI(title="dspark-hf", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, api_key=api_key, max_body_bytes=max_body_bytes, is_local=is_local)
    _add_errors(app, metrics)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: Request) -> Response:
        return await service.serve(body, http)

    @app.post("/v1/completions")
    async def complete(body: CompletionBody, http: Request) -> Response:
        return await service.serve(body, http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(model)]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_name(name, model)
        return _card(model)

    @app.post("/load_model")
    async def load(body: LoadBody) -> Response:
        # what `transformers chat` waits for before its first question
        _check_name(body.model, model)
        event = json.dumps({"status": "ready", "model": model.name, "cached": True})
        return Response(f"data: {event}\n\n", media_type="text/event-stream")

    @app.get("/health")
    async def health() -> Response:
        down = engine.down
        body = {"status": "ok" if down is None else down, "waiting": engine.num_waiting, "running": engine.num_running}
        return JSONResponse(body, 200 if down is None else 503)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")

    return app


def _check_name(name: str, model: ServedModel) -> None:
    if name != model.name:
        raise ApiError(404, f"`model` must be {model.name!r} here, got another. Correct it.", param="model")


def _card(model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "dspark-hf", "max_model_len": model.context}


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: Request, error: RequestValidationError) -> Response:
        metrics.count_end("refused")
        message, param = describe_slips(error.errors())
        return JSONResponse(ApiError(400, message, param=param).body(), 400)

    @app.exception_handler(HTTPException)
    async def refuse_path(http: Request, error: HTTPException) -> Response:
        asked = shorten(f"{http.method} {http.url.path}")
        message = f"the address must be one of {_PATHS}, got {asked}. Use one of them: this server does nothing else."
        return JSONResponse(
            ApiError(error.status_code, message, code="unknown_url").body(), error.status_code, error.headers
        )
