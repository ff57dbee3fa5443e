"""Snapshots of embedding tables, restored into any number of processes by virtual buckets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.errors import BadInput, FreshetError
from model.table import EmbeddingTable
from model.table_files import SnapshotReader
from model.table_snapshot import load_snapshot, save_snapshot
from tests.model.table_model import assert_same_table, column, hash_id, int64

torch.set_num_threads(1)

SECOND = 1_000_000


def example(steps: int) -> EmbeddingTable:
    """Rows, candidates and tombstones in all virtual buckets."""
    table = EmbeddingTable("item", 2, admission_threshold=2)
    for step in range(steps):
        random = np.random.default_rng(step)
        ids = random.zipf(1.1, 400).astype(np.int64) % 5000 - 1000
        table.apply_gradients(ids, random.normal(size=(400, 2)).astype(np.float32))
        table.erase(ids[:20])
    return table


def owner(key: int, count: int) -> int:
    bucket = hash_id(key) >> 54
    return next(i for i in range(count) if i * 1024 // count <= bucket < (i + 1) * 1024 // count)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1024])
def test_processes_share_a_snapshot_by_virtual_buckets(count: int, tmp_path: Path) -> None:
    table = example(steps=12)
    save_snapshot(table, tmp_path / "snapshot")
    whole = table.export_all()
    gone = table.export_delta(0).tombstones
    for i in range(0, count, 1 if count < 10 else 200):
        part = load_snapshot(tmp_path / "snapshot", shard=(i, count))
        delta = part.export_all()
        mine = np.array([owner(int(key), count) == i for key in whole.keys], bool)
        assert delta.keys.tolist() == whole.keys[mine].tolist()
        assert delta.weights.tobytes() == whole.weights[mine].tobytes()
        assert column(delta, "state").tobytes() == column(whole, "state")[mine].tobytes()
        waiting = [key for key in whole.candidate_keys.tolist() if owner(key, count) == i]
        assert delta.candidate_keys.tolist() == waiting
        assert part.export_delta(0).tombstones.tolist() == [k for k in gone.tolist() if owner(k, count) == i]


def test_a_process_reads_only_the_blocks_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = EmbeddingTable("item", 1024)
    table.find_or_insert(np.arange(-1000, 3000, dtype=np.int64))
    blocks = save_snapshot(table, tmp_path / "snapshot").blocks
    read: set[int] = set()
    native = SnapshotReader.read

    def note_and_read(self: SnapshotReader, index: int, names: tuple[str, ...]) -> dict:
        read.add(index)
        return native(self, index, names)

    monkeypatch.setattr(SnapshotReader, "read", note_and_read)
    load_snapshot(tmp_path / "snapshot", shard=(1, 4))
    assert read == {i for i, b in enumerate(blocks) if b.rows and b.first_bucket < 512 and b.last_bucket >= 256}
    assert 0 < len(read) < len(blocks) / 2


@pytest.mark.parametrize("shard", [(1, 1), (-1, 2), (0, 0), (0, 1025)])
def test_shards_that_do_not_exist_are_refused(shard: tuple[int, int], tmp_path: Path) -> None:
    save_snapshot(EmbeddingTable("item", 2), tmp_path / "snapshot")
    with pytest.raises(BadInput, match="0 <= i < n <= 1024"):
        load_snapshot(tmp_path / "snapshot", shard=shard)


def test_any_number_of_processes_goes_on_as_one(tmp_path: Path) -> None:
    """1, 3 and then 2 processes, each fed its own ids, together are the one table that was never split."""
    policy: dict[str, Any] = {"admission_threshold": 2, "ttl_us": 15 * SECOND, "sweep_steps": 4}

    def step_all(tables: list[EmbeddingTable], steps: range) -> None:
        for step in steps:
            random = np.random.default_rng(step)
            ids = random.zipf(1.2, 400).astype(np.int64) % 2000
            grads = random.normal(size=(400, 2)).astype(np.float32)
            for i, table in enumerate(tables):
                mine = np.array([owner(int(key), len(tables)) == i for key in ids])
                table.apply_gradients(ids[mine], grads[mine], now_us=step * SECOND)

    def save(tables: list[EmbeddingTable], name: str) -> list[Path]:
        for i, table in enumerate(tables):
            save_snapshot(table, tmp_path / name / str(i))
        return [tmp_path / name / str(i) for i in range(len(tables))]

    through = [EmbeddingTable("item", 2, **policy)]
    step_all(through, range(12))
    through[0].consumers.subscribe("server")
    folder = save(through, "one")
    parts = [load_snapshot(folder, shard=(i, 3)) for i in range(3)]
    step_all(through, range(12, 24))
    step_all(parts, range(12, 24))
    folders = save(parts, "three")
    parts = [load_snapshot(folders, shard=(i, 2)) for i in range(2)]
    step_all(through, range(24, 36))
    step_all(parts, range(24, 36))
    joined = load_snapshot(save(parts, "two"))
    assert_same_table(joined, through[0])
    assert joined.stats()["expired"] == 0 < through[0].stats()["expired"]
    a, b = joined.consumers.export("server")[0], through[0].consumers.export("server")[0]
    assert a.keys.tolist() == b.keys.tolist() and a.tombstones.tolist() == b.tombstones.tolist()


def test_snapshots_that_are_not_parts_of_one_table_are_refused(tmp_path: Path) -> None:
    table = EmbeddingTable("item", 2)
    table.find_or_insert(int64(1))
    save_snapshot(table, tmp_path / "a")
    save_snapshot(table, tmp_path / "same")
    save_snapshot(EmbeddingTable("user", 2), tmp_path / "user")
    table.apply_gradients(int64(1), np.ones((1, 2), np.float32))
    save_snapshot(table, tmp_path / "later")
    for other, message in (
        ("same", "rows that came before in this restore; name each snapshot once"),
        ("user", r"differ in slot \('item' and 'user'\)"),
        ("later", "not taken after the same update"),
    ):
        with pytest.raises(FreshetError, match=message):
            load_snapshot([tmp_path / "a", tmp_path / other])
    with pytest.raises(BadInput, match="name at least one"):
        load_snapshot([])


def test_a_consumer_that_had_acknowledged_one_part_alone_goes_on_after_the_parts_are_joined(tmp_path: Path) -> None:
    table = EmbeddingTable("item", 2)
    table.consumers.subscribe("server")
    table.find_or_insert(np.arange(100, dtype=np.int64))
    table.consumers.acknowledge("server", table.consumers.export("server")[1])
    save_snapshot(table, tmp_path / "one")
    parts = [load_snapshot(tmp_path / "one", shard=(i, 2)) for i in range(2)]
    gone = [part.export_all().keys[:5] for part in parts]
    for i, part in enumerate(parts):
        part.erase(gone[i])
        epoch = part.consumers.export("server")[1]
        if i == 0:
            part.consumers.acknowledge("server", epoch)
        save_snapshot(part, tmp_path / str(i))
    joined = load_snapshot([tmp_path / "0", tmp_path / "1"])
    delta, epoch = joined.consumers.export("server")
    assert set(gone[1]) <= set(delta.tombstones)
    joined.consumers.acknowledge("server", epoch)
    assert joined.stats()["tombstones"] == 0
