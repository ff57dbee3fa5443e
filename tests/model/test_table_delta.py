"""Epochs, deltas and consumers of model.table.EmbeddingTable."""

import dataclasses
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from model.table import OPTIMIZERS, EmbeddingTable
from model.table_delta import TableDelta
from tests.model.table_model import assert_same_table, column, int64

torch.set_num_threads(1)

DIM = 2
SECOND = 1_000_000


def _train(table: EmbeddingTable, random: np.random.Generator, step: int) -> None:
    ids = random.zipf(1.3, 64).astype(np.int64) % 500
    table.apply_gradients(ids, random.normal(size=(64, 3)).astype(np.float32), now_us=step * SECOND)
    if step % 5 == 4:
        table.erase(ids[:3])
    if step % 9 == 8:
        table.expire((step - 20) * SECOND)


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
    assert_same_table(trainer, again)  # the same program, the same bits

    snapshot = EmbeddingTable("item", 3, optimizer=optimizer, seed=5)
    snapshot.apply_delta(trainer.export_all())
    replayed = EmbeddingTable("item", 3, optimizer=optimizer, seed=5)
    trainer.advance_epoch()
    for delta in [*deltas, trainer.export_delta(acknowledged)]:
        replayed.apply_delta(delta)
    assert_same_table(trainer, snapshot)
    assert_same_table(trainer, replayed)

    for step in range(40, 60):  # restoring is not the end: training continues to the same bits
        _train(trainer, randoms[0], step)
        random = np.random.default_rng()
        random.bit_generator.state = randoms[1].bit_generator.state
        _train(replayed, random, step)
        _train(snapshot, randoms[1], step)
    assert_same_table(trainer, replayed)
    assert_same_table(trainer, snapshot)


def test_a_delta_that_could_not_be_complete_is_refused() -> None:
    table = EmbeddingTable("item", DIM)
    with pytest.raises(ValueError, match="epoch 1 is not closed"):
        table.export_delta(1)
    with pytest.raises(ValueError, match=">= 0"):
        table.export_delta(-1)
    table.find_or_insert(int64(1, 2))
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
    assert column(table.export_all(), "last_update_us").tolist() == [SECOND]  # whole seconds, rounded up
    table.upsert(int64(1), row)
    delta = table.export_all()
    assert column(delta, "state").tolist() == [[0.25, 0.25]] and column(delta, "last_update_us").tolist() == [0]


def test_exports_are_copies() -> None:
    table = EmbeddingTable("item", DIM)
    table.find_or_insert(int64(1))
    before = table.export_all()
    table.export_all().weights[:] = 9
    table.apply_gradients(int64(1), np.ones((1, DIM), np.float32))
    after = table.export_all()
    assert not np.array_equal(before.weights, after.weights) and after.weights.max() < 1


def _change(table: EmbeddingTable, key: int) -> None:
    table.apply_gradients(int64(key), np.ones((1, DIM), np.float32))


def test_what_is_not_acknowledged_comes_again_to_each_consumer_alone() -> None:
    table = EmbeddingTable("item", DIM)
    table.consumers.subscribe("server")
    table.consumers.subscribe("backup")
    _change(table, 1)
    delta, epoch = table.consumers.export("server")
    assert delta.keys.tolist() == [1]
    table.consumers.acknowledge("server", epoch)
    _change(table, 2)
    table.erase(int64(1))
    delta, _ = table.consumers.export("server")
    assert (delta.keys.tolist(), delta.tombstones.tolist()) == ([2], [1])
    delta, epoch = table.consumers.export("server")  # the first attempt was lost
    assert (delta.keys.tolist(), delta.tombstones.tolist()) == ([2], [1])
    table.consumers.acknowledge("server", epoch)
    assert table.stats()["tombstones"] == 1  # the backup does not have it yet
    delta, epoch = table.consumers.export("backup")
    assert (delta.keys.tolist(), delta.tombstones.tolist()) == ([2], [1])
    table.consumers.acknowledge("backup", epoch)
    assert table.stats()["tombstones"] == 0
    assert not len(table.consumers.export("server")[0].keys)


def test_a_late_consumer_gets_every_row_though_old_tombstones_are_gone() -> None:
    table = EmbeddingTable("item", DIM)
    table.consumers.subscribe("server")
    _change(table, 1)
    _change(table, 2)
    table.erase(int64(2))
    table.consumers.acknowledge("server", table.consumers.export("server")[1])
    table.consumers.subscribe("late")
    delta, _ = table.consumers.export("late")
    assert delta.keys.tolist() == [1]
    table.erase(int64(1))  # after the first delta, which may have been applied though nobody acknowledged it
    delta, epoch = table.consumers.export("late")
    assert (delta.keys.tolist(), delta.tombstones.tolist()) == ([], [1])
    table.consumers.acknowledge("late", epoch)
    table.consumers.subscribe("late")  # again: nothing is sent twice
    assert not len(table.consumers.export("late")[0].tombstones)


def test_only_closed_epochs_of_known_consumers_can_be_acknowledged() -> None:
    table = EmbeddingTable("item", DIM)
    table.consumers.subscribe("server")
    _, epoch = table.consumers.export("server")
    for bad in (epoch + 1, -1):
        with pytest.raises(ValueError, match="acknowledge what export returned"):
            table.consumers.acknowledge("server", bad)
    table.consumers.acknowledge("server", epoch)
    table.consumers.acknowledge("server", 0)  # late and out of order: what it has it keeps
    _change(table, 1)
    assert table.consumers.export("server")[0].keys.tolist() == [1]
    with pytest.raises(KeyError, match="nobody"):
        table.consumers.export("nobody")
    with pytest.raises(KeyError, match="nobody"):
        table.consumers.acknowledge("nobody", epoch)


