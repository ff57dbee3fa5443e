"""Logs to ingest, and what the event log holds afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.ingest.config import IngestConfig
from components.ingest.run import IngestResult, run
from components.storage import Storage

WORLD = {"world_end": "2025-01-03T00:00:00Z", "world_users": 30, "world_items": 60, "world_impressions": 800}

KUAIRAND_LOG = """\
user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,\
duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab
712,5239,20220425,0,1650812741436,1,1,1,1,1,1,1,61802,49866,0,0,0,0,1
13414,6831,20220425,0,1650812934945,1,0,0,0,0,0,0,1184,11933,0,0,0,0,0
13414,6831,20220425,0,1650812934945,1,0,0,0,0,0,0,1184,11933,0,0,0,0,0
13414,17,20220425,0,1650812934945,0,0,0,0,0,0,0,0,11933,0,0,0,0,4
9,17,20220501,0,1651400000000,0,0,0,0,0,0,0,7200000,9000000,0,0,0,0,4
"""
KUAIRAND_VIDEOS = """\
video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,music_id,\
music_type,tag
5239,77,NORMAL,2022-04-10,LongImport,0.0,49866.0,720.0,1280.0,9155697141,9.0,"20,43"
6831,78,NORMAL,2022-04-10,LongImport,0.0,,720.0,1280.0,9155697141,,0
17,79,NORMAL,2022-04-10,LongImport,0.0,9000000.0,720.0,1280.0,9155697141,9.0,
"""
LOG = {
    "uid": ["a", "b", "a"],
    "sku": ["x", "y", "y"],
    "when": ["2024-01-01T00:00:00Z", "2024-01-01T01:00:00+01:00", "2024-01-02"],
    "clicked": [1, 0, 1],
    "seconds": [2.5, 0.0, None],
}
MAPPING = "user_id=uid,item_id=sku,timestamp=when,click=clicked,watch=seconds"


def ingest(store: Storage, **fields: Any) -> IngestResult:
    return run(IngestConfig.model_validate({"root": store.root, **fields}))


def events(store: Storage, kind: str) -> pd.DataFrame:
    """All events of a kind in time order, times as UTC microseconds."""
    tables = [store.read_table(path) for path in store.list(f"events/{kind}")]
    frame = (pa.concat_tables(tables) if tables else pa.table({"timestamp": []})).to_pandas()
    for name in ("timestamp", "received_at"):
        if len(frame):
            frame[name] = frame[name].astype("datetime64[us, UTC]").astype("int64")
    return frame.sort_values(["timestamp", "request_id"]).reset_index(drop=True) if len(frame) else frame


def content(store: Storage) -> dict[str, bytes]:
    folders = ("events", "items", "ingests", "quarantine", "world")
    return {path: store.read_bytes(path) for folder in folders for path in store.list(folder)}


def shared(name: str) -> Path:
    folder = Path(os.environ.get("FRESHET_SHARED", Path(__file__).parents[4] / "shared")) / "data" / name
    if not folder.exists():
        pytest.skip(f"{name} is not at {folder}; set FRESHET_SHARED to the folder that holds data/{name}")
    return folder


def written(path: Path, columns: Mapping[str, Any]) -> Path:
    frame = pd.DataFrame(columns)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pandas(frame), path)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)
    return path
