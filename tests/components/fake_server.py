"""The HTTP API of the server with a shelf for a model: what traffic and other clients are tested against."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from components.world.world import World


class FakeServer:
    """Recommends random living items of a world and keeps every event; `failures` calls are answered 503 first."""

    def __init__(
        self,
        world: World,
        failures: int = 0,
        recommend_status: int = 200,
        only: list[int] | None = None,
        reject_items: bool = False,
    ) -> None:
        self.only, self.reject_items = only, reject_items
        self.world, self.failures, self.recommend_status = world, failures, recommend_status
        self.impressions: list[dict[str, Any]] = []
        self.actions: list[dict[str, Any]] = []
        self.early: list[dict[str, Any]] = []
        self.served: dict[int, dict[str, Any]] = {}
        self.rng = np.random.default_rng(0)
        self.app = FastAPI()
        self.app.add_api_route("/v1/recommend", self.recommend, methods=["POST"])
        self.app.add_api_route("/v1/events", self.events, methods=["POST"])

    def now_us(self) -> int:
        return time.time_ns() // 1000

    def recommend(self, body: dict[str, Any]) -> Response:
        if self.failures:
            self.failures -= 1
            return JSONResponse({"detail": "starting"}, status_code=503)
        if self.recommend_status != 200:
            return JSONResponse({"detail": f"unknown user {body['user_id']}"}, status_code=self.recommend_status)
        now = self.now_us()
        items = self.rng.choice(self.only or self.world.alive(now), body["k"], replace=False)
        answer = {
            "request_id": len(self.served) + 1,
            "timestamp_us": now,
            "user_id": body["user_id"],
            "items": [
                {"item_id": int(item), "score": 1.0 - n / 100, "position": n, "explored": False}
                for n, item in enumerate(items)
            ],
            "version": 3,
            "retriever_version": 4,
            "delta": 11,
            "track": "champion" if body["user_id"] % 2 else "challenger",
        }
        self.served[answer["request_id"]] = answer | {"page": body["page"]}
        return JSONResponse(answer)

    def events(self, body: dict[str, Any]) -> Response:
        now = self.now_us()
        self.early += [e for kind in ("impressions", "actions") for e in body[kind] if e["timestamp_us"] > now]
        self.impressions += body["impressions"]
        self.actions += body["actions"]
        known = {(e["request_id"], e["item_id"]) for e in self.impressions}
        rejected = [
            {"kind": "impressions", "index": n, "reason": "unknown item"}
            for n, _ in enumerate(body["impressions"])
            if self.reject_items
        ]
        unmatched = sum((e["request_id"], e["item_id"]) not in known for e in body["actions"])
        accepted = len(body["impressions"]) + len(body["actions"]) - len(rejected)
        answer = {"accepted": accepted, "rejected": rejected, "unmatched_actions": unmatched}
        return JSONResponse(answer, 422 if rejected and not accepted else 202)
