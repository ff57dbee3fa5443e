"""Manifests of data sets: what a step wrote, from what, and how much. Publishing one is the step's commit.

Data files live in a folder of their own for each attempt, and the manifest names them, so an attempt that died
leaves files that nobody reads, and two attempts at the same output never mix. The one that succeeds removes the others.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError

from components.errors import AlreadyExists, BadInput
from components.storage import Storage

NAME = "manifest.json"


class Manifest(BaseModel):
    """One published data set; paths are relative to the storage root."""

    kind: str = Field(description="interactions or sequences")
    name: str = Field(description="window key or data set id")
    windows: list[str] = Field(default=[], description="keys of the windows whose events are inside")
    inputs: list[str] = Field(default=[], description="manifests and files that were read")
    files: dict[str, list[str]] = Field(description="part (data, train, eval) -> Parquet files")
    counts: dict[str, int] = Field(default={}, description="rows, users, duplicates, quarantined by reason, ...")
    config: dict[str, Any] = Field(default={}, description="the step's config, for lineage")
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))


def new_attempt(folder: str) -> str:
    """A fresh folder for the data files of one attempt at writing `folder`."""
    return f"{folder}/attempt-{secrets.token_hex(4)}"


def publish(storage: Storage, folder: str, manifest: Manifest) -> Manifest:
    """Commit `manifest` for `folder`; when another attempt was first, its manifest is returned and stands."""
    try:
        storage.create(f"{folder}/{NAME}", manifest.model_dump_json(indent=1).encode())
    except AlreadyExists:
        published = find(storage, folder)
        if published is None:
            raise
        manifest = published
    _sweep(storage, folder, manifest)
    return manifest


def _sweep(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Delete the data of attempts that died or came second; one still at work comes too late to publish anything."""
    named = {path for paths in manifest.files.values() for path in paths}
    for path in storage.list(folder):
        if path.startswith(f"{folder}/attempt-") and path not in named:
            storage.delete(path)


def find(storage: Storage, folder: str) -> Manifest | None:
    """The published manifest of `folder`, or None while there is none."""
    path = f"{folder}/{NAME}"
    try:
        return Manifest.model_validate_json(storage.read_bytes(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise BadInput(f"{storage.url(path)} is truncated or no manifest; delete it and make its data again") from error


def require(storage: Storage, folder: str, remedy: str) -> Manifest:
    """The published manifest of `folder`; BadInput with the remedy when it is missing."""
    manifest = find(storage, folder)
    if manifest is None:
        raise BadInput(f"{storage.url(folder)} has no manifest; {remedy}")
    return manifest


def read_part(storage: Storage, manifest: Manifest, part: str) -> pa.Table:
    """All rows of one part of a data set; BadInput when the part does not exist."""
    if part not in manifest.files:
        raise BadInput(f"{manifest.kind} {manifest.name} has no part {part!r}, only {', '.join(manifest.files)}")
    return pa.concat_tables([storage.read_table(path) for path in manifest.files[part]])
