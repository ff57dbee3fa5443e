"""KuaiRand's official files: log_standard_*.csv and video_features_basic*.csv.

A row is an impression at `time_ms` (UTC) on page `tab` + 1, and its feedback; actions happen when playing ends, at
most half an hour later. The video's first tag is its category (tag + 1, as 0 means none).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.ingest.batch import Batch, actions_table, impressions_table, in_slice, items_table, repeated
from components.ingest.config import IngestConfig
from components.ingest.read import existing, pick, read_csv
from components.ingest.rows import Rows
from components.request_ids import request_ids

ACTION_COLUMNS = {
    "is_click": "click",
    "is_like": "like",
    "long_view": "long_view",
    "is_follow": "follow",
    "is_comment": "comment",
    "is_forward": "share",
    "is_hate": "dislike",
}
LONGEST_PLAY_US = 30 * 60 * 1_000_000


def files(config: IngestConfig) -> list[Path]:
    folder = existing(config.path)
    return [*_logs(folder), *_videos(folder)]


def load(config: IngestConfig, now_us: int) -> Batch:
    folder, batch = existing(config.path), Batch()
    for path in _logs(folder):
        raw = read_csv(path)
        batch.event_rows += raw.table.num_rows + raw.malformed.num_rows
        batch.set_aside(raw.malformed)
        _add_log(batch, Rows(raw.table, "impression", raw.source), config, now_us)
    _drop_repeated(batch)
    for path in _videos(folder):
        _add_items(batch, path)
    return batch


def _logs(folder: Path) -> list[Path]:
    return pick(folder, ["log_standard_*.csv"], "the interaction log")


def _videos(folder: Path) -> list[Path]:
    return pick(folder, ["video_features_basic*.csv"], "the videos' authors and tags")


def _add_log(batch: Batch, rows: Rows, config: IngestConfig, now_us: int) -> None:
    rows.require(["user_id", "video_id", "time_ms", "tab", "play_time_ms", *ACTION_COLUMNS])
    copies = _exact_copies(rows.table)
    user, video = rows.ids("user_id"), rows.ids("video_id")
    time = rows.times("time_ms", "ms", now_us)
    page, play_ms = rows.ids("tab") + 1, rows.numbers("play_time_ms")
    flags = {action: rows.flags(column) for column, action in ACTION_COLUMNS.items()}
    inside = in_slice(time, config.from_us, config.until_us)
    batch.event_rows -= int((~inside).sum())
    batch.duplicates += int((copies & rows.good & inside).sum())
    batch.set_aside(rows.bad(inside))
    keep = np.flatnonzero(rows.good & inside & ~copies)
    request = request_ids(user, video, time)
    acted = time + np.rint(np.minimum(np.nan_to_num(play_ms) * 1000, LONGEST_PLAY_US)).astype(np.int64)
    batch.impressions = pa.concat_tables(
        [batch.impressions, impressions_table(request[keep], user[keep], video[keep], time[keep], page=page[keep])]
    )
    parts = [batch.actions]
    for action, flag in flags.items():
        row = keep[flag[keep]]
        parts.append(actions_table(request[row], user[row], video[row], acted[row], action))
    row = keep[play_ms[keep] > 0]
    parts.append(actions_table(request[row], user[row], video[row], acted[row], "watch", play_ms[row] / 1000))
    batch.actions = pa.concat_tables(parts)


def _exact_copies(table: pa.Table) -> np.ndarray:
    """True for each line that equals an earlier one, as text."""
    lines = pc.binary_join_element_wise(*table.columns, ",", null_handling="replace", null_replacement="")
    return repeated(lines.to_numpy())


def _drop_repeated(batch: Batch) -> None:
    """The same impression can be logged twice with different feedback: it stays once, with the actions of both."""
    batch.impressions = batch.impressions.filter(pa.array(~repeated(*_keys(batch.impressions))))
    actions = batch.actions
    same = repeated(*_keys(actions), actions["action"].to_numpy(), actions["value"].to_numpy())
    batch.actions = actions.filter(pa.array(~same))


def _keys(events: pa.Table) -> list[np.ndarray]:
    return [events[name].to_numpy() for name in ("request_id", "user_id", "item_id")]


def _add_items(batch: Batch, path: Path) -> None:
    raw = read_csv(path)
    rows = Rows(raw.table, "item", raw.source)
    rows.require(["video_id", "author_id", "tag", "video_duration"])
    first_tag = pc.replace_substring_regex(rows.table["tag"], pattern=",.*", replacement="")
    rows.table = rows.table.append_column("first_tag", first_tag)
    video, author = rows.ids("video_id"), rows.ids("author_id", missing=0)
    category = rows.ids("first_tag", missing=-1) + 1
    duration_ms = rows.numbers("video_duration", missing=np.nan)
    good = rows.good
    batch.set_aside(raw.malformed, rows.bad())
    batch.item_rows += raw.table.num_rows + raw.malformed.num_rows
    table = items_table(video[good], author[good], category[good], duration_ms[good] / 1000)
    batch.items = pa.concat_tables([batch.items, table])
