"""Journal records -> Parquet files of the event log, quarantine and shadow log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from components.schemas import ACTION_EVENTS, IMPRESSIONS, QUARANTINE, TIMESTAMP
from components.storage import Storage
from components.windows import from_us

SHADOW = pa.schema(
    [
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.int64()),
        pa.field("timestamp", TIMESTAMP, nullable=False),
        pa.field("version", pa.int32(), nullable=False),
        pa.field("delta", pa.int64(), nullable=False),
        pa.field("score", pa.float32()),
        pa.field("champion_score", pa.float32()),
        pa.field("latency_ms", pa.float32()),
        pa.field("error", pa.string()),
    ]
)
"""What the challenger would have said; a request that it failed on is one row with `error` and no item."""

SCHEMAS = {"impressions": IMPRESSIONS, "actions": ACTION_EVENTS, "quarantine": QUARANTINE, "shadow": SHADOW}


def ship(storage: Storage, name: str, records: Iterable[dict[str, list[dict[str, Any]]]]) -> None:
    """Write the rows of one segment, one file per folder, all called `name`; files that exist are complete already."""
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for record in records:
        for kind, rows in record.items():
            for row in rows:
                path = f"{_folder(kind, row)}/{name}.parquet"
                kinds[path] = kind
                files[path].append(row)
    for path, rows in sorted(files.items()):
        if not storage.exists(path):
            storage.write_table(path, pa.Table.from_pylist(rows, SCHEMAS[kinds[path]]))


def _folder(kind: str, row: dict[str, Any]) -> str:
    if kind == "quarantine":
        return "quarantine/serve"
    moment = from_us(row["timestamp"])
    if kind == "shadow":
        return f"serving/shadow/dt={moment:%Y-%m-%d}"
    return f"events/{kind}/dt={moment:%Y-%m-%d}/hour={moment:%H}"
