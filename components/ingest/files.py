"""Any Parquet, CSV or JSONL file, through a column mapping: components/ingest/run.py says what a row is, by `kind`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.errors import BadInput
from components.ingest.batch import (
    Batch,
    Ints,
    actions_table,
    impressions_table,
    in_slice,
    items_table,
    repeated,
)
from components.ingest.config import IngestConfig
from components.ingest.read import Raw, data_files, existing, read_any
from components.ingest.rows import Rows
from components.request_ids import REQUEST_ID_BITS, request_ids
from components.schemas import ACTIONS

WITH_VALUE = ("watch", "rating")
COLUMNS = {
    "impressions": "user_id item_id timestamp request_id position page received_at " + " ".join(ACTIONS),
    "actions": "request_id user_id item_id timestamp action value received_at",
    "feedback": "user_id item_id timestamp action value request_id page received_at",
    "items": "item_id author_id category duration_s",
}
REQUIRED = {
    "impressions": ["user_id", "item_id", "timestamp"],
    "actions": ["request_id", "user_id", "item_id", "timestamp", "action"],
    "feedback": ["user_id", "item_id", "timestamp"],
    "items": ["item_id"],
}


def files(config: IngestConfig) -> list[Path]:
    return data_files(existing(config.path))


def load(config: IngestConfig, now_us: int) -> Batch:
    mapping = column_mapping(config)
    batch, found = Batch(), set[str]()
    for path in files(config):
        raw = read_any(path)
        found.update(raw.table.column_names)
        read = raw.table.num_rows + raw.malformed.num_rows
        batch.item_rows += read if config.kind == "items" else 0
        batch.event_rows += read if config.kind != "items" else 0
        batch.set_aside(raw.malformed)
        _require_mapped(raw, mapping, REQUIRED[config.kind])
        add_rows(batch, Rows(_renamed(raw.table, mapping), _ROW_KIND[config.kind], raw.source), config, now_us)
    if absent := [name for name in mapping if name not in found]:  # one file may lack it: JSON leaves fields out
        raise BadInput(
            f"--columns maps {', '.join(absent)}, but no row of {config.path} has that; there are "
            f"{', '.join(sorted(found))}"
        )
    return batch


_ROW_KIND = {"impressions": "impression", "actions": "action", "feedback": "impression", "items": "item"}


def pairs(text: str, setting: str) -> dict[str, str]:
    """'a=b,c=d' as a dict; BadInput names the setting."""
    found = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        left, equals, right = pair.partition("=")
        if not equals or not left.strip() or not right.strip():
            raise BadInput(f"{setting} has {pair!r}; write it as name=name,name=name")
        found[left.strip()] = right.strip()
    return found


def column_mapping(config: IngestConfig) -> dict[str, str]:
    """Their column name -> ours; BadInput when ours is unknown for this kind of row."""
    known = COLUMNS[config.kind].split()
    mapping = pairs(config.columns, "--columns")
    if wrong := [name for name in mapping if name not in known]:
        raise BadInput(
            f"--columns maps {', '.join(wrong)}, but rows of kind {config.kind} have only {', '.join(known)}; "
            "write our name first, as in user_id=uid"
        )
    return {theirs: ours for ours, theirs in mapping.items()}


def _require_mapped(raw: Raw, mapping: dict[str, str], required: list[str]) -> None:
    """BadInput when a column that every file needs is mapped to a name that this one has not."""
    there = raw.table.column_names
    if absent := [
        f"{theirs} for {ours}" for theirs, ours in mapping.items() if ours in required and theirs not in there
    ]:
        raise BadInput(f"--columns names {', '.join(absent)}, but {raw.source} has only {', '.join(there)}")


def _renamed(table: pa.Table, mapping: dict[str, str]) -> pa.Table:
    """Rename mapped columns; an unmapped column whose name a mapped one takes is dropped."""
    taken = set(mapping.values())
    kept = [name for name in table.column_names if name in mapping or name not in taken]
    return table.select(kept).rename_columns([mapping.get(name, name) for name in kept])


def add_rows(batch: Batch, rows: Rows, config: IngestConfig, now_us: int) -> None:
    """Parse rows of the config's kind and add the valid ones to the batch."""
    rows.require(REQUIRED[config.kind])
    if config.kind == "items":
        _add_items(batch, rows, config.string_ids)
        return
    reader = _EventReader(rows, config, now_us)
    {"impressions": reader.impressions, "actions": reader.actions, "feedback": reader.feedback}[config.kind](batch)


