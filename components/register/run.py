"""Register a checkpoint as a version of its model in MLflow, with its lineage as tags.

Tags: dataset, windows, digest of the settings, parent version (the champion of now), git commit, Airflow DAG run. A
checkpoint that is registered already keeps its version.

example:
  python -m components.register --model ranker --checkpoint checkpoints/ranker/0123456789ab
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from components.errors import BadInput
from components.parameters.checkpoint import require_checkpoint
from components.register.config import RegisterConfig
from components.storage import Storage


class RegisterResult(BaseModel):
    """The version."""

    model: str
    version: int
    checkpoint: str
    run_id: str = Field(description="MLflow run that trained it")
    parent_version: int | None = Field(description="champion when it was registered")


def run(config: RegisterConfig) -> RegisterResult:
    """Register, or return the version that the checkpoint is already."""
    from components.registry import CHAMPION, Registry

    storage = Storage(config.root)
    if not config.checkpoint:
        raise BadInput("no checkpoint given; pass --checkpoint with the folder that pretrain printed")
    checkpoint = require_checkpoint(storage, config.checkpoint)
    if checkpoint.model != config.model:
        raise BadInput(f"{config.checkpoint} is a {checkpoint.model}, not a {config.model}; set --model")
    registry = Registry(config.tracking_uri)
    parent = registry.alias(config.model, CHAMPION)
    version = registry.register(checkpoint, storage.url(config.checkpoint), config.checkpoint, parent)
    return RegisterResult(**version.model_dump(include=set(RegisterResult.model_fields)))
