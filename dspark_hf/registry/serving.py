"""What loads the assistants that calls name, itself loaded when the first one does."""

from __future__ import annotations

from typing import Any

from dspark_hf.generation.call.names import serve_names


def serve_drafters() -> None:
    """Let `generate` and pipelines take names as `assistant_model`."""
    serve_names(_assistant_named)


def _assistant_named(name: str, target: Any, *, only_drafters: bool = False) -> Any:
    from dspark_hf.registry.finding import assistant_named

    return assistant_named(name, target, only_drafters=only_drafters)
