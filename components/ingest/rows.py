"""Raw rows and what is wrong with them: columns of any type in, int64 / float64 arrays and a reason per bad row out."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from components.errors import BadInput
from components.ingest.batch import repeated
from components.schemas import EARLIEST_US, QUARANTINE, hash_id
from components.windows import parse_time

_LARGEST = float(np.finfo(np.float32).max)
_EXACT = 2**53
_INTEGER = re.compile(r"(?P<whole>[+-]?[0-9]{1,20})(?P<point>\.0*)?")
_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}


class Rows:
    """A batch of raw rows of one kind. Every parsing method marks the rows that it cannot read.

    The first reason of a row stands. A bad row has an arbitrary value in the arrays: take `good` rows only.
    """

    def __init__(self, table: pa.Table, kind: str, source: str) -> None:
        self.table, self.kind, self.source = table, kind, source
        self.reasons: NDArray[np.object_] = np.full(table.num_rows, None, dtype=object)
        self.good: NDArray[np.bool_] = np.ones(table.num_rows, dtype=bool)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def require(self, names: list[str]) -> None:
        """BadInput when columns are missing; it names them and those that were found."""
        found = self.table.column_names
        if missing := [name for name in names if name not in found]:
            raise BadInput(
                f"{self.source} has no column {', '.join(missing)}; it has {', '.join(found)}: "
                "check the path and the column mapping"
            )

    def reject(self, bad: NDArray[np.bool_], reason: str) -> None:
        self.reasons[bad & self.good] = reason
        self.good = self.good & ~bad

    def ids(self, name: str, text: bool = False, missing: int | None = None) -> NDArray[np.int64]:
        """int64 ids; with `text`, hashed. Empty values are bad unless `missing` gives their id."""
        column = self._column(name)
        empty = column.is_null().to_numpy(zero_copy_only=False)
        if missing is None:
            self.reject(empty, f"missing_{name}")
        values, readable = _hashed(column) if text else _integers(column)
        self.reject(~readable & ~empty, f"non_integer_{name}")
        return np.where(empty, missing or 0, values)

    def times(self, name: str, unit: str, now_us: int) -> NDArray[np.int64]:
        """UTC microseconds of a timestamp column (unit s, ms, us or iso), 1990 to `now_us`; 0 where it is bad."""
        column = self._column(name)
        empty = column.is_null().to_numpy(zero_copy_only=False)
        self.reject(empty, f"missing_{name}")
        values, readable = _microseconds(column, unit)
        self.reject(~readable & ~empty, f"unreadable_{name}")
        self.reject(values > now_us, f"{name}_in_future")
        self.reject(values < EARLIEST_US, f"{name}_before_1990")
        return np.where(readable & (values >= EARLIEST_US) & (values <= now_us), values, 0)

    def numbers(self, name: str, missing: float | None = None) -> NDArray[np.float64]:
        """Numbers >= 0 that float32 can hold. Empty values are bad unless `missing` gives their value."""
        return self._numbers(name, self._column(name), missing)

    def _numbers(self, name: str, column: pa.Array, missing: float | None) -> NDArray[np.float64]:
        empty = column.is_null().to_numpy(zero_copy_only=False)
        if missing is None:
            self.reject(empty, f"missing_{name}")
        values = _floats(column)
        self.reject(~np.isfinite(values) & ~empty, f"not_a_number_{name}")
        self.reject((values < 0) & ~empty, f"negative_{name}")
        self.reject((values > _LARGEST) & ~empty, f"too_large_{name}")
        return np.where(empty, np.nan if missing is None else missing, values)

    def flags(self, name: str) -> NDArray[np.bool_]:
        """True where the column holds 1 or true, False where 0, false or nothing; words in any case."""
        column = self._column(name)
        if pa.types.is_boolean(column.type):
            return np.asarray(column.fill_null(False).to_numpy(zero_copy_only=False))
        if pa.types.is_string(column.type):
            for word, digit in (("true", "1"), ("false", "0")):
                column = pc.if_else(pc.equal(pc.utf8_lower(column), word), digit, column)
        values = self._numbers(name, column, missing=0.0)
        self.reject((values != 0) & (values != 1), f"flag_{name}_not_0_or_1")
        return values == 1

    def texts(self, name: str) -> NDArray[np.object_]:
        """Stripped strings; empty values are bad."""
        column = self._column(name)
        self.reject(column.is_null().to_numpy(zero_copy_only=False), f"missing_{name}")
        return np.asarray(pc.utf8_trim_whitespace(column.cast(pa.string())).to_numpy(zero_copy_only=False))

    def copies(self, *columns: NDArray[np.generic]) -> NDArray[np.bool_]:
        """True for each good row that equals an earlier good one in all columns: bad rows hold arbitrary values."""
        marks = np.zeros(len(self), dtype=bool)
        marks[self.good] = repeated(*(column[self.good] for column in columns))
        return marks

    def bad(self, counted: NDArray[np.bool_] | None = None) -> pa.Table:
        """QUARANTINE rows of everything rejected so far (of the counted rows); the raw row is kept as JSON."""
        index = np.flatnonzero(~self.good if counted is None else ~self.good & counted)
        rows = [json.dumps(row, default=str) for row in self.table.take(pa.array(index)).to_pylist()]
        return quarantine_table(self.kind, list(self.reasons[index]), rows, self.source)

    def _column(self, name: str) -> pa.Array:
        """The column in one piece, with blank text as null."""
        column = self.table[name].combine_chunks()
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            trimmed = pc.utf8_trim_whitespace(column.cast(pa.string()))
            return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)
        return column


def quarantine_table(kind: str, reasons: list[str], rows: list[str], source: str) -> pa.Table:
    size = len(rows)
    return pa.table([[kind] * size, reasons, rows, [source] * size], schema=QUARANTINE)


def _integers(column: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Values and where they are readable; '5.0' is 5 as long as a double holds it exactly."""
    plain_text = pa.types.is_string(column.type) and not pc.any(pc.match_substring_regex(column, "[^0-9-]")).as_py()
    if pa.types.is_integer(column.type) or plain_text:
        try:
            return _numpy(column.cast(pa.int64()).fill_null(0)), np.ones(len(column), bool)
        except pa.ArrowInvalid:
            pass  # some value is no int64: find out which
    if pa.types.is_floating(column.type):
        numbers = np.nan_to_num(_numpy(column.cast(pa.float64()).fill_null(np.nan)), nan=0.5, posinf=0.5, neginf=0.5)
        whole = (numbers == np.floor(numbers)) & (np.abs(numbers) <= _EXACT)
        return np.where(whole, numbers, 0).astype(np.int64), whole
    parsed = [_integer(value) for value in column.to_pylist()]
    readable = np.array([value is not None for value in parsed], dtype=bool)
    return np.array([value or 0 for value in parsed], dtype=np.int64), readable


