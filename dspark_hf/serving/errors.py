"""What a client is told when its request is not served, in the shape that OpenAI's clients read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_hf.console import printable

_KINDS = ("str", "int")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that is not served.

    Args:
        status: the HTTP status.
        message: what is wrong, and the remedy.
        param: the field that is wrong.
        code: a word that programs may act on.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """What goes into the response's head."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        """Return the response's body."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def describe_slips(problems: Sequence[Any]) -> tuple[str, str | None]:
    """Return a sentence about what is wrong with a body, as pydantic found it, and the field."""
    # of a field's possible kinds, the one that the value came nearest to
    problem = max(problems, key=lambda one: len(one["loc"]))
    message = printable(_describe(problem))
    field = re.match(r"`(\w+)", message)
    return message, None if field is None else field[1]


def _describe(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    # "body" is where FastAPI found it; the members of a union are pydantic's own words
    name = ".".join(str(part) for part in problem["loc"][1:] if part not in _KINDS and "[" not in str(part))
    if problem["type"] == "json_invalid" or not name:
        return "the body must be a JSON object with the header `Content-Type: application/json`, got another. Mend it."
    if problem["type"] == "missing":
        return f"`{name}` must be given, got none. Add it."
    if problem["type"] == "extra_forbidden":
        return f"`{name}` must be left out, got it. This server cannot honour it, and ignores nothing."
    rule = str(problem["msg"]).replace("Input should", "must").replace("List should", "must")
    return f"`{name}` {rule}, got {shorten(problem.get('input'))}. Correct it."


def shorten(value: Any) -> str:
    """Return a value as an error shows it."""
    shown = ascii(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
