"""One version in memory, following its parameter log: newest snapshot, then every delta in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from components.errors import BadInput, CorruptLog, FreshetError
from components.parameters.arrays import Parameters
from components.parameters.bridge import build_model
from components.parameters.log import LogManifest
from components.parameters.reader import LogReader
from components.serve.locks import ReadWriteLock
from components.serve.metrics import Metrics
from components.storage import Storage
from model.catalogue import Int64s, ItemCatalogue
from model.ranker import Ranker
from model.retriever import Retriever
from model.serving_table import ServingTable, serving_copy

Model = Ranker | Retriever
RETRY_S = 5.0
"""Seconds between attempts to read a damaged log again."""
FP16_MAX = 65504.0
LARGEST_WEIGHT = 1e15
"""Rows are refused above this: sums of larger weights overflow in the layer norms. That candidate would score NaN, and,
since attention multiplies what a row does not see by zero, so would the candidates beside it."""
LISTING_S = 30.0
"""Seconds between searches for gaps in a log."""
log = logging.getLogger("freshet.serve.sync")


@dataclass
class Served:
    """A model, its tables by slot, and the sync point they stand at; all change under the write lock only."""

    model: Model
    tables: dict[str, ServingTable]
    n: int
    learned_until_us: int | None
    lock: ReadWriteLock = field(default_factory=ReadWriteLock)
    vectors: tuple[Int64s, torch.Tensor] | None = None  # of items that requests chose from, since anything changed

    def rows(self) -> int:
        """Rows in all embedding tables."""
        return sum(len(table) for table in self.tables.values())

    def item_vectors(self, ids: Int64s) -> torch.Tensor:
        """`Retriever.item_vectors` of distinct ascending ids, kept for the requests that follow; while reading only."""
        assert isinstance(self.model, Retriever)
        known, vectors = self.vectors or (ids[:0], torch.empty(0))
        if not np.array_equal(known, ids) and not np.isin(ids, known, assume_unique=True).all():
            known = np.union1d(known, ids)  # of all, so that requests which exclude some need no others
            vectors = self.model.item_vectors(known)
            self.vectors = known, vectors
        return vectors if len(known) == len(ids) else vectors[torch.from_numpy(np.searchsorted(known, ids))]


class LoadedVersion:
    """A version that serves. `sync` is called by one thread; requests read concurrently."""

    def __init__(
        self,
        storage: Storage,
        name: str,
        version: int,
        catalogue: ItemCatalogue,
        metrics: Metrics,
        precision: str = "fp32",
    ) -> None:
        """Load the version at head, or, when its log is damaged, at the newest point that can be proven.

        Raises BadInput when nothing is published, CorruptLog when nothing can be proven.
        """
        self.name, self.version = name, version
        self.error: str | None = None
        self._reader = LogReader(storage, name, version)
        self._catalogue = catalogue
        self._metrics = metrics
        self._precision = precision
        self._retry_at = self._next_listing = 0.0
        self._served = self._load_what_is_sound()
        metrics.log_corrupt.labels(name, version).set(self.error is not None)

    @property
    def n(self) -> int:
        """The sync point being served."""
        return self._served.n

    @property
    def learned_until_us(self) -> int | None:
        """Newest event that the served parameters learned from."""
        return self._served.learned_until_us

    def rows(self) -> int:
        """Rows in all embedding tables."""
        return self._served.rows()

    def unknown_items(self) -> float | None:
        """Share of the items looked up since this was loaded that have no row of their own; None before the first."""
        counts = [table.stats() for slot, table in self._served.tables.items() if slot.startswith("item")]
        looked_up = sum(count["looked_up"] for count in counts)
        return sum(count["missed"] for count in counts) / looked_up if looked_up else None

    def reach(self) -> int:
        """How many of a user's newest events can influence a score."""
        config = self._served.model.config
        return config.window * config.layers

    def label(self) -> str:
        return f"{self.name} {self.version}"

    @contextmanager
    def reading(self) -> Iterator[Served]:
        """The model and its sync point, held still: no delta is applied meanwhile."""
        served = self._served
        with served.lock.read():
            yield served

    def set_catalogue(self, catalogue: ItemCatalogue) -> None:
        """Use new side features of items."""
        self._catalogue = catalogue
        with self._served.lock.write():
            self._served.model.catalogue = catalogue
            self._served.vectors = None

    def sync(self) -> int:
        """Apply what was published since; returns how many sync points went live.

        A damaged log changes nothing that serves: the error is kept in `error`, and the whole log is read again, now
        and every RETRY_S, until a reload succeeds.
        """
        if self.error is None:
            try:
                return self._advance()
            except FreshetError as error:
                self._damaged(error)
                self._retry_at = 0.0
        if time.monotonic() < self._retry_at:
            return 0
        try:
            return self._resync()
        except FreshetError as error:  # BadInput: the log has been deleted
            self._damaged(error)
            return 0

    def _advance(self) -> int:
        applied = 0
        while True:
            n = self._served.n + 1
            entry = self._reader.find("delta", n)
            if entry is None:
                self._look_for_gap(n)
                return applied
            self._apply(self._reader.delta(n), entry.manifest)
            applied += 1

    def _look_for_gap(self, n: int) -> None:
        """Listing a long log takes time, so this is done now and then."""
        if time.monotonic() < self._next_listing:
            return
        self._next_listing = time.monotonic() + LISTING_S
        if self._reader.head() >= n and self._reader.find("delta", n) is None:
            raise CorruptLog(f"delta {n} of {self.label()} is missing although later points are published: a gap")

    def _resync(self) -> int:
        before = self._served.n
        self._served = self._load(None)  # requests that are under way finish on the old one
        self.error = None
        self._metrics.resyncs.labels(self.name).inc()
        self._metrics.log_corrupt.labels(self.name, self.version).set(0)
        log.warning("%s: the log is sound again; reloaded from %d to %d", self.label(), before, self._served.n)
        return max(self._served.n - before, 0)

    def _damaged(self, error: FreshetError) -> None:
        if str(error) != self.error:
            log.error("%s stays where it is: %s", self.label(), error)
        self.error = str(error)
        self._retry_at = time.monotonic() + RETRY_S
        self._metrics.sync_errors.inc()
        self._metrics.log_corrupt.labels(self.name, self.version).set(1)

    def _load_what_is_sound(self) -> Served:
        try:
            return self._load(None)
        except CorruptLog as error:
            self._damaged(error)
            damage = error
        for base in reversed(self._reader.snapshots()):
            try:
                self._served = self._load(base)
            except CorruptLog:
                continue
            try:
                self._advance()
            except CorruptLog:
                log.error("%s serves sync point %d, the last sound one", self.label(), self._served.n)
            return self._served
        raise damage

    def _load(self, as_of: int | None) -> Served:
        parameters = self._reader.load(as_of)
        manifest = self._reader.manifest(parameters.n)
        model = _build(self.name, manifest, self._catalogue)
        tables = serving_copy(model, self._precision, fill=False)
        served = Served(model, tables, parameters.n, manifest.learned_until_us)
        _prove(served, parameters, self.label())
        _write(served, parameters)
        return served

    def _apply(self, delta: Parameters, manifest: LogManifest) -> None:
        served = self._served
        _prove(served, delta, self.label())
        started = time.perf_counter()
        with served.lock.write():
            _write(served, delta)
            served.n = manifest.n
            served.learned_until_us = manifest.learned_until_us
        seconds = time.perf_counter() - started
        self._metrics.apply.labels(self.name).observe(seconds)
        log.info("%s: delta %d live after %.1f ms, %s", self.label(), manifest.n, 1e3 * seconds, manifest.rows)


