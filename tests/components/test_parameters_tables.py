"""What a table exports goes through the parameter log's form and its folding, and comes out equal to the bit."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from components.parameters import arrays
from components.parameters.arrays import Parameters, fold, from_files, to_files
from model.table import EmbeddingTable
from model.table_delta import TableDelta

DAY_US = 86_400_000_000
SETTINGS = {"admission_threshold": 3, "ttl_us": 2 * DAY_US, "sweep_steps": 1, "initial_accumulator": 0.5}


def through_files(export: TableDelta, n: int) -> Parameters:
    files = to_files(Parameters({}, {"item": export}, {}, n))
    return from_files({name: arrays.decode(arrays.encode(content)) for name, content in files.items()}, n)


def assert_same(a: EmbeddingTable, b: EmbeddingTable) -> None:
    ours, theirs = a.export_all(), b.export_all()
    for part in fields(TableDelta):
        np.testing.assert_array_equal(getattr(ours, part.name), getattr(theirs, part.name), err_msg=part.name)


@settings(max_examples=60, deadline=None)
@given(
    windows=st.lists(
        st.lists(st.tuples(st.lists(st.integers(-4, 4), min_size=1, max_size=6), st.integers(0, 2)), max_size=4),
        min_size=1,
        max_size=5,
    ),
    erase=st.lists(st.integers(-4, 4), max_size=3),
)
def test_a_restart_from_the_log_knows_rows_counts_candidates_and_what_expired(
    windows: list[list[tuple[list[int], int]]], erase: list[int]
) -> None:
    trained = EmbeddingTable("item", 2, **SETTINGS)  # type: ignore[arg-type]
    parts, since, now = [], 0, DAY_US
    for n, batches in enumerate(windows):
        for ids, days in batches:
            now += days * DAY_US
            trained.apply_gradients(np.array(ids, np.int64), np.ones((len(ids), 2), np.float32), now_us=now)
        if n == 1:
            trained.erase(np.array(erase, np.int64))
        closed = trained.advance_epoch()
        parts.append(through_files(trained.export_delta(since), n))
        since = closed
    step_by_step = EmbeddingTable("item", 2, **SETTINGS)  # type: ignore[arg-type]
    for part in parts:
        step_by_step.apply_delta(part.tables["item"])
    assert_same(step_by_step, trained)
    at_once = EmbeddingTable("item", 2, **SETTINGS)  # type: ignore[arg-type]
    at_once.apply_delta(fold(parts).tables["item"])
    assert_same(at_once, trained)
