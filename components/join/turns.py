"""Joins commit one after the other, each knowing all that were committed before it.

What a window holds depends on the windows joined before it: a late impression goes into the next join, and into that
alone. So a join commits by creating the file of a turn, whose number is how many there were when it began. Of two joins
at once one finds its turn taken, and has to look at the log again. The file is the join's manifest: whoever begins next
publishes it, when the join died, or is still about to, between its turn and the manifest in the window's folder.
"""

from __future__ import annotations

from components.errors import AlreadyExists, FreshetError
from components.manifests import Manifest, find, publish
from components.storage import Storage

FOLDER = "interactions"
TURNS = f"{FOLDER}/turns"


def folder_of(window_key: str) -> str:
    """Where the interactions of a window are."""
    return f"{FOLDER}/window={window_key}"


def begin(storage: Storage) -> int:
    """The turn for which a join that begins now may apply. To be called before it looks at what is joined."""
    taken = storage.list(TURNS)
    if taken:
        last = Manifest.model_validate_json(storage.read_bytes(taken[-1]))
        if find(storage, folder_of(last.name)) is None and _is_there(storage, last):
            publish(storage, folder_of(last.name), last)
    return len(taken)


def commit(storage: Storage, turn: int, manifest: Manifest) -> Manifest:
    """Publish a join. FreshetError when another one was committed since `begin`: the same again may succeed."""
    try:
        storage.create(f"{TURNS}/{turn:08d}.json", manifest.model_dump_json().encode())
    except AlreadyExists:
        raise FreshetError("another window was joined meanwhile; run this join again") from None
    return publish(storage, folder_of(manifest.name), manifest)


def _is_there(storage: Storage, manifest: Manifest) -> bool:
    """Not when somebody removed the window, to join it again."""
    return all(storage.exists(path) for paths in manifest.files.values() for path in paths)
