"""The HTTP face of a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST

from components.serve.api import (
    EventsBody,
    EventsRecorded,
    Problem,
    RankBody,
    Ranked,
    RecommendBody,
    Recommended,
    Status,
)
from components.serve.config import ServeConfig
from components.serve.http import Limits, handle_errors
from components.serve.server import Server

EVENTS_BYTES = 16 << 20
_BYTES_PER_ID = 22
_DESCRIPTION = """
Recommendations from a model that keeps learning.

1. `POST /v1/recommend` (or `/v1/rank` for your own candidates) answers with items, a `request_id` and a `timestamp_us`.
2. Show the items, then report each as an impression to `POST /v1/events`, with `request_id`, `timestamp_us`, `version`,
   `delta`, `track` and `score` copied from the answer. Report what the user does with them as actions.
3. The user's next request sees these events at once; the next training window learns from them.

Ids are signed 64-bit integers (JavaScript's numbers round those beyond 2^53), times are microseconds since 1970-01-01
UTC. Errors answer with what is wrong and what to do.
"""
_TAGS = [
    {"name": "recommendations", "description": "What to show."},
    {"name": "events", "description": "What was shown and what the user did."},
    {"name": "operations", "description": "Is it alive, is it ready, what does it serve."},
]
_Result = TypeVar("_Result")


def _problems(**statuses: str) -> dict[int | str, dict[str, Any]]:
    return {int(code[1:]): {"model": Problem, "description": text} for code, text in statuses.items()}


_UNREADY = "No champion is loaded yet; the text says what to do."


def create_app(server: Server) -> FastAPI:
    """The application; it starts and stops the server with itself."""
    pool = ThreadPoolExecutor(server.config.threads, thread_name_prefix="scoring")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(server.start)
        yield
        pool.shutdown(wait=True)
        await asyncio.to_thread(server.stop)

    app = FastAPIOffline(
        title="Freshet", version="0.1.0", description=_DESCRIPTION, openapi_tags=_TAGS, lifespan=lifespan
    )
    app.add_middleware(Limits, metrics=server.metrics, limits=_limits(server.config))
    handle_errors(app)
    _add_recommendations(app, server, pool)
    _add_events(app, server)
    _add_operations(app, server)
    return app


def _limits(config: ServeConfig) -> dict[str, tuple[int, str]]:
    ids = config.max_candidates * _BYTES_PER_ID + 65_536
    exclude = 10_000 * _BYTES_PER_ID + 65_536
    return {
        "/v1/rank": (ids, f"at most {config.max_candidates} candidates are taken; split the list"),
        "/v1/recommend": (exclude, f"at most {exclude} are taken, with at most 10000 excluded items"),
        "/v1/events": (EVENTS_BYTES, f"at most {EVENTS_BYTES} are taken; send the events in several requests"),
    }


async def _in(pool: ThreadPoolExecutor, function: Callable[[Any], _Result], body: Any) -> _Result:
    return await asyncio.get_running_loop().run_in_executor(pool, function, body)


def _add_recommendations(app: FastAPI, server: Server, pool: ThreadPoolExecutor) -> None:
    @app.post(
        "/v1/recommend",
        tags=["recommendations"],
        summary="The best items for a user",
        responses=_problems(_413="The body is too large.", _422="The body is wrong.", _503=_UNREADY),
    )
    async def recommend(body: RecommendBody, request: Request) -> Recommended:
        """The retriever picks among the items available now, the ranker orders them by score; some slots explore.

        An unknown user gets what is best without a history. Fewer than `k` items come back when fewer are available.
        """
        answer = await _in(pool, server.recommender.recommend, body)
        request.state.track = answer.track
        return answer

    @app.post(
        "/v1/rank",
        tags=["recommendations"],
        summary="Candidates in order for a user",
        responses=_problems(_413="Too many candidates.", _422="The body is wrong.", _503=_UNREADY),
    )
    async def rank(body: RankBody, request: Request) -> Ranked:
        """Scores each candidate on its own: a score does not depend on the other candidates.

        An item that nothing has been learned of is scored from its initial embedding and has `known: false`.
        """
        limit = server.config.max_candidates
        if len(body.candidates) > limit:
            raise HTTPException(
                413, f"{len(body.candidates)} candidates; at most {limit} candidates are taken; split the list"
            )
        answer = await _in(pool, server.recommender.rank, body)
        request.state.track = answer.track
        return answer


def _add_events(app: FastAPI, server: Server) -> None:
    @app.post(
        "/v1/events",
        tags=["events"],
        status_code=202,
        summary="Record impressions and actions",
        responses={
            202: {"description": "At least one row was recorded (or none was sent). What is accepted is on disk."},
            422: {"model": EventsRecorded | Problem, "description": "Every row was refused, or the body is wrong."},
            413: {"model": Problem, "description": "The body is too large."},
            503: {"model": Problem, "description": "The disk refused; nothing was acknowledged, send it again."},
        },
    )
    async def events(body: EventsBody, response: Response) -> EventsRecorded:
        """Rows are checked one by one; the refused ones are listed with a reason and kept in quarantine.

        Sending a row again does no harm: of rows with the same key (request_id, item_id and, for actions, user_id and
        action) one counts.
        """
        recorded = await server.intake.record(body, server.journal)
        if recorded.rejected and not recorded.accepted:
            response.status_code = 422
        return recorded


def _add_operations(app: FastAPI, server: Server) -> None:
    @app.get("/livez", tags=["operations"], summary="Is the process alive?")
    async def livez() -> dict[str, str]:
        """200 as long as the process answers."""
        return {"status": "alive"}

    @app.get(
        "/readyz",
        tags=["operations"],
        summary="Can it answer requests?",
        responses=_problems(_503=_UNREADY),
    )
    async def readyz() -> JSONResponse:
        """200 once a champion is loaded and there are items; 503 says what is missing."""
        reason = server.engine.why_not_ready()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse(Problem(error=reason, detail=[]).model_dump(), 503, {"Retry-After": "1"})

    @app.get("/v1/status", tags=["operations"], summary="What is served right now")
    def status() -> Status:
        """Tracks with versions, delta numbers and served event age; the stage of the rollout; trouble."""
        return server.status()

    @app.get(
        "/metrics",
        tags=["operations"],
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "Prometheus exposition format."}},
    )
    def metrics() -> Response:
        """Counters, gauges and histograms."""
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)
