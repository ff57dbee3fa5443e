"""A small event log for tests of the Spark jobs and of the steps join and sequences."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from components.join import turns
from components.join.config import JoinConfig
from components.join.run import JoinResult, manifest_of, run
from components.manifests import Manifest, read_part
from components.schemas import INTERACTIONS, TIMESTAMP
from components.storage import Storage
from components.windows import Window, from_us, to_us
from spark_jobs.event_log import SCHEMAS

MASTER = "local[2]"
TEN = datetime(2026, 3, 1, 10, tzinfo=UTC)
MINUTE = 60_000_000
HOURS = [Window.starting(TEN + timedelta(hours=i), timedelta(hours=1)) for i in range(4)]
Row = dict[str, Any]


def at(minutes: float) -> int:
    """Microseconds of a time given in minutes after ten o'clock."""
    return to_us(TEN) + round(minutes * MINUTE)


def impression(request: int, item: int, minute: float, *, user: int = 1, delay: float = 0, **other: Any) -> Row:
    """An impression `minute` minutes after ten that the log learned of `delay` minutes later."""
    row = {
        "request_id": request,
        "user_id": user,
        "item_id": item,
        "timestamp": at(minute),
        "position": item,
        "page": 0,
    }
    optional: Row = dict.fromkeys(("version", "delta", "track", "score"))
    return row | {"received_at": at(minute + delay)} | optional | other


def action(
    request: int, item: int, minute: float, name: str = "click", *, user: int = 1, delay: float = 0, value: Any = None
) -> Row:
    """An action `minute` minutes after ten that the log learned of `delay` minutes later."""
    row = {"request_id": request, "user_id": user, "item_id": item, "timestamp": at(minute), "action": name}
    return row | {"received_at": at(minute + delay), "value": value}


def write(storage: Storage, kind: str, rows: list[Row]) -> list[str]:
    """Append rows to the event log, one new file per hour; returns the paths."""
    hours: dict[str, list[Row]] = {}
    for row in rows:
        hours.setdefault(f"{from_us(row['timestamp']):dt=%Y-%m-%d/hour=%H}", []).append(row)
    paths = [f"events/{kind}/{hour}/{secrets.token_hex(6)}.parquet" for hour in hours]
    for path, some in zip(paths, hours.values(), strict=True):
        storage.write_table(path, table(kind, some))
    return paths


def table(kind: str, rows: list[Row]) -> pa.Table:
    """Rows in the schema of the event log."""
    schema = SCHEMAS[kind]
    plain = {f.name: pa.int64() if pa.types.is_timestamp(f.type) else f.type for f in schema}
    columns = [pa.array([row[f.name] for row in rows], plain[f.name]).cast(f.type) for f in schema]
    return pa.table(columns, schema=schema)


def join(storage: Storage, window: Window, **settings: Any) -> JoinResult:
    """Run the step join with small bounds: 15 minutes attribution, 20 minutes lateness."""
    bounds = {"attribution_window_s": 900, "max_lateness_s": 1200, "max_quarantine_share": 1, "max_duplicate_share": 1}
    return run(JoinConfig(root=storage.root, window=window.key, spark=MASTER, **(bounds | settings)))


def interactions(storage: Storage, window: Window) -> list[Row]:
    """The published interactions of a window as the reference has them: times in us, `events` as sorted tuples."""
    rows = []
    for row in in_us(read_part(storage, manifest_of(storage, window), "data")).to_pylist():
        lists = [row.pop(name) for name in ("action_known_at", "action_masks", "action_values")]
        rows.append(row | {"events": list(zip(*lists, strict=True))})
    return rows


def quarantined(storage: Storage, window: Window) -> list[Row]:
    """Rows quarantined by the join of a window."""
    path = f"quarantine/join/{window.key}.parquet"
    return storage.read_table(path).to_pylist() if storage.exists(path) else []


def publish_interactions(storage: Storage, window: Window, rows: list[Row], turn: int | None = None) -> None:
    """Publish reference interactions (times in us, `events` as tuples) as the join of a window would, by its turn."""
    columns: dict[str, list[Any]] = {f.name: [row.get(f.name) for row in rows] for f in INTERACTIONS}
    for place, name in enumerate(("action_known_at", "action_masks", "action_values")):
        columns[name] = [[event[place] for event in row["events"]] for row in rows]
    times = {name: pa.array(columns[name], pa.int64()).cast(TIMESTAMP) for name in ("timestamp", "known_at")}
    folder = f"interactions/window={window.key}"
    storage.write_table(f"{folder}/attempt-1/data/part.parquet", pa.table(columns | times, schema=INTERACTIONS))
    files = {"data": [f"{folder}/attempt-1/data/part.parquet"], "quarantine": []}
    counts = {"interactions": len(rows)}
    manifest = Manifest(kind="interactions", name=window.key, files=files, counts=counts)
    turns.commit(storage, turns.begin(storage) if turn is None else turn, manifest)


def in_us(rows: pa.Table) -> pa.Table:
    """The same table with times as int64 us."""
    for place, field in enumerate(rows.schema):
        if pa.types.is_timestamp(field.type):
            rows = rows.set_column(place, field.name, rows[field.name].cast(TIMESTAMP).cast(pa.int64()))
    return rows
