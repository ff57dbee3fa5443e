"""The server's HTTP API as the users' apps call it: patient through restarts, clear when it gives up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_exponential

from components.errors import FreshetError


class Shown(BaseModel):
    """One recommended item."""

    item_id: int
    position: int
    score: float | None = None


class Slate(BaseModel):
    """The answer of /v1/recommend, as far as users need it."""

    request_id: int
    timestamp_us: int
    user_id: int
    items: list[Shown]
    version: int | None = None
    delta: int | None = None
    track: str | None = None


class Rejection(BaseModel):
    kind: str
    reason: str


class Acknowledgement(BaseModel):
    """The answer of /v1/events: what was stored durably and what was not."""

    accepted: int
    rejected: list[Rejection] = []
    unmatched_actions: int = 0


Answer = TypeVar("Answer", bound=BaseModel)


class Unavailable(Exception):
    """The server answered with 429 or 5xx: it may recover."""


class ServerGone(FreshetError):
    """The server has not answered a call for `give_up_s`."""


class Refused(FreshetError):
    """The server answered 4xx: repeating the call would not help."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"{response.request.url} answered {response.status_code}: {response.text[:500]}")
        self.response = response


class Client:
    """POST with retries. `retries` counts repeated calls, `latencies` the seconds of each successful recommendation."""

    def __init__(self, base_url: str, give_up_s: float, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.base_url, self.give_up_s = base_url, give_up_s
        self.http = httpx.AsyncClient(base_url=base_url, transport=transport, timeout=httpx.Timeout(10.0))
        self.retries = 0
        self.latencies: list[float] = []

    async def recommend(self, user_id: int, k: int, page: int) -> Slate:
        response, seconds = await self._post("/v1/recommend", {"user_id": user_id, "k": k, "page": page})
        self.latencies.append(seconds)
        return self._read(Slate, response)

    async def send(self, impressions: list[dict[str, Any]], actions: list[dict[str, Any]]) -> Acknowledgement:
        """What became of the events; Refused when the server rejects the call itself and not its rows."""
        try:
            response, _ = await self._post("/v1/events", {"impressions": impressions, "actions": actions})
        except Refused as refusal:  # also the status when every row is rejected
            try:
                return Acknowledgement.model_validate_json(refusal.response.content)
            except ValidationError:
                raise refusal from None
        return self._read(Acknowledgement, response)

    def _read(self, kind: type[Answer], response: httpx.Response) -> Answer:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise FreshetError(
                f"{response.request.url} answered something else than expected ({error}); is --server a Freshet server?"
            ) from error

    async def close(self) -> None:
        await self.http.aclose()

    async def _post(self, path: str, body: Mapping[str, Any]) -> tuple[httpx.Response, float]:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type((httpx.TransportError, Unavailable)),
            wait=wait_exponential(multiplier=0.1, max=2.0),
            stop=stop_after_delay(self.give_up_s),
            before_sleep=self._count,
            reraise=True,
        )
        try:
            return await retrying(self._post_once, path, body)
        except (httpx.TransportError, Unavailable) as error:
            raise ServerGone(
                f"{self.base_url}{path} has not answered for {self.give_up_s:g} s ({error or type(error).__name__}); "
                "start the server with python -m components.serve, or set --server"
            ) from error

    async def _post_once(self, path: str, body: Mapping[str, Any]) -> tuple[httpx.Response, float]:
        started = time.perf_counter()
        response = await self.http.post(path, json=body)
        if response.status_code == 429 or response.status_code >= 500:
            raise Unavailable(f"status {response.status_code}: {response.text[:200]}")
        if response.status_code >= 400:
            raise Refused(response)
        return response, time.perf_counter() - started

    def _count(self, _: RetryCallState) -> None:
        self.retries += 1
