"""Writing a parameter log: data files first, then the manifest, created if absent; that create is the commit."""

from __future__ import annotations

from typing import Any

from components.errors import AlreadyExists, BadInput
from components.parameters import log
from components.parameters.arrays import ParameterDelta, Parameters
from components.parameters.log import Kind, LogManifest
from components.parameters.reader import LogReader
from components.storage import Storage
from components.windows import Window

EventRange = tuple[int, int]
"""First and newest event time (us) of the events learned from."""


class LogWriter:
    """The only way into the log of one version. Any number of writers may race; one wins each n."""

    def __init__(self, storage: Storage, model: str, version: int) -> None:
        self.storage, self.model, self.version = storage, model, version
        self.reader = LogReader(storage, model, version)

    def publish_snapshot(
        self,
        n: int,
        parameters: Parameters,
        *,
        config: dict[str, Any] | None = None,
        windows: list[str] | None = None,
        event_range: EventRange | None = None,
        metrics: dict[str, float] | None = None,
        run_id: str = "",
    ) -> LogManifest:
        """Publish all parameters at sync point n: 0 from pretraining (config etc. given), later from compaction.

        A compacted snapshot takes its history from the log. AlreadyExists when snapshot n is there.
        """
        if self.storage.exists(log.manifest_path(self.model, self.version, "snapshot", n)):
            raise AlreadyExists(f"snapshot {n} of {self.model} {self.version} is published")
        if n == 0:
            history = _first(windows or [], event_range, metrics or {}, config or {}, run_id)
        else:
            history = self._history(n)
        return self._publish("snapshot", n, parameters, history)

    def publish_delta(
        self,
        n: int,
        delta: ParameterDelta,
        *,
        windows: list[str],
        event_range: EventRange | None,
        metrics: dict[str, float],
        run_id: str = "",
    ) -> LogManifest:
        """Publish what changed between n - 1 and n. event_range None: the windows held no event.

        AlreadyExists when somebody else owns n: replay the log and train again on top of it.
        BadInput when n would leave a gap.
        """
        head = self.reader.head()
        if n <= head:
            raise AlreadyExists(f"delta {n} of {self.model} {self.version} is published; head is {head}")
        if n != head + 1:
            raise BadInput(f"delta {n} would leave a gap: head of {self.model} {self.version} is {head}")
        parent = self.reader.entry(head)
        low, high = event_range or (None, None)
        history = {
            "windows": windows,
            "event_time_min_us": low,
            "event_time_max_us": high,
            "learned_until_us": log.newest([parent.manifest.learned_until_us, high]),
            "consumed_until_us": log.newest([parent.manifest.consumed_until_us, _end(windows, event_range)]),
            "metrics": metrics,
            "config": parent.manifest.config,
            "run_id": run_id,
            "parent": parent.checksum,
        }
        return self._publish("delta", n, delta, history)

    def _history(self, n: int) -> dict[str, Any]:
        entry = self.reader.entry(n)
        base = max(i for i in self.reader.snapshots() if i < n)  # it tells of all before it: a log gets long
        snapshot = self.reader.find("snapshot", base)
        if snapshot is None:
            raise AlreadyExists(
                f"snapshot {base} of {self.model} {self.version} was given up for one of another compaction"
            )
        entries = [snapshot.manifest, *(self.reader.manifest(i) for i in range(base + 1, n)), entry.manifest]
        lows = [e.event_time_min_us for e in entries if e.event_time_min_us is not None]
        return {
            "windows": [key for e in entries for key in e.windows],
            "event_time_min_us": min(lows, default=None),
            "event_time_max_us": entry.manifest.learned_until_us,
            "learned_until_us": entry.manifest.learned_until_us,
            "consumed_until_us": entry.manifest.consumed_until_us,
            "metrics": entry.manifest.metrics,
            "config": entry.manifest.config,
            "run_id": entry.manifest.run_id,
            "parent": entry.checksum,
        }

    def _publish(self, kind: Kind, n: int, parameters: Parameters, history: dict[str, Any]) -> LogManifest:
        folder = log.entry_folder(self.model, self.version, kind, n)
        files = log.write_files(self.storage, folder, parameters)
        manifest = LogManifest(
            n=n,
            kind=kind,
            model=self.model,
            version=self.version,
            rows=log.counted(parameters, lambda table: len(table.keys)),
            tombstones=log.counted(parameters, lambda table: len(table.tombstones)),
            files=files,
            **history,
        )
        try:
            self.storage.create(log.manifest_path(self.model, self.version, kind, n), manifest.encoded())
        except AlreadyExists:
            log.delete_files(self.storage, files)
            raise AlreadyExists(f"{kind} {n} of {self.model} {self.version} was published by somebody else") from None
        return manifest


def _first(
    windows: list[str], event_range: EventRange | None, metrics: dict[str, float], config: dict[str, Any], run_id: str
) -> dict[str, Any]:
    low, high = event_range or (None, None)
    return {
        "windows": windows,
        "event_time_min_us": low,
        "event_time_max_us": high,
        "learned_until_us": high,
        "consumed_until_us": None if high is None else high + 1,  # windows may reach beyond: their end is evaluation
        "metrics": metrics,
        "config": config,
        "run_id": run_id,
        "parent": None,
    }


def _end(windows: list[str], event_range: EventRange | None) -> int | None:
    ends = [Window.parse(key).end_us for key in windows]
    return log.newest([*ends, None if event_range is None else event_range[1] + 1])
