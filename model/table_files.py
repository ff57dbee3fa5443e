"""Snapshot files: one little-endian file per column, and a manifest that names every block's rows and checksums.

A column file is the column's blocks one after the other and nothing else: `numpy.fromfile(folder / "keys.bin", "<i8")`
is the column. The manifest is JSON in one fixed spelling, with a checksum of its own.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from components.errors import AlreadyExists, BadInput, CorruptLog
from components.storage import make_folder, sync_folder
from model._native import freshet_table

MANIFEST = "manifest.json"
FORMAT = 1
REMEDY = "delete the snapshot and restore another one"

Array = npt.NDArray[Any]


class Column(NamedTuple):
    """What a column holds one entry of, its dtype, and which width of the manifest is its second dimension."""

    of: str
    dtype: str
    width: str | None = None

    def shape(self, block: Block, manifest: SnapshotManifest) -> tuple[int, ...]:
        entries: int = getattr(block, self.of)
        return (entries,) if self.width is None else (entries, getattr(manifest, self.width))


COLUMNS = {
    "keys": Column("rows", "<i8"),
    "weights": Column("rows", "<f4", "dim"),
    "state": Column("rows", "<f4", "state_dim"),
    "last_seen": Column("rows", "<u4"),  # event time in seconds
    "dirty_epoch": Column("rows", "<u4"),
    "counts": Column("rows", "<u2"),
    "candidate_keys": Column("candidates", "<i8"),
    "candidates": Column("candidates", "<u4"),
    "tombstones": Column("tombstones", "<i8"),
    "tombstone_epochs": Column("tombstones", "<u4"),
}


@dataclass(frozen=True)
class Block:
    """A run of entries whose ids' virtual buckets are all in first_bucket to last_bucket, both inclusive."""

    first_bucket: int
    last_bucket: int
    rows: int
    candidates: int
    tombstones: int
    crc32c: Mapping[str, int]  # of each column that has entries here


@dataclass(frozen=True)
class SnapshotManifest:
    """What a snapshot holds; all of it as of one moment."""

    settings: Mapping[str, Any]  # of the table, by argument name
    dim: int
    state_dim: int
    progress: Mapping[str, int]  # epochs and cursors, see SnapshotScan.progress
    consumers: Mapping[str, int]  # epoch that each consumer has acknowledged
    newcomers: tuple[str, ...]  # of these, the ones that have acknowledged nothing yet
    blocks: tuple[Block, ...] = ()

    def total(self, what: str) -> int:
        """Entries in all blocks; what: rows, candidates or tombstones."""
        return sum(getattr(block, what) for block in self.blocks)

    def column_bytes(self, name: str) -> int:
        column = COLUMNS[name]
        width = 1 if column.width is None else int(getattr(self, column.width))
        return self.total(column.of) * width * np.dtype(column.dtype).itemsize

    def encode(self) -> bytes:
        """The one spelling of this manifest."""
        body = _spell({"format": FORMAT, **asdict(self)})
        return _spell({"crc32c": freshet_table.crc32c(body), "snapshot": json.loads(body)})

    @classmethod
    def decode(cls, data: bytes, path: Path) -> SnapshotManifest:
        """The manifest that `encode` spells exactly so; CorruptLog for anything else."""
        try:
            fields = json.loads(data)["snapshot"]
            if (version := fields.pop("format")) != FORMAT:
                raise BadInput(
                    f"{path} has format {version}, this release reads {FORMAT}; use the release that wrote it"
                )
            blocks = tuple(Block(**block) for block in fields.pop("blocks"))
            manifest = cls(blocks=blocks, newcomers=tuple(fields.pop("newcomers")), **fields)
            intact = manifest.encode() == data
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptLog(f"{path} is no snapshot manifest ({error}); {REMEDY}") from error
        if not intact:
            raise CorruptLog(f"{path} is damaged: its checksum does not fit; {REMEDY}")
        return manifest


