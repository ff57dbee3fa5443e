"""The form of the parameter log: folders, manifests, and data files whose bytes are proven on every read.

    parameters/<model>/<version>/snapshot-<n>/manifest.json      all parameters after sync point n
    parameters/<model>/<version>/delta-<n>/manifest.json         what changed between n - 1 and n

A manifest is created if absent, and that is the commit: nobody else can own n afterwards, and a reader believes
manifests only. The files that it names carry the prefix of the attempt that wrote them.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.errors import BadInput, CorruptLog
from components.parameters import arrays
from components.parameters.arrays import Array, Files, Parameters
from components.storage import Storage
from model.table_delta import TableDelta

MODELS = ("ranker", "retriever")
MANIFEST = "manifest.json"
Kind = Literal["snapshot", "delta"]
RESYNC = "restore the file from a backup, or load an earlier point with as_of, or train a new version"


class LogFile(BaseModel):
    """One data file, relative to the storage root."""

    model_config = ConfigDict(frozen=True)

    path: str
    size: int = Field(description="bytes")
    sha256: str = Field(description="hex digest of the content")


class LogManifest(BaseModel):
    """One entry of a parameter log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(ge=0, description="sync point: parameters after n deltas")
    kind: Kind
    model: str
    version: int
    windows: list[str] = Field(description="delta: windows consumed; snapshot: all windows consumed up to n")
    event_time_min_us: int | None = Field(
        default=None, description="first event learned from in this entry; None = no event"
    )
    event_time_max_us: int | None = Field(default=None, description="newest event learned from in this entry")
    learned_until_us: int | None = Field(default=None, description="newest event that the parameters at n learned from")
    consumed_until_us: int | None = Field(
        default=None, description="end of the newest window consumed: the next starts here"
    )
    rows: dict[str, int] = Field(description="rows written, by slot")
    tombstones: dict[str, int] = Field(description="keys erased, by slot")
    files: dict[str, LogFile] = Field(description="tables, state, dense")
    metrics: dict[str, float] = Field(default={}, description="prequential metrics, before training on the windows")
    config: dict[str, Any] = Field(default={}, description="the model's config")
    run_id: str = Field(default="", description="MLflow run that made it")
    parent: str | None = Field(
        description="sha256 of the manifest before: of n - 1; for a compacted snapshot of delta n"
    )
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))

    def encoded(self) -> bytes:
        return self.model_dump_json(indent=1).encode()


def log_folder(model: str, version: int) -> str:
    if model not in MODELS:
        raise BadInput(f"unknown model {model!r}; models are {' and '.join(MODELS)}")
    return f"parameters/{model}/{version}"


def entry_folder(model: str, version: int, kind: Kind, n: int) -> str:
    return f"{log_folder(model, version)}/{kind}-{n}"


def manifest_path(model: str, version: int, kind: Kind, n: int) -> str:
    return f"{entry_folder(model, version, kind, n)}/{MANIFEST}"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_files(storage: Storage, folder: str, parameters: Parameters) -> dict[str, LogFile]:
    """Write the three data files under a fresh attempt prefix; BadInput when the arrays do not fit together."""
    stateless = [
        slot for slot, table in parameters.tables.items() if table.state is None or table.last_update_us is None
    ]
    if problem := f"no optimiser state of {', '.join(stateless)}" if stateless else arrays.defect(parameters):
        raise BadInput(f"parameters cannot be published: {problem}; export them from the model's tables again")
    attempt = secrets.token_hex(4)
    files = {}
    for name, content in arrays.to_files(parameters).items():
        files[name] = write_file(storage, f"{folder}/{attempt}-{name}.safetensors", content)
    return files


def write_file(storage: Storage, path: str, content: Mapping[str, Array]) -> LogFile:
    """Write arrays as one safetensors file, to be proven when it is read."""
    data = arrays.encode(content)
    storage.write_bytes(path, data)
    return LogFile(path=path, size=len(data), sha256=digest(data))


def delete_files(storage: Storage, files: Mapping[str, LogFile]) -> None:
    for file in files.values():
        storage.delete(file.path)


def read_files(storage: Storage, files: Mapping[str, LogFile], n: int, with_state: bool) -> Parameters:
    """Read and prove the data files of one entry; CorruptLog names the file that is missing or changed."""
    wanted = arrays.FILES if with_state else ("tables", "dense")
    if missing := set(wanted) - files.keys():
        raise CorruptLog(f"entry {n} names no {', '.join(sorted(missing))} file; {RESYNC}")
    content: Files = {name: read_file(storage, files[name]) for name in wanted}
    try:
        parameters = arrays.from_files(content, n)
    except KeyError as error:
        raise CorruptLog(f"{storage.url(files['tables'].path)} lacks the array {error}; {RESYNC}") from error
    if problem := arrays.defect(parameters):
        raise CorruptLog(f"{storage.url(files['tables'].path)}: {problem}; {RESYNC}")
    return parameters


def read_file(storage: Storage, file: LogFile, remedy: str = RESYNC) -> dict[str, Array]:
    """The arrays of one file, proven; CorruptLog says what is wrong with it and the remedy."""
    url = storage.url(file.path)
    try:
        data = storage.read_bytes(file.path)
    except FileNotFoundError as error:
        raise CorruptLog(f"{url} is missing; {remedy}") from error
    if len(data) != file.size:
        raise CorruptLog(f"{url} has {len(data)} bytes instead of {file.size}: it is truncated; {remedy}")
    if digest(data) != file.sha256:
        raise CorruptLog(f"{url} does not have the checksum in its manifest; {remedy}")
    try:
        return arrays.decode(data)
    except ValueError as error:
        raise CorruptLog(f"{url} is no safetensors file ({error}); {remedy}") from error


def parse_manifest(url: str, data: bytes, model: str, version: int, kind: Kind, n: int) -> LogManifest:
    """A manifest that is what its path says; CorruptLog otherwise."""
    try:
        manifest = LogManifest.model_validate_json(data)
    except ValidationError as error:
        raise CorruptLog(f"{url} is truncated or no manifest ({error.error_count()} errors); {RESYNC}") from error
    found = manifest.model, manifest.version, manifest.kind, manifest.n
    if found != (model, version, kind, n):
        raise CorruptLog(f"{url} belongs to {'/'.join(map(str, found))}: a file was copied between logs; {RESYNC}")
    return manifest


def counted(parameters: Parameters, count: Callable[[TableDelta], int]) -> dict[str, int]:
    return {slot: count(table) for slot, table in sorted(parameters.tables.items())}


def newest(values: Iterable[int | None]) -> int | None:
    """The largest of the known values."""
    return max((value for value in values if value is not None), default=None)
