"""Around the routes: body limits, request metrics, and errors in one form."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.errors import BadInput
from components.serve.api import Problem
from components.serve.engine import NotReady
from components.serve.metrics import Metrics

_DRAIN_BYTES = 256 * 1024 * 1024
_SHOWN_PROBLEMS = 10


class Limits:
    """Refuses bodies above a size (413) without parsing them; counts and times requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics, limits: dict[str, tuple[int, str]]) -> None:
        """limits: path -> (bytes, the sentence that names the limit); other paths take 1 MiB."""
        self.app, self.metrics, self.limits = app, metrics, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        limit, sentence = self.limits.get(scope["path"], (1 << 20, "at most 1 MiB is taken here"))
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                while message.get("more_body") and size < _DRAIN_BYTES:  # so that the sender gets to read the answer
                    message = await receive()
                    size += len(message.get("body", b""))
                raise HTTPException(413, f"the body has {size} bytes or more; {sentence}")
            return message

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, limited, observed)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            track = scope.get("state", {}).get("track", "")
            self.metrics.requests.labels(path, status, track).inc()
            self.metrics.latency.labels(path).observe(time.perf_counter() - started)


def handle_errors(app: FastAPI) -> None:
    """Every error answers with a Problem: what is wrong, and what to do."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _problem(422, *_explain(error))

    @app.exception_handler(StarletteHTTPException)
    async def http(_: Request, error: StarletteHTTPException) -> JSONResponse:
        if error.status_code == 400 and error.__cause__ is not None:  # FastAPI: the body could not be decoded
            return _problem(422, f"malformed JSON: {error.__cause__}")
        hint = "; /docs shows what there is" if error.status_code in (404, 405) else ""
        return _problem(error.status_code, f"{error.detail}{hint}")

    @app.exception_handler(NotReady)
    async def not_ready(_: Request, error: NotReady) -> JSONResponse:
        return _problem(503, str(error), headers={"Retry-After": "1"})

    @app.exception_handler(BadInput)
    async def bad_input(_: Request, error: BadInput) -> JSONResponse:
        return _problem(422, str(error))

    @app.exception_handler(OSError)
    async def disk(_: Request, error: OSError) -> JSONResponse:
        return _problem(503, f"{error}; nothing was acknowledged, send it again", headers={"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return _problem(500, f"unexpected {type(error).__name__}; the server's log has the details")


def _problem(
    status: int, text: str, detail: list[dict[str, str]] | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(Problem(error=text, detail=detail or []).model_dump(), status, headers)


def _explain(error: RequestValidationError) -> tuple[str, list[dict[str, str]]]:
    problems: list[dict[str, str]] = []
    for entry in error.errors():
        if entry["type"] == "json_invalid":
            reason = entry.get("ctx", {}).get("error", "not JSON")
            return f"malformed JSON at character {entry['loc'][-1]}: {reason}", []
        if entry["loc"] == ("body",) and isinstance(entry["input"], bytes):
            return "the body is not declared as JSON; send it with the header Content-Type: application/json", []
        problems.append({"field": _field(entry["loc"]), "message": _message(entry)})
    shown = problems[:_SHOWN_PROBLEMS]
    text = "; ".join(f"{p['field']}: {p['message']}" for p in shown)
    if len(problems) > len(shown):
        text += f"; and {len(problems) - len(shown)} more"
    return text, shown


def _message(entry: Any) -> str:
    value, message = entry.get("input"), str(entry["msg"])
    shown = isinstance(value, (str, float, bool)) and len(repr(value)) <= 40
    return f"{message}, got {value!r}" if shown else message


def _field(loc: tuple[Any, ...]) -> str:
    parts = [str(part) for part in loc if part != "body"]
    return ".".join(parts) or "body"
