"""Snapshots of an embedding table: taken while it is trained, restored into any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from components.errors import BadInput, CorruptLog
from model._native import freshet_table
from model.table import EmbeddingTable
from model.table_arrays import Int64Array, UInt32Array
from model.table_files import REMEDY, Array, Block, SnapshotManifest, SnapshotReader, SnapshotWriter

__all__ = ["SnapshotManifest", "load_snapshot", "save_snapshot"]

BUCKETS: int = freshet_table.VIRTUAL_BUCKETS
ROWS = ("keys", "weights", "state", "last_seen", "dirty_epoch", "counts")
CANDIDATES = ("candidate_keys", "candidates")
TOMBSTONES = ("tombstones", "tombstone_epochs")

# What the rows mean or how they will go on does not depend on these: a restored table may have others.
_FREE = ("learning_rate", "shards", "threads")
_POLICIES = (
    "admission_threshold",
    "admission_probability",
    "ttl_us",
    "ttl_on_access",
    "min_rows",
    "sweep_steps",
    "max_rows",
    "when_full",
)


def save_snapshot(table: EmbeddingTable, folder: Path | str) -> SnapshotManifest:
    """Writes the table as it is at one moment, soon after the call, to a folder that does not exist or is empty.

    Weights, optimiser state, bookkeeping, candidates, tombstones and the consumers' epochs are all of that moment.
    Other threads may go on training, for which it gives way: it then takes several times as long. Gradients that wait
    for `step` are not part of the table. The folder appears when all of it is on the disk. AlreadyExists if it is
    taken; RuntimeError if another snapshot of it is in progress, or if no memory was left for rows that training
    changed meanwhile; OSError if the disk refuses.
    """
    with SnapshotWriter(Path(folder)) as writer:
        with table.consumers.held() as (consumers, newcomers):  # nobody's epoch can be ahead of the moment
            scan = freshet_table.SnapshotScan(table._table)
        try:
            progress = scan.progress()
            writer.write(0, BUCKETS - 1, dict(zip(TOMBSTONES, scan.tombstones(), strict=True)))
            rows = 0
            while (block := scan.next()) is not None:
                writer.write(block["first_bucket"], block["last_bucket"], block)
                rows += len(block["keys"])
                scan.give_way()
        finally:
            scan.close()
        if rows != (expected := progress.pop("rows")):
            raise RuntimeError(f"the snapshot has {rows} rows instead of {expected}; nothing was published")
        return writer.publish(
            SnapshotManifest(_settings(table), int(table.dim), table.state_dim, progress, consumers, newcomers)
        )


def load_snapshot(
    folders: Path | str | Sequence[Path | str],
    make_table: Callable[[], EmbeddingTable] | None = None,
    shard: tuple[int, int] | None = None,
) -> EmbeddingTable:
    """The table of a snapshot, which goes on from there to the same bits.

    folders: one snapshot, or those of all processes that share a table, taken after the same update.
    make_table: gives the empty table to fill. It may have other policies (admission, expiry, max_rows), learning rate,
    shards and threads; anything else must be as in the snapshot. None: all as in the snapshot.
    shard: (i, n) takes process i's part of n: the ids in virtual buckets i * 1024 // n to (i + 1) * 1024 // n. Blocks
    without such ids are not read. min_rows and max_rows then count this process's rows alone.
    BadInput for settings, folders or a shard that do not fit; CorruptLog, with its name, for a damaged or missing file.
    """
    first, last = _bucket_range(shard)
    with ExitStack() as stack:
        paths = [folders] if isinstance(folders, Path | str) else list(folders)
        readers = [stack.enter_context(SnapshotReader(Path(path))) for path in paths]
        manifest = _joined(readers)
        table = EmbeddingTable(**_arguments(manifest.settings)) if make_table is None else make_table()
        _check_settings(table, manifest, readers[0].folder)
        parts = [
            (reader, index, block)
            for reader in readers
            for index, block in enumerate(reader.manifest.blocks)
            if block.first_bucket <= last and block.last_bucket >= first
        ]
        _restore_bookkeeping(table, manifest, parts, range(first, last + 1))
        for reader, index, block in parts:
            _restore_block(table, reader, index, block, range(first, last + 1))
    return table


def _bucket_range(shard: tuple[int, int] | None) -> tuple[int, int]:
    """First and last virtual bucket of a process."""
    index, count = shard or (0, 1)
    if not 0 <= index < count <= BUCKETS:
        raise BadInput(f"shard must be (i, n) with 0 <= i < n <= {BUCKETS}, got {shard}")
    return index * BUCKETS // count, (index + 1) * BUCKETS // count - 1


def _settings(table: EmbeddingTable) -> dict[str, Any]:
    """The table's settings as JSON gives them back."""
    settings = {**table.settings, "learning_rate": table.learning_rate}  # a schedule may have changed it
    return {name: _plain(value) for name, value in settings.items() if name != "threads"}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


