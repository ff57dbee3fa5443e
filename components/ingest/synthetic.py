"""The synthetic world's history, with its duplicates, late and malformed rows, and its catalogue."""

from __future__ import annotations

import pyarrow as pa

from components.ingest.batch import Batch
from components.ingest.config import IngestConfig
from components.ingest.files import add_rows
from components.ingest.read import as_text, text_table
from components.ingest.rows import Rows
from components.world.history import simulate_history
from components.world.world import World


def load(config: IngestConfig, now_us: int) -> Batch:
    """Events in [from, until) of the history; each event, a late one too, belongs to the slice of its own time."""
    world = World(config.world())
    history = simulate_history(world)
    batch = Batch()
    for kind, events in (("impressions", history.impressions), ("actions", history.actions)):
        broken = [row for row in history.malformed if f"{row['kind']}s" == kind]
        tables = [as_text(events), text_table(broken)] if broken else [as_text(events)]
        table = pa.concat_tables(tables, promote_options="default").select(_columns(kind))
        batch.event_rows += table.num_rows
        reading = config.model_copy(update={"kind": kind, "time_unit": "iso", "string_ids": False, "action_names": ""})
        add_rows(batch, Rows(table, kind[:-1], "synthetic"), reading, now_us)
    batch.items = world.catalogue(None, world.end_us)
    batch.item_rows = batch.items.num_rows
    return batch


def _columns(kind: str) -> list[str]:
    common = ["request_id", "user_id", "item_id", "timestamp", "received_at"]
    return [*common, *(["position", "page"] if kind == "impressions" else ["action", "value"])]
