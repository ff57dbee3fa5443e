"""Begin the parameter log of a registered version: its checkpoint becomes snapshot 0, and servers can load it.

The checkpoint's metrics go into the snapshot's manifest, where the rollout's gate reads them. Publishing again changes
nothing.

example:
  python -m components.publish --model ranker --version 3
"""

from __future__ import annotations

from contextlib import suppress

from pydantic import BaseModel, Field

from components.errors import AlreadyExists, BadInput
from components.parameters.checkpoint import load_checkpoint, require_checkpoint
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.publish.config import PublishConfig
from components.storage import Storage


class PublishResult(BaseModel):
    """Snapshot 0."""

    model: str
    version: int
    n: int = Field(description="sync point: 0")
    rows: dict[str, int] = Field(description="embedding rows, by slot")
    metrics: dict[str, float] = Field(description="of the checkpoint, on its dataset's eval part")


def run(config: PublishConfig) -> PublishResult:
    """Publish, or return what is published."""
    from components.registry import Registry

    storage = Storage(config.root)
    version = Registry(config.tracking_uri).version(config.model, config.version)
    checkpoint = require_checkpoint(storage, version.checkpoint)
    reader = LogReader(storage, config.model, config.version)
    if reader.find("snapshot", 0) is None:
        with suppress(AlreadyExists):  # somebody else published the same checkpoint meanwhile
            LogWriter(storage, config.model, config.version).publish_snapshot(
                0,
                load_checkpoint(storage, checkpoint),
                config=checkpoint.config,
                windows=checkpoint.windows,
                event_range=checkpoint.event_range,
                metrics=checkpoint.metrics,
                run_id=checkpoint.run_id,
            )
    manifest = reader.manifest(0)
    if manifest.run_id != checkpoint.run_id:
        raise BadInput(
            f"{storage.url(reader.folder)} holds the log of another run ({manifest.run_id}): the registry does not "
            "belong to this storage root; use the MLflow server that does, or another root"
        )
    return PublishResult(**manifest.model_dump(include=set(PublishResult.model_fields)))
