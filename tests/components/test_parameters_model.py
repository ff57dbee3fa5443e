"""The parameter log with the real tables of a model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.parameters.bridge import build_model, close_epochs, export_all, export_changes, load_into
from components.parameters.compaction import compact, retain
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.storage import Storage
from model.catalogue import ItemCatalogue
from model.trainer import Trainer
from tests.components.parameter_world import identical

CONFIG = {"dim": 4, "layers": 1, "attention_heads": 1, "head_dim": 4, "positions": 4, "slots": "item", "heads": "click"}
CHANGES = st.lists(
    st.tuples(st.sampled_from(["learn", "write", "erase", "expire"]), st.integers(-4, 4), st.integers(1, 9)),
    max_size=10,
)


def fresh() -> Trainer:
    return Trainer(build_model("ranker", {**CONFIG, "table_optimizer": "adam"}, ItemCatalogue.empty()))


def change(trainer: Trainer, what: str, key: int, value: int) -> None:
    for table in trainer.model.tables().values():
        ids, rows = np.array([key]), np.full((1, table.dim), value / 10, np.float32)
        if what == "learn":
            table.apply_gradients(ids, rows, 0.1, now_us=value)
        elif what == "write":
            table.upsert(ids, rows, None, np.array([value]))
        elif what == "erase":
            table.erase(ids)
        else:
            table.expire(value)


@settings(max_examples=15, deadline=None)
@given(periods=st.lists(CHANGES, min_size=1, max_size=4), folds=st.booleans())
def test_replay_equals_the_trainers_real_tables_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, periods: list[list[tuple[str, int, int]]], folds: bool
) -> None:
    storage = Storage(f"file://{tmp_path_factory.mktemp('log')}")
    trainer, writer = fresh(), LogWriter(storage, "ranker", 1)
    writer.publish_snapshot(0, export_all(trainer), config=CONFIG)
    for n, changes in enumerate(periods, 1):
        since = close_epochs(trainer)
        for one in changes:
            change(trainer, *one)
        writer.publish_delta(n, export_changes(trainer, since, n), windows=[], event_range=None, metrics={})
        if folds:
            compact(storage, "ranker", 1)
            retain(storage, "ranker", 1, keep=1)
        replayed = LogReader(storage, "ranker", 1).load(with_state=True)
        assert identical(replayed, export_all(trainer))
        other = fresh()
        load_into(other, replayed)
        assert identical(export_all(other), replayed)
        if n % 2:
            trainer = other  # a restart in between changes nothing