def _arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The settings that decide what rows mean and that are not equal."""
    names = sorted((a.keys() | b.keys()) - {*_FREE, *_POLICIES})
    return ", ".join(f"{name} ({a.get(name)!r} and {b.get(name)!r})" for name in names if a.get(name) != b.get(name))


def _check_settings(table: EmbeddingTable, manifest: SnapshotManifest, folder: Path) -> None:
    if different := _different(manifest.settings, _settings(table)):
        raise BadInput(
            f"the snapshot {folder} and the table differ in {different}; make the table as the snapshot's was"
        )
    if (table.dim, table.state_dim) != (manifest.dim, manifest.state_dim):
        raise CorruptLog(f"{folder} has rows of another size than its settings say; {REMEDY}")
    if manifest.total("candidates") and table.settings["admission_threshold"] == 1:
        raise BadInput(f"{folder} has ids that wait for admission; give the table an admission_threshold above 1")


def _joined(readers: list[SnapshotReader]) -> SnapshotManifest:
    """The manifest of the whole, after proving that the snapshots are parts of one table after one update."""
    if not readers:
        raise BadInput("no snapshot folder was given; name at least one")
    manifests = [reader.manifest for reader in readers]
    first = manifests[0]
    for reader in readers[1:]:
        both, other = f"{readers[0].folder} and {reader.folder}", reader.manifest
        if different := _different(first.settings, other.settings):
            raise BadInput(f"{both} differ in {different}; name parts of one table")
        if any(first.progress[name] != other.progress[name] for name in ("epoch", "updates")):
            raise BadInput(f"{both} were not taken after the same update; name snapshots of one moment")
    clock = max(m.progress["clock"] for m in manifests)
    consumers: dict[str, int] = {}
    for name, epoch in (item for m in manifests for item in m.consumers.items()):
        consumers[name] = min(epoch, consumers.get(name, epoch))
    known_to_all = consumers.keys() & set.intersection(*(set(m.consumers) - set(m.newcomers) for m in manifests))
    newcomers = tuple(sorted(consumers.keys() - known_to_all))
    dropped_to = max(m.progress["dropped_to"] for m in manifests)
    if all(epoch >= m.progress["dropped_to"] for m in manifests for epoch in m.consumers.values()):
        # What a part has dropped, its own consumers have: one whose cursor is behind in another part misses none.
        dropped_to = min([dropped_to, *consumers.values()])
    progress = {**first.progress, "clock": clock, "dropped_to": dropped_to}
    return replace(first, progress=progress, consumers=consumers, newcomers=newcomers)


Part = tuple[SnapshotReader, int, Block]


def _restore_bookkeeping(table: EmbeddingTable, manifest: SnapshotManifest, parts: list[Part], own: range) -> None:
    keys, epochs = [np.empty(0, np.int64)], [np.empty(0, np.uint32)]
    for reader, index, block in parts:
        if block.tombstones:
            columns = _own_part(reader.read(index, TOMBSTONES), own, block)
            keys.append(columns["tombstones"].copy())
            epochs.append(columns["tombstone_epochs"].copy())
    gone: Int64Array = np.concatenate(keys)
    when: UInt32Array = np.concatenate(epochs)
    freshet_table.begin_restore(table._table, dict(manifest.progress), gone, when)
    table.consumers.restore(manifest.consumers, manifest.newcomers)


def _restore_block(table: EmbeddingTable, reader: SnapshotReader, index: int, block: Block, own: range) -> None:
    if block.rows:
        columns = _own_part(reader.read(index, ROWS), own, block)
        seen_us = columns["last_seen"].astype(np.int64) * 1_000_000
        keys, weights, state = columns["keys"], columns["weights"], columns["state"]
        counts, epochs = columns["counts"], columns["dirty_epoch"]
        inserted = table._table.upsert(keys, weights, state, seen_us, counts, epochs, table._threads())
        if inserted != len(keys):
            raise CorruptLog(f"{reader.folder} has rows that came before in this restore; name each snapshot once")
    if block.candidates:
        columns = _own_part(reader.read(index, CANDIDATES), own, block)
        table._table.put_candidates(columns["candidate_keys"], columns["candidates"])


def _own_part(columns: dict[str, Array], own: range, block: Block) -> dict[str, Array]:
    """The entries whose ids, the first column, lie in the own virtual buckets."""
    if own.start <= block.first_bucket and block.last_bucket < own.stop:
        return columns
    buckets = freshet_table.virtual_buckets(next(iter(columns.values())))
    mine = (buckets >= own.start) & (buckets < own.stop)
    return {name: values[mine] for name, values in columns.items()}
