"""Compaction folds deltas into a new snapshot; retention then gives up what nobody needs to replay.

Kept for ever: snapshot 0 (the frozen model that continual training is compared with) and every delta's manifest
(its metrics and windows, and the proof that its number is taken).
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress

from components.errors import AlreadyExists
from components.parameters import log
from components.parameters.arrays import FILES
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.storage import Storage


def compact(storage: Storage, model: str, version: int) -> int:
    """Publish a snapshot of head, read back and proven; returns its n. Does nothing when head has one already."""
    reader = LogReader(storage, model, version)
    parameters = reader.load(with_state=True)
    if parameters.n not in reader.snapshots():
        with suppress(AlreadyExists):  # another compactor folded the same deltas into the same bits
            LogWriter(storage, model, version).publish_snapshot(parameters.n, parameters)
    reader.load(parameters.n, with_state=True)
    return parameters.n


def retain(storage: Storage, model: str, version: int, keep: int) -> list[str]:
    """Delete what is not needed to restore head and the `keep` sync points before it; returns the deleted paths.

    Deltas go only when a snapshot at or after them is published, proven and stays. A second call deletes nothing.
    """
    reader = LogReader(storage, model, version)
    base = max((n for n in reader.snapshots() if n <= reader.head() - keep), default=0)
    doomed = list(dict.fromkeys(_folded(reader, base) + _dead_attempts(reader)))
    if doomed:
        reader.load(base, with_state=True)
    for path in doomed:
        storage.delete(path)
    return doomed


def _folded(reader: LogReader, base: int) -> list[str]:
    """What the snapshot at `base` replaces: older snapshots (never 0) and the data files of deltas up to it."""
    found = []
    for path in reader.storage.list(reader.folder):
        kind, _, number = path[len(reader.folder) + 1 :].partition("/")[0].rpartition("-")
        n = int(number) if number.isdigit() else 0
        is_manifest = path.endswith(log.MANIFEST)
        if (kind == "snapshot" and 0 < n < base) or (kind == "delta" and 0 < n <= base and not is_manifest):
            found.append((not is_manifest, n, path))
    return [path for _, _, path in sorted(found)]  # manifests first: a reader never trusts half a snapshot


def _dead_attempts(reader: LogReader) -> list[str]:
    """Data files beside a published manifest that does not name them: of writers that died or lost the race."""
    dead, folders = list[str](), defaultdict[str, list[str]](list)
    for path in reader.storage.list(reader.folder):  # once: on S3 a listing of each folder is a request for each delta
        folders[path.rpartition("/")[0]].append(path)
    for kind, numbers in reader.points().items():
        for n in numbers:
            paths = folders[log.entry_folder(reader.model, reader.version, kind, n)]
            entry = reader.find(kind, n) if len(paths) > 1 + len(FILES) else None
            if entry is not None:
                named = {file.path for file in entry.manifest.files.values()}
                dead += [path for path in paths if path not in named and not path.endswith(log.MANIFEST)]
    return dead
