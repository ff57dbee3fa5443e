"""Columns of ids, numbers and times: exact, or a bad row with a reason."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from components.ingest.rows import Rows
from components.windows import from_us

NOW_US = 1_700_000_000_000_000


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.none()), max_size=30), st.booleans())
def test_integer_ids_survive_any_column_type(values: list[int | None], as_text: bool) -> None:
    column = pa.array([None if v is None else str(v) for v in values] if as_text else values)
    column = column.cast(pa.string() if as_text else pa.int64())
    rows = Rows(pa.table({"id": column}), "impression", "test")
    parsed = rows.ids("id")
    assert [int(v) for v, ok in zip(parsed, rows.good, strict=True) if ok] == [v for v in values if v is not None]
    assert Counter(rows.bad()["reason"].to_pylist()) == Counter(["missing_id"] * values.count(None))


@settings(deadline=None)
@given(st.lists(st.text(max_size=8), max_size=20))
def test_any_text_is_an_id_or_a_reason_and_never_a_crash(values: list[str]) -> None:
    rows = Rows(pa.table({"x": pa.array(values, pa.string())}), "impression", "test")
    ids = rows.ids("x")
    for value, parsed, good in zip(values, ids, rows.good, strict=True):
        if good:
            assert float(value.strip()) == parsed  # strip and not float alone: float refuses '0\x1f'
    for read in (lambda r: r.numbers("x"), lambda r: r.times("x", "iso", NOW_US), lambda r: r.times("x", "ms", NOW_US)):
        fresh = Rows(rows.table, "impression", "test")
        read(fresh)
        assert len(fresh.bad()) == int((~fresh.good).sum())


@settings(deadline=None)
@given(st.lists(st.integers(631_152_000_000_000, NOW_US), min_size=1, max_size=20), st.sampled_from(["us", "iso"]))
def test_times_are_read_exactly_to_the_microsecond(times: list[int], unit: str) -> None:
    texts = [str(t) if unit == "us" else from_us(t).isoformat() for t in times]
    rows = Rows(pa.table({"t": texts}), "impression", "test")
    assert rows.times("t", unit, NOW_US).tolist() == times
    assert rows.good.all()
