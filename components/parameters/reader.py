"""Reading a parameter log: all of it proven, or an error; never a part."""

from __future__ import annotations

from dataclasses import dataclass

from components.errors import BadInput, CorruptLog
from components.parameters import arrays, log
from components.parameters.arrays import ParameterDelta, Parameters
from components.parameters.log import Kind, LogManifest
from components.storage import Storage

Points = dict[Kind, list[int]]
"""The numbers of the published entries of each kind, ascending."""


@dataclass(frozen=True)
class Entry:
    """A manifest as found, and the checksum that the next one must name as its parent."""

    manifest: LogManifest
    checksum: str  # sha256 of the manifest's bytes


class LogReader:
    """The log of one version. Holds no state: every call looks at the storage."""

    def __init__(self, storage: Storage, model: str, version: int) -> None:
        self.storage, self.model, self.version = storage, model, version
        self.folder = log.log_folder(model, version)

    def head(self) -> int:
        """The newest committed sync point; -1 when nothing is published."""
        return _head(self.points())

    def snapshots(self) -> list[int]:
        """The sync points that have a snapshot, ascending."""
        return self.points()["snapshot"]

    def manifest(self, n: int) -> LogManifest:
        """The manifest of sync point n: of delta n, or of the snapshot when n has none (n = 0).

        BadInput when n was never published; CorruptLog when it is damaged.
        """
        return self.entry(n).manifest

    def delta(self, n: int, with_state: bool = False) -> ParameterDelta:
        """Delta n, proven to follow n - 1. CorruptLog on a gap, a changed file or a broken chain."""
        entry = self.find("delta", n)
        if entry is None:
            raise CorruptLog(f"{self._url('delta', n)} is missing: a gap in the log; load the newest snapshot instead")
        self._prove_chain(entry.manifest, self._checksum(n - 1))
        return self._read(entry.manifest, with_state)

    def load(self, as_of: int | None = None, with_state: bool = False) -> Parameters:
        """All parameters after sync point as_of (None: the newest), from the newest snapshot and the deltas after it.

        with_state also reads the optimiser state, which only a trainer needs.
        BadInput when as_of does not exist or was given up by retention; CorruptLog when anything is damaged.
        """
        points = self.points()  # one listing: a log gets long
        while True:
            target = self._target(as_of, points)
            base = self._base(target, points)
            try:
                return self._replay(base, target, points, with_state)
            except CorruptLog:
                points = self.points()
                if self._base(self._target(as_of, points), points) == base:
                    raise  # otherwise compaction moved the ground while we read: plan again

    def _target(self, as_of: int | None, points: Points) -> int:
        head = _head(points)
        if head < 0:
            raise BadInput(
                f"{self.storage.url(self.folder)} holds no parameters; run python -m components.publish "
                f"--model={self.model} --version={self.version}"
            )
        if as_of is not None and not 0 <= as_of <= head:
            raise BadInput(f"{self.model} {self.version} has no sync point {as_of}; choose one from 0 to {head}")
        return head if as_of is None else as_of

    def _base(self, target: int, points: Points) -> int:
        usable = [n for n in points["snapshot"] if n <= target]
        if not usable:
            raise CorruptLog(f"{self._url('snapshot', 0)} is missing: nothing to replay deltas on; {log.RESYNC}")
        return usable[-1]

    def _replay(self, base: int, target: int, points: Points, with_state: bool) -> Parameters:
        self._refuse_retired(base, target, points["snapshot"])
        parts, checksum = [self._snapshot(base, with_state)], self._checksum(base)
        for n in range(base + 1, target + 1):
            entry = self.find("delta", n)
            if entry is None:
                raise CorruptLog(f"{self._url('delta', n)} is missing: a gap in the log; {log.RESYNC}")
            self._prove_chain(entry.manifest, checksum)
            parts.append(self._read(entry.manifest, with_state))
            checksum = entry.checksum
            if problem := arrays.difference(parts[0], parts[-1]):
                raise CorruptLog(f"{self._url('delta', n)} does not fit snapshot {base}: {problem}; {log.RESYNC}")
        return arrays.fold(parts)

    def _refuse_retired(self, base: int, target: int, snapshots: list[int]) -> None:
        """Deltas folded into a later snapshot may have lost their data files to retention, their manifests never."""
        later = [n for n in snapshots if n > target]
        if base == target or not later:
            return
        entry = self.find("delta", base + 1)
        if entry is not None and not any(self.storage.exists(file.path) for file in entry.manifest.files.values()):
            raise BadInput(
                f"sync point {target} of {self.model} {self.version} was given up by retention; "
                f"restorable are {', '.join(map(str, snapshots))} and everything after {later[0]}"
            )

    def _snapshot(self, n: int, with_state: bool) -> Parameters:
        entry = self.find("snapshot", n)
        if entry is None:
            raise CorruptLog(f"{self._url('snapshot', n)} is missing; {log.RESYNC}")
        if n > 0:
            self._prove_chain(entry.manifest, self._checksum(n))
        return self._read(entry.manifest, with_state)

    def _read(self, manifest: LogManifest, with_state: bool) -> Parameters:
        parameters = log.read_files(self.storage, manifest.files, manifest.n, with_state)
        if log.counted(parameters, lambda table: len(table.keys)) != manifest.rows:
            raise CorruptLog(f"{self._url(manifest.kind, manifest.n)} counts other rows than its files; {log.RESYNC}")
        return parameters

    def entry(self, n: int) -> Entry:
        """The entry that owns sync point n; errors as of `manifest`."""
        entry = self.find("delta", n) if n > 0 else self.find("snapshot", 0)
        if entry is None:
            head = self.head()
            if 0 <= n <= head:
                raise CorruptLog(f"sync point {n} has no manifest although {head} is published: a gap; {log.RESYNC}")
            raise BadInput(f"{self.model} {self.version} has no sync point {n}; the newest is {head}")
        return entry

    def _checksum(self, n: int) -> str:
        return self.entry(n).checksum

    def find(self, kind: Kind, n: int) -> Entry | None:
        """One entry, or None while it is not published; CorruptLog when it is damaged or of another log."""
        path = log.manifest_path(self.model, self.version, kind, n)
        try:
            data = self.storage.read_bytes(path)
        except FileNotFoundError:
            return None
        manifest = log.parse_manifest(self.storage.url(path), data, self.model, self.version, kind, n)
        return Entry(manifest, log.digest(data))

    def _prove_chain(self, manifest: LogManifest, checksum: str) -> None:
        if manifest.parent != checksum:
            raise CorruptLog(
                f"{self._url(manifest.kind, manifest.n)} does not follow the manifest before it: "
                f"one of the two was changed after it was published; {log.RESYNC}"
            )

    def points(self) -> Points:
        """What is published, from one listing."""
        found: Points = {"snapshot": [], "delta": []}
        for path in self.storage.list(self.folder):
            folder, _, name = path[len(self.folder) + 1 :].partition("/")
            for kind, numbers in found.items():
                number = folder.removeprefix(f"{kind}-")
                if name == log.MANIFEST and number.isdigit():
                    numbers.append(int(number))
        return {kind: sorted(numbers) for kind, numbers in found.items()}

    def _url(self, kind: Kind, n: int) -> str:
        return self.storage.url(log.manifest_path(self.model, self.version, kind, n))


def _head(points: Points) -> int:
    return max((n for numbers in points.values() for n in numbers), default=-1)
