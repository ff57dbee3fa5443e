"""The world that a storage root's events come from, recorded for those who continue or explain them."""

from __future__ import annotations

from contextlib import suppress

from components.errors import AlreadyExists
from components.storage import Storage
from components.world.config import WorldConfig

PATH = "world/config.json"


def recorded_world(storage: Storage) -> WorldConfig | None:
    """The root's world, or None when its events come from elsewhere."""
    return WorldConfig.model_validate_json(storage.read_bytes(PATH)) if storage.exists(PATH) else None


def record_world(storage: Storage, world: WorldConfig, replace: bool = False) -> None:
    """Record the world; one that is recorded already stands unless `replace`, also if that happened just now."""
    data = world.model_dump_json(indent=1).encode()
    if replace:
        storage.write_bytes(PATH, data)
        return
    with suppress(AlreadyExists):
        storage.create(PATH, data)
