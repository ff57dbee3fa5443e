"""Snapshots of embedding tables: one moment for everything, and training that goes on from there to the same bits."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.errors import AlreadyExists, BadInput
from model import table_snapshot
from model.table import OPTIMIZERS, EmbeddingTable
from model.table_snapshot import load_snapshot, save_snapshot
from tests.model.table_model import assert_same_table, int64

torch.set_num_threads(1)

SECOND = 1_000_000
POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "threshold": {"admission_threshold": 3},
    "probability": {"admission_probability": 0.3},
    "expiry": {"ttl_us": 8 * SECOND, "ttl_on_access": True, "sweep_steps": 5, "min_rows": 20},
    "refuse": {"max_rows": 150},
    "evict": {"max_rows": 2500, "when_full": "evict_rarest", "admission_threshold": 2, "ttl_us": 20 * SECOND},
}


def train(table: EmbeddingTable, steps: range, ids: int = 4000) -> None:
    """Every kind of change; each step is a function of its number alone."""
    for step in steps:
        random = np.random.default_rng(step)
        batch = random.zipf(1.1, 300).astype(np.int64) % ids - ids // 4
        grads = random.normal(size=(len(batch), table.dim)).astype(np.float32)
        table.apply_gradients(batch, grads, lr=0.1 / (1 + step), now_us=step * SECOND)
        table(torch.from_numpy(batch[:20]))
        table.step(now_us=step * SECOND)
        table.erase(random.integers(0, ids, 7))
        table.find_or_insert(random.integers(0, ids, 3))
        table.upsert(int64(step), np.ones((1, table.dim), np.float32), last_update_us=int64(step * SECOND))
        if step % 9 == 8:
            table.expire((step - 15) * SECOND)
        if step % 5 == 4:
            table.advance_epoch()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_train_snapshot_restore_train_equals_train_train(optimizer: str, policy: str, tmp_path: Path) -> None:
    def make(shards: int = 16) -> EmbeddingTable:
        return EmbeddingTable("item", 3, optimizer, seed=9, initial_accumulator=0.1, shards=shards, **POLICIES[policy])

    through, resumed = make(), make()
    train(through, range(30))
    train(resumed, range(30))
    manifest = save_snapshot(resumed, tmp_path / "snapshot")
    assert manifest.total("rows") == len(resumed) and manifest.total("candidates") == resumed.stats()["candidates"]
    resumed = load_snapshot(tmp_path / "snapshot", lambda: make(shards=4))
    assert_same_table(through, resumed)
    assert through.epoch() == resumed.epoch()
    closed = through.epoch() - 2
    for _ in range(2):
        a, b = through.export_delta(closed), resumed.export_delta(closed)
        assert a.keys.tolist() == b.keys.tolist() and a.tombstones.tolist() == b.tombstones.tolist()
        for one in (through, resumed):
            one.apply_gradients(int64(1), np.ones((1, 3), np.float32), now_us=SECOND)  # late: time does not go back
            train(one, range(30, 45))
        assert_same_table(through, resumed)


def test_settings_may_be_numbers_of_numpy(tmp_path: Path) -> None:
    betas: Any = (np.float32(0.8), np.float32(0.9))
    table = EmbeddingTable("item", np.int64(3), "adam", seed=np.uint64(5), betas=betas)  # type: ignore[arg-type]
    save_snapshot(table, tmp_path / "snapshot")
    restored = load_snapshot(tmp_path / "snapshot")
    assert restored.settings == {**table.settings, "threads": None}


def test_the_settings_come_with_the_snapshot(tmp_path: Path) -> None:
    table = EmbeddingTable(
        "author", 2, "adam", learning_rate=0.3, init_scale=0.2, seed=2**64 - 1, epsilon=1e-3, betas=(0.5, 0.75),
        admission_threshold=2, ttl_us=5, ttl_on_access=True, min_rows=1, sweep_steps=3, max_rows=7,
        when_full="evict_rarest", shards=2, threads=1,
    )  # fmt: skip
    save_snapshot(table, tmp_path / "snapshot")
    restored = load_snapshot(tmp_path / "snapshot")
    assert restored.settings == {**table.settings, "threads": None}
    assert torch.equal(table.lookup(int64(5)), restored.lookup(int64(5)))


def test_a_folder_may_be_named_by_a_text(tmp_path: Path) -> None:
    table = EmbeddingTable("item", 3)
    table.find_or_insert(int64(5))
    save_snapshot(table, f"{tmp_path}/snapshot")
    for folders in (f"{tmp_path}/snapshot", [f"{tmp_path}/snapshot"]):
        assert_same_table(table, load_snapshot(folders))


def test_a_learning_rate_that_was_set_comes_with_the_snapshot(tmp_path: Path) -> None:
    table = EmbeddingTable("item", 3, learning_rate=0.1)
    table.learning_rate = 0.01
    save_snapshot(table, tmp_path / "snapshot")
    restored = load_snapshot(tmp_path / "snapshot")
    for each in (table, restored):
        each.apply_gradients(int64(5), np.ones((1, 3), np.float32))
    assert_same_table(table, restored)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slot", "user"), ("dim", 4), ("optimizer", "sgd"), ("init_scale", 0.1), ("seed", 1), ("epsilon", 1e-5),
        ("initial_accumulator", 0.5), ("betas", (0.5, 0.9)), ("l1", 0.1), ("l2", 0.1), ("ftrl_beta", 2.0),
    ],
)  # fmt: skip
def test_a_table_in_which_the_rows_would_mean_something_else_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"slot": "item", "dim": 3, "optimizer": "ftrl" if name in ("l1", "l2") else "adagrad"}
    save_snapshot(EmbeddingTable(**settings), tmp_path / "snapshot")
    settings[name] = value
    with pytest.raises(BadInput, match=rf"snapshot and the table differ in {name} \(.*; make the table as"):
        load_snapshot(tmp_path / "snapshot", lambda: EmbeddingTable(**settings))


def test_other_policies_and_speeds_are_the_callers_choice(tmp_path: Path) -> None:
    table = EmbeddingTable("item", 3, admission_threshold=5)
    table.find_or_insert(np.arange(10, dtype=np.int64))
    table.apply_gradients(int64(77), np.ones((1, 3), np.float32))
    save_snapshot(table, tmp_path / "snapshot")
    restored = load_snapshot(
        tmp_path / "snapshot",
        lambda: EmbeddingTable("item", 3, learning_rate=1.0, admission_threshold=2, max_rows=10, threads=1, shards=1),
    )
    assert_same_table(table, restored)
    assert restored.apply_gradients(int64(77), np.ones((1, 3), np.float32)) == 0
    assert restored.stats()["refused_full"] == 1
    with pytest.raises(BadInput, match="wait for admission; give the table an admission_threshold above 1"):
        load_snapshot(tmp_path / "snapshot", lambda: EmbeddingTable("item", 3))


def test_an_empty_table_and_one_of_tombstones_alone_come_back(tmp_path: Path) -> None:
    table = EmbeddingTable("item", 3)
    save_snapshot(table, tmp_path / "empty")
    assert len(load_snapshot(tmp_path / "empty")) == 0
    table.find_or_insert(int64(1, 2))
    table.erase(int64(1, 2))
    save_snapshot(table, tmp_path / "erased")
    assert load_snapshot(tmp_path / "erased").export_delta(0).tombstones.tolist() == [1, 2]


def test_a_table_with_rows_cannot_be_filled(tmp_path: Path) -> None:
    table = EmbeddingTable("item", 3)
    table.find_or_insert(int64(1))
    save_snapshot(table, tmp_path / "snapshot")
    with pytest.raises(ValueError, match="empty table only"):
        load_snapshot(tmp_path / "snapshot", lambda: table)


def test_consumers_go_on_where_they_were(tmp_path: Path) -> None:
    table = EmbeddingTable("item", 2)
    table.consumers.subscribe("server")
    table.find_or_insert(int64(1, 2, 3))
    table.consumers.acknowledge("server", table.consumers.export("server")[1])
    table.erase(int64(1))
    table.upsert(int64(2), np.zeros((1, 2), np.float32))
    table.consumers.subscribe("late")
    save_snapshot(table, tmp_path / "snapshot")
    restored = load_snapshot(tmp_path / "snapshot")
    for name, keys in (("server", [2]), ("late", [2, 3])):
        for one in (table, restored):
            delta, epoch = one.consumers.export(name)
            assert delta.keys.tolist() == keys
            assert delta.tombstones.tolist() == ([1] if name == "server" else [])
            one.consumers.acknowledge(name, epoch)
    assert restored.stats()["tombstones"] == 0


def test_a_delta_that_was_refused_before_a_snapshot_is_refused_after_it(tmp_path: Path) -> None:
    table = EmbeddingTable("item", 2)
    table.consumers.subscribe("server")
    table.find_or_insert(int64(1, 2))
    table.consumers.acknowledge("server", table.consumers.export("server")[1])
    table.erase(int64(2))
    table.drop_tombstones(table.advance_epoch())  # by hand, though the server does not have it
    save_snapshot(table, tmp_path / "snapshot")
    for one in (table, load_snapshot(tmp_path / "snapshot")):
        with pytest.raises(ValueError, match="were dropped"):
            one.consumers.export("server")


def test_a_snapshot_is_whole_after_any_number_of_snapshots_that_were_given_up(tmp_path: Path) -> None:
    table = EmbeddingTable("item", 2)
    table.find_or_insert(int64(1, 2, 3))
    for _ in range(2**16):
        table_snapshot.freshet_table.SnapshotScan(table._table).close()
    assert save_snapshot(table, tmp_path / "snapshot").total("rows") == 3


def test_a_candidate_that_changes_after_it_was_read_is_in_the_snapshot_once() -> None:
    table = EmbeddingTable("item", 2, admission_threshold=5)
    ids = np.arange(100, dtype=np.int64)
    table.apply_gradients(ids, np.ones((100, 2), np.float32))
    scan = table_snapshot.freshet_table.SnapshotScan(table._table)
    blocks = [scan.next()]
    table.apply_gradients(ids, np.ones((100, 2), np.float32))
    while (block := scan.next()) is not None:
        blocks.append(block)
    scan.close()
    keys = np.concatenate([block["candidate_keys"] for block in blocks if block is not None])
    assert sorted(keys.tolist()) == ids.tolist()


# While training goes on


def big(**settings: Any) -> EmbeddingTable:
    """A table whose snapshot has many blocks."""
    return EmbeddingTable("item", 1024, **{"threads": 1, "shards": 8, **settings})


def fill(table: EmbeddingTable) -> None:
    table.upsert(np.arange(-1000, 3000, dtype=np.int64), np.full((4000, table.dim), 0.5, np.float32))


@pytest.fixture
def between_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """between_blocks(f): each snapshot calls f(k) before it reads block k, and f must have been called by its end."""

    def install(f: Callable[[int], None]) -> None:
        native = table_snapshot.freshet_table.SnapshotScan

        class Scan:
            def __init__(self, table: Any) -> None:
                self.scan, self.blocks = native(table), 0

            def next(self) -> Any:
                f(self.blocks)
                self.blocks += 1
                return self.scan.next()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.scan, name)

        monkeypatch.setattr(table_snapshot.freshet_table, "SnapshotScan", Scan)

    return install


@pytest.mark.parametrize("policy", ["plain", "threshold", "expiry", "evict"])
def test_changes_between_blocks_are_not_in_the_snapshot(
    policy: str, tmp_path: Path, between_blocks: Callable[[Callable[[int], None]], None]
) -> None:
    table, at_the_moment, undisturbed = (big(**POLICIES[policy]) for _ in range(3))
    for one in (table, at_the_moment, undisturbed):
        fill(one)
        train(one, range(5))
    steps: list[int] = []

    def train_on(block: int) -> None:
        train(table, range(5 + block, 6 + block))
        steps.append(5 + block)
        if block == 2:  # growth: new segments, new slabs
            table.upsert(np.arange(10_000, 13_000, dtype=np.int64), np.zeros((3000, 1024), np.float32))

    between_blocks(train_on)
    manifest = save_snapshot(table, tmp_path / "snapshot")
    assert len(manifest.blocks) > 6
    assert any((b.first_bucket, b.last_bucket) == (0, 1023) and b.rows for b in manifest.blocks)  # rows handed over
    restored = load_snapshot(tmp_path / "snapshot")
    assert_same_table(restored, at_the_moment)
    assert restored.epoch() == at_the_moment.epoch()
    train(restored, range(5, 8))
    train(at_the_moment, range(5, 8))
    assert_same_table(restored, at_the_moment)
    for step in steps:  # and the snapshot has changed nothing in the table itself
        train(undisturbed, range(step, step + 1))
        if step == 7:
            undisturbed.upsert(np.arange(10_000, 13_000, dtype=np.int64), np.zeros((3000, 1024), np.float32))
    assert_same_table(table, undisturbed)


def test_a_snapshot_beside_a_training_thread_is_the_state_after_one_of_its_updates(tmp_path: Path) -> None:
    def step_once(table: EmbeddingTable, step: int) -> None:
        random = np.random.default_rng(step)
        ids = random.integers(-1000, 6000, 200)
        table.apply_gradients(ids, random.normal(size=(200, 1024)).astype(np.float32), now_us=step * SECOND)

    policy = {"admission_threshold": 2, "ttl_us": 30 * SECOND, "max_rows": 4200, "when_full": "evict_stalest"}
    table, replay = big(**policy), big(**policy)
    fill(table)
    fill(replay)
    done = threading.Event()

    def loop() -> None:
        step = 1
        while not done.is_set():
            step_once(table, step)
            step += 1

    trainer = threading.Thread(target=loop)
    trainer.start()
    manifests = [save_snapshot(table, tmp_path / str(n)) for n in range(3)]
    done.set()
    trainer.join()
    updates = [manifest.progress["updates"] for manifest in manifests]
    assert updates == sorted(updates) and updates[0] < updates[-1]
    for n, (before, count) in enumerate(zip([0, *updates], updates, strict=False)):
        for step in range(before + 1, count + 1):
            step_once(replay, step)
        assert_same_table(load_snapshot(tmp_path / str(n)), replay)


def test_one_snapshot_at_a_time(tmp_path: Path, between_blocks: Callable[[Callable[[int], None]], None]) -> None:
    table = EmbeddingTable("item", 3)

    def second(block: int) -> None:
        if block == 0:
            with pytest.raises(RuntimeError, match="another snapshot of this table is being taken"):
                save_snapshot(table, tmp_path / "second")

    between_blocks(second)
    save_snapshot(table, tmp_path / "first")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    with pytest.raises(AlreadyExists, match=r"first is not empty; give every snapshot a folder of its own"):
        save_snapshot(table, tmp_path / "first")


def test_a_table_with_candidates_alone_cannot_be_filled_either(tmp_path: Path) -> None:
    def make() -> EmbeddingTable:
        return EmbeddingTable("item", 2, admission_threshold=3)

    waiting = make()
    waiting.apply_gradients(int64(1), np.ones((1, 2), np.float32))
    save_snapshot(waiting, tmp_path / "snapshot")
    with pytest.raises(ValueError, match="an empty table only"):
        load_snapshot(tmp_path / "snapshot", lambda: waiting)
