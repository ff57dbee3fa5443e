"""The content side of the world: what has appeared is written to the catalogue, items/*.parquet."""

from __future__ import annotations

import time

from components.errors import BadInput
from components.ingest.write import items_path
from components.storage import Storage
from components.traffic.config import TrafficConfig
from components.windows import from_us, parse_time
from components.world.config import WorldConfig
from components.world.record import record_world, recorded_world
from components.world.world import World


def live_world(storage: Storage, config: TrafficConfig) -> tuple[WorldConfig, bool]:
    """The world whose history is in the root, with this run's shift and day length; whether the latter is new.

    Changes are recorded, so that later runs, and whoever explains the events, know the same world.
    """
    recorded = recorded_world(storage)
    if recorded is None:
        raise BadInput(
            f"{storage.root} holds no synthetic world; run python -m components.ingest --source=synthetic first"
        )
    changes: dict[str, object] = {}
    if config.shift_at and config.shift_at != recorded.world_shift_at:
        if parse_time(config.shift_at) < recorded.end:
            raise BadInput(f"--shift-at must not come before the end of the recorded history, {recorded.world_end}")
        changes["world_shift_at"] = config.shift_at
    if config.day_s and config.day_s != recorded.world_day_s:
        changes["world_day_s"] = config.day_s
    world = recorded.model_copy(update=changes)
    if changes:
        record_world(storage, world, replace=True)
    return world, "world_day_s" in changes


class Publisher:
    """Writes the items that appeared since the last call; the first call repeats all of the live time."""

    def __init__(self, storage: Storage, world: World, everything: bool) -> None:
        self.storage, self.world = storage, world
        self.since_us: int | None = None if everything else world.end_us
        self.published = 0

    def publish(self) -> int:
        """Write a catalogue file if any item has appeared; the number of items in it."""
        now_us = time.time_ns() // 1000
        table = self.world.catalogue(self.since_us, now_us)
        if table.num_rows:
            self.storage.write_table(items_path(from_us(now_us), "world"), table)
        self.since_us = now_us
        self.published += table.num_rows
        return int(table.num_rows)