def _integer(value: Any) -> int | None:
    match = _INTEGER.fullmatch(str(value))
    if match is None:
        return None
    number = int(match["whole"])
    limit = 2**63 if match["point"] is None else _EXACT
    return number if -limit <= number <= limit - 1 else None


def _hashed(column: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    encoded = column.cast(pa.string()).dictionary_encode()
    hashes = np.array([hash_id(text) for text in encoded.dictionary.to_pylist()] or [0], dtype=np.int64)
    return hashes[_numpy(encoded.indices.fill_null(0))], np.ones(len(column), bool)


def _microseconds(column: pa.Array, unit: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    if pa.types.is_timestamp(column.type):
        values = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).fill_null(0)
        return _numpy(values), np.ones(len(column), bool)
    if unit == "iso":
        return _iso_microseconds(column)
    scale = _UNITS[unit]
    whole, readable = _integers(column)
    limit = 2**63 // scale - 1
    values = np.clip(whole, -limit, limit) * scale
    if not readable.all():
        numbers = np.where(readable, 0.0, _floats(column)) * scale
        fractional = np.isfinite(numbers) & (np.abs(numbers) < 2**62) & ~readable
        values = np.where(fractional, np.rint(np.where(fractional, numbers, 0)).astype(np.int64), values)
        readable = readable | fractional
    return values, readable


def _iso_microseconds(column: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Times without a zone are UTC. Years that a datetime64[us] column cannot hold are unreadable."""
    texts = column.cast(pa.string()).to_numpy(zero_copy_only=False)
    parsed = pd.DatetimeIndex(pd.to_datetime(texts, utc=True, format="ISO8601", errors="coerce"))
    micro = parsed.tz_localize(None).to_numpy().astype("datetime64[us]")
    for row in np.flatnonzero(np.isnat(micro)):  # pandas' nanoseconds end in 2262: a later year is readable, but future
        micro[row] = _iso_time(texts[row])
    readable = ~np.isnat(micro)
    return np.where(readable, micro.astype(np.int64), 0), readable


def _iso_time(text: Any) -> np.datetime64:
    try:
        return np.datetime64(parse_time(text).replace(tzinfo=None), "us")
    except (BadInput, TypeError, OverflowError):
        return np.datetime64("NaT", "us")


def _floats(column: pa.Array) -> NDArray[np.float64]:
    """Numbers; NaN where there is none."""
    try:
        return _numpy(column.cast(pa.float64()).fill_null(np.nan))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        texts = pd.Series(column.to_pylist(), dtype=object)
        return pd.to_numeric(texts, errors="coerce").to_numpy(dtype=np.float64)


def _numpy(column: pa.Array) -> Any:
    return column.to_numpy(zero_copy_only=False)
