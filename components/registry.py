"""The registry: MLflow versions of `ranker` and `retriever`, their aliases and their lineage.

An alias is a pointer without history; who moved it and why stands in the rollout record. Checkpoints stay where they
are: a version only refers to one.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from pydantic import BaseModel, ConfigDict, Field

from components.errors import BadInput, FreshetError
from components.parameters.checkpoint import Checkpoint

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
TAG = "freshet."
_MANY = 1000


class Version(BaseModel):
    """One registered version, as the registry knows it."""

    model_config = ConfigDict(frozen=True)

    model: str
    version: int
    run_id: str = Field(description="MLflow run that trained it")
    checkpoint: str = Field(description="folder of its checkpoint, relative to the storage root")
    parent_version: int | None = Field(default=None, description="version whose parameters it started from")


class Registry:
    """Versions, aliases and lineage on one MLflow server."""

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        self.client = connect(tracking_uri)

    def register(self, checkpoint: Checkpoint, url: str, path: str, parent_version: int | None = None) -> Version:
        """Register a checkpoint as a version; again for the same checkpoint: the version that it is already.

        url: where the checkpoint is; path: the same, relative to the storage root. An MLflow server refuses local
        paths outside its own artifact folder, so for local storage the version's source is freshet:///<path>.
        """
        if (known := self.find(checkpoint.model, checkpoint.run_id, path)) is not None:
            return known
        self._ensure_model(checkpoint.model)
        tags = {
            "checkpoint": path,
            "checkpoint_url": url,
            "dataset": checkpoint.dataset,
            "windows": json.dumps(checkpoint.windows),
            "config_digest": checkpoint.digest,
            "parent_version": "" if parent_version is None else str(parent_version),
            **origin_tags(),
        }
        created = self.client.create_model_version(
            name=checkpoint.model,
            source=f"freshet:///{path}" if url.startswith("file://") else url,
            run_id=checkpoint.run_id,
            tags={TAG + name: value for name, value in tags.items()},
            description=f"Pretrained on {checkpoint.dataset}",
        )
        # a request whose answer was lost is sent again, and two tasks may be at it: all of them take the oldest
        return self.find(checkpoint.model, checkpoint.run_id, path) or _version(created)

    def find(self, model: str, run_id: str, path: str) -> Version | None:
        """The version registered from this run's checkpoint, the oldest if there are several."""
        found = [v for v in self._search(model, f"run_id = '{run_id}'") if v.checkpoint == path]
        return min(found, key=lambda v: v.version, default=None)

    def version(self, model: str, version: int) -> Version:
        """One version; BadInput when the registry does not have it."""
        from mlflow.exceptions import MlflowException

        try:
            return _version(self.client.get_model_version(model, str(version)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            known = ", ".join(str(v.version) for v in self.versions(model)) or "none"
            raise BadInput(f"the registry has no version {version} of {model}; it has: {known}") from error

    def versions(self, model: str) -> list[Version]:
        """All versions, ascending."""
        return sorted(self._search(model), key=lambda v: v.version)

    def alias(self, model: str, alias: str) -> int | None:
        """The version that an alias points to, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return int(self.client.get_model_version_by_alias(model, alias).version)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None

    def set_alias(self, model: str, alias: str, version: int) -> None:
        """Point an alias at a version; doing it twice is fine. BadInput for an unknown version."""
        self.version(model, version)
        self.client.set_registered_model_alias(model, alias, str(version))

    def delete_alias(self, model: str, alias: str) -> None:
        """Remove an alias; removing an absent one is fine."""
        if self.alias(model, alias) is not None:
            self.client.delete_registered_model_alias(model, alias)

    def resolve(self, model: str, version: int | None) -> int:
        """The version given, or else the champion; BadInput when there is none."""
        if version is not None:
            return version
        champion = self.alias(model, CHAMPION)
        if champion is None:
            raise BadInput(f"{model} has no champion yet; name a version, or promote one")
        return champion

    def note_delta(self, model: str, version: int, n: int, window: str) -> None:
        """Show on the version how far continual training has come."""
        for name, value in (("head", str(n)), ("newest_window", window)):
            self.client.set_model_version_tag(model, str(version), TAG + name, value)

    def _search(self, model: str, condition: str = "") -> list[Version]:
        query = f"name = '{model}'" + (f" and {condition}" if condition else "")
        found: list[Version] = []
        token: str | None = None
        while True:
            page = self.client.search_model_versions(query, max_results=_MANY, page_token=token)
            found += [_version(entry) for entry in page]
            token = page.token
            if not token:
                return found

    def _ensure_model(self, model: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(model, description=f"Freshet's {model}; every version has its own log")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def connect(tracking_uri: str) -> MlflowClient:
    """A client of the MLflow server; FreshetError when nobody answers there.

    A user and password in the URI (https://user:password@host) are sent as basic auth and never told.
    """

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    from mlflow import MlflowClient

    if tracking_uri.startswith(("http://", "https://")):
        _require_answer(tracking_uri)
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _require_answer(tracking_uri: str) -> None:
    url = httpx.URL(tracking_uri)
    login = (url.username, url.password) if url.userinfo else None
    address = str(url.copy_with(userinfo=b"")).rstrip("/")
    try:
        httpx.get(f"{address}/health", auth=login, timeout=10, follow_redirects=True).raise_for_status()
    except httpx.HTTPError as error:
        raise FreshetError(
            f"no MLflow server answers at {address} ({error}); start one or set --tracking-uri"
        ) from error


def origin_tags() -> dict[str, str]:
    """Where a run or version comes from: the code, and the DAG run when Airflow started it."""
    tags = {"git_commit": git_commit()}
    for name in ("DAG_ID", "DAG_RUN_ID", "TASK_ID", "TRY_NUMBER"):
        if value := os.environ.get(f"AIRFLOW_CTX_{name}"):
            tags[f"airflow_{name.lower()}"] = value
    return tags


@functools.cache
def git_commit() -> str:
    """$FRESHET_COMMIT (set in images), or the commit of the working tree; 'unknown' outside of one."""
    if commit := os.environ.get("FRESHET_COMMIT"):
        return commit
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _version(entry: ModelVersion) -> Version:
    tags: dict[str, Any] = entry.tags
    parent = tags.get(TAG + "parent_version")
    return Version(
        model=entry.name,
        version=int(entry.version),
        run_id=entry.run_id or "",
        checkpoint=tags.get(TAG + "checkpoint", ""),
        parent_version=int(parent) if parent else None,
    )
