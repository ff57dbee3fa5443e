"""Fold the deltas of a parameter log into a new snapshot, and delete what is no longer needed to restore.

The snapshot is read back and proven before anything is deleted. Snapshot 0 and the manifests of all deltas stay for
ever. Killed at any moment and run again, it ends in the same state; run once more, it changes nothing.

example:
  python -m components.compact --model ranker --version 3 --min-deltas 24 --keep-deltas 168
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from components.compact.config import CompactConfig
from components.errors import BadInput
from components.parameters.compaction import compact, retain
from components.parameters.reader import LogReader
from components.storage import Storage


class CompactResult(BaseModel):
    """The log afterwards."""

    model: str
    version: int
    head: int = Field(description="newest sync point")
    snapshots: list[int] = Field(description="sync points with a snapshot")
    deleted: int = Field(description="files deleted")


def run(config: CompactConfig) -> CompactResult:
    """Fold and retain."""
    from components.registry import Registry

    version = config.version or Registry(config.tracking_uri).resolve(config.model, None)
    storage = Storage(config.root)
    reader = LogReader(storage, config.model, version)
    head, snapshots = reader.head(), reader.snapshots()
    if not snapshots:
        raise BadInput(f"{storage.url(reader.folder)} holds no snapshot; publish the version first")
    if head - snapshots[-1] >= config.min_deltas:
        compact(storage, config.model, version)
    deleted = retain(storage, config.model, version, config.keep_deltas)
    return CompactResult(
        model=config.model, version=version, head=reader.head(), snapshots=reader.snapshots(), deleted=len(deleted)
    )