class _EventReader:
    """Columns that all kinds of event rows share, parsed once."""

    def __init__(self, rows: Rows, config: IngestConfig, now_us: int) -> None:
        self.rows, self.config, self.now_us = rows, config, now_us
        self.user = rows.ids("user_id", text=config.string_ids)
        self.item = rows.ids("item_id", text=config.string_ids)
        self.time = rows.times("timestamp", config.time_unit, now_us)
        self.received = self._received()
        self.request = self._request_ids()

    def impressions(self, batch: Batch) -> None:
        position, page = self._optional_ids("position"), self._optional_ids("page")
        self.rows.reject((position < 0) | (position >= 2**31), "position_out_of_range")
        found = [name for name in ACTIONS if name in self.rows.table.column_names]
        values = {name: self.rows.numbers(name, missing=0.0) for name in found if name in WITH_VALUE}
        flags = {name: self.rows.flags(name) for name in found if name not in WITH_VALUE}
        shown = (self.user, self.item, self.time, self.request, position, page, self.received)
        keep = self._finish(batch, self.rows.copies(*shown, *values.values(), *flags.values()))
        self._add_impressions(batch, _distinct(keep, *shown), position, page)
        for name in found:
            if name in values:
                row = _distinct(keep[values[name][keep] > 0], *shown, values[name])
            else:
                row = _distinct(keep[flags[name][keep]], *shown)
            self._add_actions(batch, row, name, values.get(name))

    def actions(self, batch: Batch) -> None:
        action, value = self._action_names(), self._values()
        self._check_value(action, value)
        copies = self.rows.copies(self.user, self.item, self.time, self.request, action, value, self.received)
        self._add_actions(batch, self._finish(batch, copies), action, value)

    def feedback(self, batch: Batch) -> None:
        named = "action" in self.rows.table.column_names
        action = self._action_names() if named else np.full(len(self.rows), "like", dtype=object)
        page, value = self._optional_ids("page"), self._values()
        self._check_value(action, value)
        keep = self._finish(batch, self.rows.copies(self.user, self.item, self.time, self.request, action, value))
        first = _distinct(keep, self.user, self.item, self.request)
        self._add_impressions(batch, first, np.zeros_like(page), page)
        self._add_actions(batch, keep, action, value)

    def _add_impressions(self, batch: Batch, keep: Ints, position: Ints, page: Ints) -> None:
        columns = (self.request, self.user, self.item, self.time, self.received, position, page)
        table = impressions_table(*(column[keep] for column in columns))
        batch.impressions = pa.concat_tables([batch.impressions, table])

    def _add_actions(
        self, batch: Batch, keep: Ints, action: str | NDArray[np.object_], value: NDArray[np.float64] | None
    ) -> None:
        table = actions_table(
            self.request[keep],
            self.user[keep],
            self.item[keep],
            self.time[keep],
            action if isinstance(action, str) else action[keep],
            None if value is None else value[keep],
            self.received[keep],
        )
        batch.actions = pa.concat_tables([batch.actions, table])

    def _finish(self, batch: Batch, copies: NDArray[np.bool_]) -> Ints:
        """Set bad rows aside, count and drop exact copies and what is outside the slice; the rows to keep."""
        inside = in_slice(self.time, self.config.from_us, self.config.until_us)
        batch.event_rows -= int((~inside).sum())
        batch.duplicates += int((copies & inside).sum())
        batch.set_aside(self.rows.bad(inside))
        return np.flatnonzero(self.rows.good & inside & ~copies)

    def _received(self) -> Ints:
        if "received_at" not in self.rows.table.column_names:
            return self.time
        return np.maximum(self.rows.times("received_at", self.config.time_unit, self.now_us), self.time)

    def _request_ids(self) -> Ints:
        if "request_id" not in self.rows.table.column_names:
            return request_ids(self.user, self.item, self.time)
        request = self.rows.ids("request_id", text=self.config.string_ids)
        return request & (2**REQUEST_ID_BITS - 1) if self.config.string_ids else request

    def _optional_ids(self, name: str) -> Ints:
        if name not in self.rows.table.column_names:
            return np.zeros(len(self.rows), dtype=np.int64)
        return self.rows.ids(name, text=self.config.string_ids and name == "page", missing=0)

    def _action_names(self) -> NDArray[np.object_]:
        renamed = pairs(self.config.action_names, "--action-names")
        if wrong := sorted(set(renamed.values()) - set(ACTIONS)):
            raise BadInput(f"--action-names maps to {', '.join(wrong)}; known actions are {', '.join(ACTIONS)}")
        names = np.array([renamed.get(name, name) for name in self.rows.texts("action")], dtype=object)
        self.rows.reject(~np.isin(names.astype(str), ACTIONS), "unknown_action")
        return names

    def _values(self) -> NDArray[np.float64]:
        if "value" not in self.rows.table.column_names:
            return np.full(len(self.rows), np.nan)
        return self.rows.numbers("value", missing=np.nan)

    def _check_value(self, action: NDArray[np.object_], value: NDArray[np.float64]) -> None:
        self.rows.reject(np.isin(action.astype(str), WITH_VALUE) & np.isnan(value), "missing_value")


def _distinct(index: Ints, *columns: NDArray[np.generic]) -> Ints:
    """The rows of `index` that differ from all earlier ones of it in some column."""
    return index[~repeated(*(column[index] for column in columns))]


def _add_items(batch: Batch, rows: Rows, text: bool) -> None:
    zeros = np.zeros(len(rows), dtype=np.int64)
    names = rows.table.column_names
    item = rows.ids("item_id", text=text)
    author = rows.ids("author_id", text=text, missing=0) if "author_id" in names else zeros
    category = rows.ids("category", text=text, missing=0) if "category" in names else zeros
    duration = rows.numbers("duration_s", missing=np.nan) if "duration_s" in names else np.full(len(rows), np.nan)
    good = rows.good
    batch.set_aside(rows.bad())
    batch.items = pa.concat_tables([batch.items, items_table(item[good], author[good], category[good], duration[good])])
