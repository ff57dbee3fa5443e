"""A storage root with published releases, logged traffic and a server's status: what a rollout looks at."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa

from components.parameters.log import LogManifest, manifest_path
from components.rollout.assignment import serves_challenger
from components.rollout.state import RolloutState
from components.schemas import ACTION_EVENTS, IMPRESSIONS
from components.serve.api import Status, TrackStatus
from components.storage import Storage


def publish(storage: Storage, version: int, auc: float = 0.7, champion: int = 1) -> None:
    """What the gate reads of a published release: its metrics, and those of the champion on the same events."""
    beside = {"champion_version": champion, "champion_auc_click": 0.7, "champion_ne_click": 0.9}
    for model in ("ranker", "retriever"):
        metrics = {"auc_click": auc, "ne_click": 0.9, **beside}
        entry: dict[str, Any] = {"n": 0, "kind": "snapshot", "model": model, "version": version, "metrics": metrics}
        empty: dict[str, Any] = {"windows": [], "rows": {}, "tombstones": {}, "files": {}, "parent": None}
        manifest = LogManifest.model_validate(entry | empty).encoded()
        storage.create(manifest_path(model, version, "snapshot", 0), manifest)


def log_traffic(
    storage: Storage, state: RolloutState, at: datetime, users: range, click_rate: dict[str, float], per_user: int = 10
) -> None:
    """Impressions of these users at `at`, each on the track that is theirs, clicked at about the track's rate."""
    impressions, actions = [], []
    for user in users:
        track = "challenger" if serves_challenger(user, state.salt, state.share) else "champion"
        for place in range(per_user):
            row = {"request_id": user, "user_id": user, "item_id": place, "timestamp": at, "received_at": at}
            impressions.append({**row, "position": place, "page": 0, "track": track})
            if random.Random(user * 1000 + place).random() < click_rate[track]:
                actions.append({**row, "action": "click"})
                actions.append({**row, "action": "like"})
    folder = f"dt={at:%Y-%m-%d}/hour={at:%H}"
    # Actions first: they count once their impressions are there, so that nobody who looks meanwhile sees half of it.
    for kind, rows, schema in (("actions", actions, ACTION_EVENTS), ("impressions", impressions, IMPRESSIONS)):
        columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
        table = pa.Table.from_arrays(columns, schema=schema)
        for name in ("first", "again"):  # the same events twice: they must count once
            storage.write_table(f"events/{kind}/{folder}/{name}-{at:%M%S}.parquet", table)


def log_shadow(storage: Storage, at: datetime, version: int, requests: int, failed: int = 0) -> None:
    """Shadow rows: two scored items for each request, or one row with an error."""
    rows: list[dict[str, Any]] = []
    for request in range(requests):
        row = {"request_id": request, "user_id": request, "timestamp": at, "version": version, "delta": 0}
        if request < failed:
            rows.append({**row, "item_id": None, "error": "boom"})
        else:
            rows += [{**row, "item_id": item, "error": None} for item in (1, 2)]
    types = {"request_id": pa.int64(), "user_id": pa.int64(), "item_id": pa.int64(), "version": pa.int32()}
    types |= {"timestamp": pa.timestamp("us", tz="UTC"), "delta": pa.int64(), "error": pa.string()}
    table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()})
    storage.write_table(f"serving/shadow/dt={at:%Y-%m-%d}/{version}.parquet", table)


@contextmanager
def status_server(status: dict[str, Any]) -> Iterator[str]:
    """The address of a server that answers every request with `status`, which may be changed meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(status).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Nothing: a test's output is its own."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def counts(version: int, state: RolloutState, **changes: Any) -> dict[str, Any]:
    """What a server that follows `state` says, in the server's own form: a healthy challenger of this version."""
    healthy = {"requests": 500, "errors": 0, "empty": 0, "p99_ms": 20.0}
    synced = {"version": version, "delta": 0, "served_event_age_s": None, "rows": 1, "error": None}
    track = {"version": version, "retriever_version": version, "ranker": synced, "retriever": synced}
    challenger = TrackStatus.model_validate({**track, **healthy, **changes, "shadow": healthy})
    status = Status(
        ready=True, reason=None, stage=state.stage, stage_since=state.stage_since, share=state.share, shadow_share=0.0,
        tracks={"challenger": challenger}, errors={}, items=1, users=0, journal_bytes=0, uptime_s=1.0,
    )  # fmt: skip
    return dict(json.loads(status.model_dump_json()))
