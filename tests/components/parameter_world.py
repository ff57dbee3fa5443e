"""A trainer in miniature for the parameter log's tests: a dict of rows per slot, apart from the code under test."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from components.parameters.arrays import Array, Parameters
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.storage import Storage
from model.table_delta import TableDelta

Row = tuple[np.ndarray, np.ndarray, int]
WINDOW = "20220501T000000Z-20220502T000000Z"


@dataclass
class TinyTrainer:
    """Rows are exact float32 values; every change is remembered until `delta` takes it."""

    dims: dict[str, int] = field(default_factory=lambda: {"item": 3, "user": 2})
    seed: int = 0

    def __post_init__(self) -> None:
        self.steps = 0
        self.random = np.random.default_rng(self.seed)
        self.rows: dict[str, dict[int, Row]] = {slot: {} for slot in self.dims}
        self.changed: dict[str, set[int]] = {slot: set() for slot in self.dims}
        self.dense: dict[str, Array] = {"w": np.zeros((2, 2), np.float32), "steps": np.array(0, np.int64)}
        self.optimizer: dict[str, Array] = {"w.exp_avg": np.zeros((2, 2), np.float32)}

    def write(self, slot: str, key: int) -> None:
        values = self.random.standard_normal(self.dims[slot]).astype(np.float32)
        self.rows[slot][key] = (values, values[:1] * 2, int(self.random.integers(1, 1 << 50)))
        self.changed[slot].add(key)

    def erase(self, slot: str, key: int) -> None:
        if self.rows[slot].pop(key, None) is not None:
            self.changed[slot].add(key)

    def step(self) -> None:
        self.steps += 1
        self.dense = {"w": np.full((2, 2), self.steps / 7, np.float32), "steps": np.array(self.steps)}
        self.optimizer = {"w.exp_avg": self.random.standard_normal((2, 2)).astype(np.float32)}

    def everything(self, n: int) -> Parameters:
        tables = {slot: self._table(slot, sorted(rows), []) for slot, rows in self.rows.items()}
        self.changed = {slot: set() for slot in self.dims}
        return Parameters(self.dense, tables, self.optimizer, n)

    def delta(self, n: int) -> Parameters:
        tables = {}
        for slot, keys in self.changed.items():
            alive = sorted(keys & self.rows[slot].keys())
            tables[slot] = self._table(slot, alive, sorted(keys - self.rows[slot].keys()))
        self.changed = {slot: set() for slot in self.dims}
        return Parameters(self.dense, tables, self.optimizer, n)

    def _table(self, slot: str, keys: list[int], tombstones: list[int]) -> TableDelta:
        rows = [self.rows[slot][key] for key in keys]
        return TableDelta(
            keys=np.array(keys, np.int64),
            weights=np.array([row[0] for row in rows], np.float32).reshape(-1, self.dims[slot]),
            state=np.array([row[1] for row in rows], np.float32).reshape(-1, 1),
            tombstones=np.array(tombstones, np.int64),
            last_update_us=np.array([row[2] for row in rows], np.int64),
        )


def identical(one: Parameters, other: Parameters) -> bool:
    """Equal to the bit: names, dtypes, shapes and bytes."""
    return _flat(one) == _flat(other)


def _flat(parameters: Parameters) -> dict[str, tuple[str, tuple[int, ...], bytes] | None]:
    arrays: dict[str, np.ndarray | None] = {f"dense/{k}": v for k, v in parameters.dense.items()}
    arrays |= {f"optimizer/{k}": v for k, v in parameters.optimizer.items()}
    for slot, table in parameters.tables.items():
        arrays |= {f"{slot}/{k}": v for k, v in vars(table).items()}
    return {k: None if v is None else (v.dtype.str, v.shape, v.tobytes()) for k, v in arrays.items()}


def publish_delta(writer: LogWriter, trainer: TinyTrainer, n: int) -> Parameters:
    """Publish the trainer's changes as delta n; returns all that the trainer holds."""
    delta = trainer.delta(n)
    writer.publish_delta(n, delta, windows=[], event_range=(10 * n, 10 * n + 5), metrics={"auc_click": 0.5 + n / 100})
    return trainer.everything(n)


def small_log(root: str, deltas: int = 3) -> list[Parameters]:
    """A log of ranker 1 with this many deltas, and what the trainer held at each sync point."""
    trainer, writer = TinyTrainer(), LogWriter(Storage(root), "ranker", 1)
    for key in range(6):
        trainer.write("item", key)
    trainer.write("user", -7)
    held = [trainer.everything(0)]
    writer.publish_snapshot(0, held[0], config={"dim": 3}, windows=[WINDOW], event_range=(0, 9))
    for n in range(1, deltas + 1):
        trainer.write("item", n)
        trainer.write("item", 100 + n)
        trainer.write("user", 2**62 + n)
        trainer.erase("item", n - 1)
        trainer.step()
        held.append(publish_delta(writer, trainer, n))
    return held


def read_all(reader: LogReader) -> int:
    """Load every snapshot and the head with all state, which proves them; returns the head."""
    for n in reader.snapshots():
        reader.load(n, with_state=True)
    return reader.load(with_state=True).n
