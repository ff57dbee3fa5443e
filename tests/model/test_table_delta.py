"""Epochs and deltas of model.table.EmbeddingTable, against a plain dictionary and against replays."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.table import OPTIMIZERS, EmbeddingTable, TableDelta

torch.set_num_threads(1)

DIM = 2
INT64 = np.iinfo(np.int64)
SPREAD = st.integers(0, 40).map(lambda i: i << 40)
KEYS = st.one_of(st.integers(-5, 5), st.sampled_from([INT64.min, INT64.max]), SPREAD)
BATCH = st.lists(KEYS, max_size=12)
OPERATIONS = st.one_of(
    st.tuples(st.just("insert"), BATCH),
    st.tuples(st.just("update"), BATCH),
    st.tuples(st.just("upsert"), BATCH),
    st.tuples(st.just("erase"), BATCH),
    st.tuples(st.just("expire"), st.integers(0, 60)),
    st.tuples(st.just("sync"), st.none()),
    st.tuples(st.just("drop"), st.none()),
)


def int64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@dataclass
class Model:
    """What the table should be: sgd with lr 1 on rows in dictionaries, and who changed when."""

    fresh: EmbeddingTable
    rows: dict[int, np.ndarray] = field(default_factory=dict)
    times: dict[int, int] = field(default_factory=dict)
    changed: dict[int, int] = field(default_factory=dict)  # key -> epoch of its last change or erasure
    erased: set[int] = field(default_factory=set)
    epoch: int = 1

    def touch(self, key: int) -> None:
        if key not in self.rows:
            self.write(key, self.fresh.lookup(int64(key)).numpy()[0].copy(), 0)

    def write(self, key: int, row: np.ndarray, time: int) -> None:
        self.rows[key], self.times[key], self.changed[key] = row, time, self.epoch
        self.erased.discard(key)

    def remove(self, key: int) -> None:
        if self.rows.pop(key, None) is not None:
            self.changed[key] = self.epoch
            self.erased.add(key)

    def check(self, delta: TableDelta, since: int) -> None:
        keys = sorted(k for k in self.rows if self.changed[k] > since)
        assert delta.keys.tolist() == keys
        assert delta.tombstones.tolist() == sorted(k for k in self.erased if self.changed[k] > since)
        assert delta.last_update_us.tolist() == [self.times[k] for k in keys]
        expected = np.array([self.rows[k] for k in keys], np.float32).reshape(len(keys), DIM)
        assert delta.weights.tobytes() == expected.tobytes()


def _apply(table: EmbeddingTable, model: Model, name: str, batch: list[int], seed: int) -> None:
    ids = int64(*batch)
    values = np.random.default_rng(seed).integers(-8, 8, (len(batch), DIM)).astype(np.float32)
    now_us = seed * 7 % 30  # not in order: events can be late
    if name == "insert":
        table(torch.from_numpy(ids))
        for key in batch:
            model.touch(key)
    elif name == "update":
        table.apply_gradients(ids, values, lr=1.0, now_us=now_us)
        sums: dict[int, np.ndarray] = {}
        for key, g in zip(batch, values, strict=True):
            sums[key] = sums[key] + g if key in sums else g
        for key, g in sums.items():
            model.touch(key)
            model.write(key, model.rows[key] - g, max(model.times[key], now_us))
    elif name == "upsert":
        table.upsert(ids, values, last_update_us=int64(*range(len(batch))))
        for time, (key, row) in enumerate(zip(batch, values, strict=True)):
            model.write(key, row, time)
    else:
        assert table.erase(ids) == len(model.rows.keys() & set(batch))
        for key in batch:
            model.remove(key)


@settings(max_examples=150, deadline=None)
@given(st.lists(OPERATIONS, max_size=30))
def test_any_program_agrees_with_a_dictionary_and_its_deltas_rebuild_the_table(program: list) -> None:
    def make() -> EmbeddingTable:
        return EmbeddingTable("item", DIM, optimizer="sgd")

    table, replica, model = make(), make(), Model(make())
    acknowledged = 0
    for seed, (name, argument) in enumerate(program):
        if name == "expire":
            stale = [k for k, t in model.times.items() if k in model.rows and t != 0 and t < argument]
            assert table.expire(argument) == len(stale)
            for key in stale:
                model.remove(key)
        elif name == "sync":
            closed = table.advance_epoch()
            assert closed == model.epoch
            model.epoch += 1
            delta = table.export_delta(acknowledged)
            model.check(delta, acknowledged)
            replica.apply_delta(delta)
            acknowledged = closed
        elif name == "drop":
            dropped = {k for k in model.erased if model.changed[k] <= acknowledged}
            assert table.drop_tombstones(acknowledged) == len(dropped)
            model.erased -= dropped
        else:
            _apply(table, model, name, argument, seed)
        assert len(table) == len(model.rows)
    model.check(table.export_delta(acknowledged), acknowledged)
    replica.apply_delta(table.export_delta(acknowledged))
    _assert_bit_equal(table, replica)


def _assert_bit_equal(a: EmbeddingTable, b: EmbeddingTable) -> None:
    x, y = a.export_all(), b.export_all()
    for name in ("keys", "weights", "state", "last_update_us"):
        assert getattr(x, name).tobytes() == getattr(y, name).tobytes(), name
    assert x.tombstones.size == 0


def _train(table: EmbeddingTable, random: np.random.Generator, step: int) -> None:
    ids = random.zipf(1.3, 64).astype(np.int64) % 500
    table.apply_gradients(ids, random.normal(size=(64, 3)).astype(np.float32), now_us=step * 10)
    if step % 5 == 4:
        table.erase(ids[:3])
    if step % 9 == 8:
        table.expire(step * 10 - 200)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_trainer_goes_on_bit_for_bit(optimizer: str) -> None:
    trainer, again = (EmbeddingTable("item", 3, optimizer=optimizer, seed=5) for _ in range(2))
    randoms = [np.random.default_rng(3) for _ in range(2)]
    acknowledged = 0
    deltas = []
    for step in range(40):
        _train(trainer, randoms[0], step)
        _train(again, randoms[1], step)
        if step % 7 == 6:
            closed = trainer.advance_epoch()
            deltas.append(trainer.export_delta(acknowledged))
            acknowledged = closed
    _assert_bit_equal(trainer, again)  # the same program, the same bits

    snapshot = EmbeddingTable("item", 3, optimizer=optimizer, seed=5)
    snapshot.apply_delta(trainer.export_all())
    replayed = EmbeddingTable("item", 3, optimizer=optimizer, seed=5)
    trainer.advance_epoch()
    for delta in [*deltas, trainer.export_delta(acknowledged)]:
        replayed.apply_delta(delta)
    _assert_bit_equal(trainer, snapshot)
    _assert_bit_equal(trainer, replayed)

    for step in range(40, 60):  # restoring is not the end: training continues to the same bits
        _train(trainer, randoms[0], step)
        random = np.random.default_rng()
        random.bit_generator.state = randoms[1].bit_generator.state
        _train(replayed, random, step)
        _train(snapshot, randoms[1], step)
    _assert_bit_equal(trainer, replayed)
    _assert_bit_equal(trainer, snapshot)


def test_a_delta_that_could_not_be_complete_is_refused() -> None:
    table = EmbeddingTable("item", DIM)
    with pytest.raises(ValueError, match="epoch 1 is not closed"):
        table.export_delta(1)
    with pytest.raises(ValueError, match=">= 0"):
        table.export_delta(-1)
    table(torch.tensor([1, 2]))
    table.erase(int64(1))
    assert table.advance_epoch() == 1
    table.erase(int64(2))
    assert table.export_delta(1).tombstones.tolist() == [2]
    assert table.drop_tombstones(1) == 1
    with pytest.raises(ValueError, match=r"not complete; use export_all\(\)"):
        table.export_delta(0)
    assert table.export_delta(1).tombstones.tolist() == [2]


def test_upsert_without_state_is_a_fresh_state_whatever_was_there() -> None:
    table = EmbeddingTable("item", DIM, initial_accumulator=0.25)
    row = np.ones((1, DIM), np.float32)
    table.apply_gradients(int64(1), row, now_us=3)
    table.upsert(int64(1), row)
    delta = table.export_all()
    assert delta.state.tolist() == [[0.25, 0.25]] and delta.last_update_us.tolist() == [0]


def test_exports_are_copies() -> None:
    table = EmbeddingTable("item", DIM)
    table(torch.tensor([1]))
    before = table.export_all()
    table.export_all().weights[:] = 9
    table.apply_gradients(int64(1), np.ones((1, DIM), np.float32))
    after = table.export_all()
    assert not np.array_equal(before.weights, after.weights) and after.weights.max() < 1
