"""A checkpoint: what pretraining leaves, in the form of a parameter log's snapshot, with its lineage."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.errors import AlreadyExists, BadInput, CorruptLog
from components.parameters import log
from components.parameters.arrays import Parameters
from components.parameters.log import MANIFEST, LogFile
from components.storage import Storage


class Checkpoint(BaseModel):
    """The manifest of a checkpoint folder, written last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    digest: str = Field(description="of the pretrain config that made it")
    dataset: str = Field(description="sequence dataset it was trained on")
    windows: list[str] = Field(description="windows of that dataset")
    event_time_min_us: int | None = Field(description="first event learned from")
    event_time_max_us: int | None = Field(description="newest event learned from")
    run_id: str = Field(description="MLflow run that made it")
    metrics: dict[str, float] = Field(description="on the dataset's eval part, before learning from it")
    config: dict[str, Any] = Field(description="the model's config")
    rows: dict[str, int] = Field(description="rows, by slot")
    files: dict[str, LogFile] = Field(description="tables, state, dense")
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))

    @property
    def event_range(self) -> tuple[int, int] | None:
        if self.event_time_min_us is None or self.event_time_max_us is None:
            return None
        return self.event_time_min_us, self.event_time_max_us


def checkpoint_folder(model: str, digest: str) -> str:
    return f"checkpoints/{model}/{digest}"


def find_checkpoint(storage: Storage, folder: str) -> Checkpoint | None:
    """The finished checkpoint in `folder`, or None while there is none; CorruptLog when its manifest is damaged."""
    path = f"{folder}/{MANIFEST}"
    if not storage.exists(path):
        return None
    try:
        return Checkpoint.model_validate_json(storage.read_bytes(path))
    except ValidationError as error:
        raise CorruptLog(
            f"{storage.url(path)} is truncated or no checkpoint manifest; delete it, pretrain again"
        ) from error


def require_checkpoint(storage: Storage, folder: str) -> Checkpoint:
    """The finished checkpoint in `folder`; BadInput when there is none."""
    checkpoint = find_checkpoint(storage, folder)
    if checkpoint is None:
        raise BadInput(f"{storage.url(folder)} holds no finished checkpoint; run python -m components.pretrain first")
    return checkpoint


def save_checkpoint(storage: Storage, folder: str, parameters: Parameters, **lineage: Any) -> Checkpoint:
    """Write the files, then the manifest. When another attempt was first, its checkpoint is returned and stands."""
    files = log.write_files(storage, folder, parameters)
    rows = log.counted(parameters, lambda table: len(table.keys))
    checkpoint = Checkpoint(files=files, rows=rows, **lineage)
    try:
        storage.create(f"{folder}/{MANIFEST}", checkpoint.model_dump_json(indent=1).encode())
    except AlreadyExists:
        log.delete_files(storage, files)
        return require_checkpoint(storage, folder)
    return checkpoint


def load_checkpoint(storage: Storage, checkpoint: Checkpoint, with_state: bool = True) -> Parameters:
    """The proven parameters of a checkpoint; CorruptLog when a file is damaged."""
    return log.read_files(storage, checkpoint.files, 0, with_state)