def weight_vector(heads: Sequence[str], weights: dict[str, float], label: str) -> NDArray[np.float64]:
    """The weight of each head of a ranker; heads without a weight count nothing. BadInput when none has one."""
    vector = np.array([weights.get(head, 0.0) for head in heads])
    if not vector.any():
        raise BadInput(
            f"score_weights name none of the heads of {label} ({', '.join(heads)}); "
            f"start the server with --score-weights={heads[0]}=1"
        )
    return vector


def _build(name: str, manifest: LogManifest, catalogue: ItemCatalogue) -> Model:
    model = build_model(name, manifest.config, catalogue)
    assert isinstance(model, Ranker | Retriever)
    model.eval()
    return model


def _prove(served: Served, parameters: Parameters, label: str) -> None:
    """Everything that could fail is checked before the first row is written, so that an apply is all or nothing."""
    problem = _misfit(served, parameters)
    if problem:
        raise CorruptLog(f"point {parameters.n} of {label} does not fit the model: {problem}; train a new version")


def _misfit(served: Served, parameters: Parameters) -> str | None:
    tables = served.tables
    if tables.keys() != parameters.tables.keys():
        return f"slots {sorted(parameters.tables)} instead of {sorted(tables)}"
    for slot, rows in parameters.tables.items():
        if rows.weights.shape[1:] != (tables[slot].dim,):
            return f"rows of slot {slot} are {rows.weights.shape[1]} wide instead of {tables[slot].dim}"
        if not (np.abs(rows.weights) <= LARGEST_WEIGHT).all():
            return f"slot {slot} has weights that are not finite or above {LARGEST_WEIGHT:g}: scores would overflow"
        if tables[slot].precision == "fp16" and np.abs(rows.weights).max(initial=0) > FP16_MAX:
            return f"slot {slot} has weights above {FP16_MAX}, too large for --table-precision=fp16"
    expected = {name: tuple(value.shape) for name, value in served.model.state_dict().items()}
    found = {name: value.shape for name, value in parameters.dense.items()}
    if expected != found:
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        return f"dense parameters differ in name or shape: {', '.join(wrong)}"
    return None


def _write(served: Served, parameters: Parameters) -> None:
    dense = {name: torch.from_numpy(np.array(value)) for name, value in parameters.dense.items()}
    served.model.load_state_dict(dense, strict=True)
    for slot, rows in parameters.tables.items():
        served.tables[slot].update(rows.keys, rows.weights, rows.tombstones)
    served.vectors = None
