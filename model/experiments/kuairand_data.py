"""KuaiRand's official CSV files -> an item catalogue and sequence tables for a time interval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from components.errors import BadInput
from components.schemas import action_bit
from model.catalogue import ItemCatalogue
from model.inputs import EVENT_DTYPES

COLUMNS = {
    "click": "is_click", "like": "is_like", "long_view": "long_view", "follow": "is_follow",
    "comment": "is_comment", "share": "is_forward", "dislike": "is_hate",
}  # fmt: skip
HOUR_US = 3_600_000_000


@dataclass
class Log:
    """Interactions ordered by (user, time), one array per column; times in microseconds."""

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    time: NDArray[np.int64]
    page: NDArray[np.int64]
    actions: NDArray[np.int32]
    play_us: NDArray[np.int64]
    request: NDArray[np.int64]
    position: NDArray[np.int32]


def read_log(folder: Path) -> Log:
    """Read log_standard*.csv of one folder. Rows that are exact duplicates count once."""
    files = sorted(folder.glob("log_standard*.csv"))
    if not files:
        raise BadInput(f"no log_standard*.csv in {folder}; give the data folder of KuaiRand")
    try:
        table = pa.concat_tables([pyarrow.csv.read_csv(file) for file in files])
    except pa.ArrowInvalid as error:
        raise BadInput(f"cannot read the logs in {folder} ({error}); give the data folder of KuaiRand") from error
    table = table.group_by(table.column_names, use_threads=False).aggregate([])
    get = {name: table[name].to_numpy().astype(np.int64) for name in table.column_names}
    order = np.lexsort([get["video_id"], get["time_ms"], get["user_id"]])
    get = {name: column[order] for name, column in get.items()}
    actions = np.where(get["play_time_ms"] > 0, action_bit("watch"), 0)
    for name, column in COLUMNS.items():
        actions |= np.where(get[column] > 0, action_bit(name), 0)
    user, time = get["user_id"], get["time_ms"] * 1000
    same = np.r_[False, (user[1:] == user[:-1]) & (time[1:] == time[:-1])]
    request = np.cumsum(~same)
    first = np.flatnonzero(~same)
    return Log(
        user=user, item=get["video_id"], time=time, page=get["tab"] + 1, actions=actions.astype(np.int32),
        play_us=get["play_time_ms"] * 1000, request=request,
        position=(np.arange(len(user)) - first[request - 1]).astype(np.int32),
    )  # fmt: skip


def read_catalogue(folder: Path) -> ItemCatalogue:
    """Author and first tag of every video. The duration is in the basic features too."""
    files = sorted(folder.glob("video_features_basic*.csv"))
    if not files:
        raise BadInput(f"no video_features_basic*.csv in {folder}; give the data folder of KuaiRand")
    types = {"tag": pa.string(), "video_duration": pa.float64()}
    table = pyarrow.csv.read_csv(files[0], convert_options=pyarrow.csv.ConvertOptions(column_types=types))
    tags = [int(str(tag).split(",")[0]) + 1 if tag else 0 for tag in table["tag"].to_pylist()]
    duration = table["video_duration"].fill_null(0.0).to_numpy() / 1000
    return ItemCatalogue(
        table["video_id"].to_numpy().astype(np.int64),
        table["author_id"].fill_null(0).to_numpy().astype(np.int64),
        np.array(tags, dtype=np.int64),
        duration.astype(np.float32),
    )


def sequences(log: Log, start_us: int, end_us: int, context: int) -> pa.Table:
    """Sequence rows: interactions in [start, end), after up to `context` earlier ones of the same user."""
    keep = np.flatnonzero(log.time < end_us)
    new = log.time[keep] >= start_us
    users, first, counts = np.unique(log.user[keep], return_index=True, return_counts=True)
    news = np.add.reduceat(new.astype(np.int64), first)
    old = np.minimum(counts - news, context)
    take = np.repeat(first + counts - news - old, news + old) + _ramp(news + old)
    take = take[np.repeat(news > 0, news + old)]
    users, old, total = users[news > 0], old[news > 0], (news + old)[news > 0]
    rows = keep[take]
    owner = np.repeat(np.arange(len(users)), total)
    columns: dict[str, pa.Array] = {"user_id": pa.array(users), "new_from": pa.array(old.astype(np.int32))}
    single: dict[str, NDArray] = {
        "request_id": log.request, "item_id": log.item, "timestamp": log.time, "known_at": log.time,
        "position": log.position, "page": log.page, "actions": log.actions,
        "watch_s": log.play_us / 1e6, "score": np.full(len(log.time), np.nan),
        "version": np.full(len(log.time), -1), "delta": np.full(len(log.time), -1),
    }  # fmt: skip
    for name, values in single.items():
        columns[name] = _list(values[rows], total, name)
    acted = np.flatnonzero(log.actions[rows])
    known = (log.time + log.play_us)[rows][acted]
    acted = acted[np.lexsort([acted, known, owner[acted]])]
    counts = np.bincount(owner[acted], minlength=len(users))
    columns["action_of"] = _list(_ramp(total)[acted], counts, "action_of")
    columns["action_known_at"] = _list((log.time + log.play_us)[rows][acted], counts, "action_known_at")
    columns["action_mask"] = _list(log.actions[rows][acted], counts, "action_mask")
    columns["action_value"] = _list((log.play_us / 1e6)[rows][acted], counts, "action_value")
    return pa.table(columns | _page_series(log, rows, owner, len(users)))


def _page_series(log: Log, rows: NDArray[np.int64], owner: NDArray[np.int64], users: int) -> dict[str, pa.Array]:
    """Of each run of equal pages of a user, the first."""
    page = log.page[rows]
    first = np.flatnonzero(np.r_[True, (page[1:] != page[:-1]) | (owner[1:] != owner[:-1])][: len(rows)])
    counts = np.bincount(owner[first], minlength=users)
    return {
        "aux_slot": _list(np.zeros(len(first)), counts, "aux_slot"),
        "aux_value": _list(page[first], counts, "aux_value"),
        "aux_known_at": _list(log.time[rows][first], counts, "aux_known_at"),
    }


def _ramp(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0..counts[0]-1, 0..counts[1]-1, ..."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _list(values: NDArray, counts: NDArray[np.int64], name: str) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(EVENT_DTYPES[name])))


def day_us(day: str, hours_east: int) -> int:
    """Start of a local day 'YYYY-MM-DD' in UTC microseconds."""
    return int(np.datetime64(day, "us").astype(np.int64)) - hours_east * HOUR_US
