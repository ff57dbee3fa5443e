"""The world that a storage root's events come from, recorded for those who continue or explain them."""

from __future__ import annotations

from components.storage import Storage
from components.world.config import WorldConfig

PATH = "world/config.json"


def recorded_world(storage: Storage) -> WorldConfig | None:
    """The root's world, or None when its events come from elsewhere."""
    return WorldConfig.model_validate_json(storage.read_bytes(PATH)) if storage.exists(PATH) else None


def record_world(storage: Storage, world: WorldConfig, replace: bool = False) -> None:
    """Record the world; one that is recorded already stands unless `replace`."""
    if replace or not storage.exists(PATH):
        storage.write_bytes(PATH, world.model_dump_json(indent=1).encode())