def test_a_row_that_became_a_candidate_again_is_erased_at_the_consumer() -> None:
    table, replica = (EmbeddingTable("item", DIM, admission_threshold=3) for _ in range(2))
    table.find_or_insert(int64(1))
    closed = table.advance_epoch()
    replica.apply_delta(table.export_delta(0))
    table.erase(int64(1))
    _change(table, 1)
    delta = table.export_delta(closed)
    assert (delta.tombstones.tolist(), delta.candidate_keys.tolist()) == ([1], [1])
    replica.apply_delta(delta)
    assert_same_table(table, replica)
    assert len(replica) == 0 and replica.stats()["candidates"] == 1


def test_a_delta_names_rows_that_were_only_read_where_reading_keeps_them_alive() -> None:
    table = EmbeddingTable("item", DIM, ttl_us=SECOND, ttl_on_access=True)
    table.apply_gradients(int64(1, 2), np.ones((2, DIM), np.float32), now_us=SECOND)
    closed = table.advance_epoch()
    table(torch.tensor([1]))
    table.step(now_us=2 * SECOND)
    delta = table.export_delta(closed)
    assert (delta.keys.tolist(), column(delta, "last_update_us").tolist()) == ([1], [2 * SECOND])


def test_the_cost_of_a_small_delta_does_not_depend_on_the_table() -> None:
    """Its arrays hold the changed rows alone, however many rows and epochs went before."""
    table = EmbeddingTable("item", DIM)
    table.upsert(np.arange(50_000, dtype=np.int64), np.zeros((50_000, DIM), np.float32))
    for _ in range(50):
        closed = table.advance_epoch()
        _change(table, 7)
        _change(table, -7)
        assert table.export_delta(closed).keys.tolist() == [-7, 7]


@pytest.mark.parametrize(
    "damage",
    [
        {"weights": np.full((1, DIM), np.nan, np.float32)},
        {"counts": np.zeros(1, np.int64)},
        {"last_update_us": int64(-1)},
        {"candidate_keys": int64(5), "candidates": np.ones(1, np.uint32)},
    ],
    ids=["weights", "type of counts", "time", "candidates of a table without admission"],
)
def test_a_delta_that_is_refused_erases_nothing(damage: dict[str, Any]) -> None:
    table = EmbeddingTable("item", DIM)
    table.find_or_insert(int64(1, 2))
    before = table.export_all()
    delta = TableDelta(int64(3), np.ones((1, DIM), np.float32), tombstones=int64(1))
    with pytest.raises((ValueError, TypeError)):
        table.apply_delta(dataclasses.replace(delta, **damage))
    after = table.export_all()
    assert after.keys.tolist() == [1, 2] and after.weights.tobytes() == before.weights.tobytes()
    table.apply_delta(delta)
    assert table.export_all().keys.tolist() == [2, 3]


def test_a_consumer_that_is_gone_for_good_keeps_no_tombstones() -> None:
    table = EmbeddingTable("item", DIM)
    table.consumers.subscribe("server")
    table.consumers.subscribe("gone")
    _change(table, 1)
    table.erase(int64(1))
    table.consumers.acknowledge("server", table.consumers.export("server")[1])
    assert table.stats()["tombstones"] == 1
    table.consumers.unsubscribe("gone")
    assert table.stats()["tombstones"] == 0
    with pytest.raises(KeyError, match="gone"):
        table.consumers.export("gone")


def test_an_acknowledgement_from_before_a_new_subscription_takes_no_row_from_it() -> None:
    table = EmbeddingTable("item", DIM)
    table.consumers.subscribe("server")
    table.find_or_insert(int64(1, 2, 3))
    _, epoch = table.consumers.export("server")
    table.consumers.unsubscribe("server")  # it lost its disk
    table.consumers.subscribe("server")
    for no_later in (epoch, table.epoch() - 1):
        table.consumers.acknowledge("server", no_later)
    assert table.consumers.export("server")[0].keys.tolist() == [1, 2, 3]


def test_an_export_beside_acknowledgements_of_the_same_consumer_is_complete() -> None:
    table = EmbeddingTable("item", DIM)
    table.consumers.subscribe("server")
    epochs: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def acknowledge() -> None:
        while (epoch := epochs.get()) is not None:
            table.consumers.acknowledge("server", epoch)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(acknowledge)
        for k in range(3000):
            table.find_or_insert(int64(k))
            table.erase(int64(k))
            epochs.put(table.consumers.export("server")[1])
        epochs.put(None)
        done.result()
    assert table.stats()["tombstones"] == 0


def test_what_comes_back_while_the_first_delta_is_taken_is_not_erased_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    table = EmbeddingTable("item", DIM)
    table.consumers.subscribe("server")
    table.find_or_insert(int64(1, 2))
    table.erase(int64(1, 2))
    compiled = table._table

    class Late:
        def __getattr__(self, name: str) -> Any:
            return getattr(compiled, name)

        def export_all(self) -> Any:
            table.find_or_insert(int64(1))  # by another thread, between the two parts of the export
            return compiled.export_all()

    monkeypatch.setattr(table.consumers, "_table", Late())
    delta, _ = table.consumers.export("server")
    assert (delta.keys.tolist(), delta.tombstones.tolist()) == ([1], [2])