def _spell(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class SnapshotWriter:
    """Writes a snapshot beside `folder`, under a hidden name; `publish` gives it its own. A context manager.

    So `folder` is complete from the moment it exists, whenever the process or the machine dies before. What a dead
    process left is removed by the next writer of the same folder. AlreadyExists if the folder is taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blocks: list[Block] = []
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> SnapshotWriter:
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise AlreadyExists(f"{self.folder} is not empty; give every snapshot a folder of its own")
        make_folder(self.folder.parent)
        _remove_abandoned(self.folder)
        self.temporary = self.folder.with_name(f".{self.folder.name}.{secrets.token_hex(6)}.tmp")
        self.temporary.mkdir()
        with ExitStack() as stack:
            _try_lock(self.temporary, stack)
            for name in COLUMNS:
                path = self.temporary / f"{name}.bin"
                self._files[name] = stack.enter_context(path.open("wb", buffering=0))
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._open.close()
        if self.temporary.exists():  # not published
            shutil.rmtree(self.temporary)

    def write(self, first_bucket: int, last_bucket: int, columns: Mapping[str, Array]) -> None:
        """Appends one block. Columns of the same thing have the same length; absent ones are empty."""
        entries = {"rows": 0, "candidates": 0, "tombstones": 0}
        crc32c = {}
        for name, column in COLUMNS.items():
            values = columns.get(name)
            if values is None or len(values) == 0:
                continue
            stored = np.ascontiguousarray(values, column.dtype)
            crc32c[name] = freshet_table.crc32c(stored)
            _write_all(self._files[name], stored)
            # The disk begins now, not at fsync; and snapshots stay out of the memory that holds other files.
            os.posix_fadvise(self._files[name].fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            entries[column.of] = len(values)
        self.blocks.append(Block(first_bucket, last_bucket, crc32c=crc32c, **entries))

    def publish(self, manifest: SnapshotManifest) -> SnapshotManifest:
        """Makes the blocks written so far, and then their name, durable."""
        manifest = replace(manifest, blocks=tuple(self.blocks))
        for file in self._files.values():
            os.fsync(file.fileno())
        with (self.temporary / MANIFEST).open("wb") as file:
            file.write(manifest.encode())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.temporary)
        try:
            os.rename(self.temporary, self.folder)  # fails if somebody else has published there
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise AlreadyExists(f"{self.folder} was taken meanwhile ({error}); choose another folder") from error
        sync_folder(self.folder.parent)
        return manifest


def _write_all(file: IO[bytes], values: Array) -> None:
    left = values.reshape(-1).view(np.uint8).data
    while left:
        left = left[file.write(left) :]


def _try_lock(folder: Path, until: ExitStack) -> bool:
    """Takes the lock of a writer's folder, which goes when the process dies; False if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    until.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_abandoned(folder: Path) -> None:
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        with suppress(FileNotFoundError), ExitStack() as stack:  # another writer may be faster
            if _try_lock(left, stack):
                shutil.rmtree(left)


class SnapshotReader:
    """Reads the blocks of a complete snapshot, in any order. A context manager.

    BadInput if the folder holds no complete snapshot; CorruptLog, naming the file, for what is damaged or missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadInput(f"{path} does not exist, so {folder} holds no snapshot; name the folder of one") from error
        self.manifest = SnapshotManifest.decode(data, path)
        with ExitStack() as stack:
            self._files = {name: self._open_column(name, stack) for name in COLUMNS}
            self._open = stack.pop_all()
        self._buffers: dict[str, Array] = {}
        self._starts = self._block_starts()

    def __enter__(self) -> SnapshotReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._open.close()

    def _open_column(self, name: str, until: ExitStack) -> int:
        path, expected = self.folder / f"{name}.bin", self.manifest.column_bytes(name)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise CorruptLog(f"{path} is missing; {REMEDY}") from error
        until.callback(os.close, descriptor)
        if (actual := os.fstat(descriptor).st_size) != expected:
            what = "truncated" if actual < expected else "too long"
            raise CorruptLog(f"{path} is {what}: {actual} bytes instead of {expected}; {REMEDY}")
        return descriptor

    def _block_starts(self) -> dict[str, list[int]]:
        """Per column, the byte at which each block begins."""
        starts = {}
        for name, column in COLUMNS.items():
            sizes = [
                int(np.prod(column.shape(block, self.manifest))) * np.dtype(column.dtype).itemsize
                for block in self.manifest.blocks
            ]
            starts[name] = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
        return starts

    def read(self, index: int, names: tuple[str, ...]) -> dict[str, Array]:
        """Columns of block `index`, checked. The arrays are good until the next read of the same columns."""
        return {name: self._read_column(index, name) for name in names}

    def _read_column(self, index: int, name: str) -> Array:
        block, start = self.manifest.blocks[index], self._starts[name][index]
        data = self._buffer(name, self._starts[name][index + 1] - start)
        done = 0
        while done < len(data):
            if (count := os.preadv(self._files[name], [data[done:].data], start + done)) == 0:
                raise CorruptLog(f"{self.folder / name}.bin was truncated meanwhile; {REMEDY}")
            done += count
        if len(data) and freshet_table.crc32c(data) != block.crc32c.get(name):
            raise CorruptLog(f"{self.folder / name}.bin is damaged at bytes {start} to {start + len(data)}; {REMEDY}")
        column = COLUMNS[name]
        return data.view(column.dtype).reshape(column.shape(block, self.manifest))

    def _buffer(self, name: str, size: int) -> npt.NDArray[np.uint8]:
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = np.empty(size, np.uint8)
        return self._buffers[name][:size]
