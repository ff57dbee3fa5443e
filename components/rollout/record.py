"""The record of a rollout: one immutable JSON file per decision, serving/rollout/<seq>.json, never rewritten.

The newest entry is the truth that servers follow. Two deciders at once are kept apart by create-if-absent: the one
that comes second has decided on an outdated state and must decide again.
"""

from __future__ import annotations

from pydantic import ValidationError

from components.errors import BadInput
from components.rollout.state import RolloutState
from components.storage import Storage

FOLDER = "serving/rollout"


def current(storage: Storage) -> RolloutState:
    """The newest entry, or the empty state when nothing has been recorded."""
    paths = _paths(storage)
    return _read(storage, paths[-1]) if paths else RolloutState()


def history(storage: Storage) -> list[RolloutState]:
    """All entries, oldest first."""
    return [_read(storage, path) for path in _paths(storage)]


def append(storage: Storage, state: RolloutState) -> None:
    """Commit `state`; AlreadyExists when somebody else has decided first."""
    storage.create(f"{FOLDER}/{state.seq:08d}.json", state.model_dump_json(indent=1).encode())


def _paths(storage: Storage) -> list[str]:
    return [path for path in storage.list(FOLDER) if path.endswith(".json")]


def _read(storage: Storage, path: str) -> RolloutState:
    try:
        return RolloutState.model_validate_json(storage.read_bytes(path))
    except ValidationError as error:
        raise BadInput(f"{storage.url(path)} is not a rollout record ({error}); restore it from a backup") from error
