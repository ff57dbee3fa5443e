"""A synthetic world for recommenders: describe it, and export its history for use elsewhere.

  python -m components.world --world-end=2025-01-07T00:00:00Z                          describe it
  python -m components.world --world-end=2025-01-07T00:00:00Z --output=world      export JSON lines
  python -m components.world --output=world --format=parquet --world-shift-at=2025-01-04T00:00:00Z

Users have two to four tastes over categories; items have a category, an author and a quality, appear and are removed;
pages and positions matter. At --world-shift-at preferences change: what each taste likes is regrouped, and what is in
fashion with everybody is drawn anew, by default nearly reversed. The same settings give the same bytes.
The export is impressions, actions (click, watch in seconds, long_view, like) and items; some events come twice, some
late (received_at), and malformed rows are among the JSON lines, or in malformed.jsonl beside Parquet files.
The result describes the history: rates, and how well the world's own probabilities rank its clicks (oracle AUC), the
most that any model can reach.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from components.config import StepConfig
from components.world.config import WorldConfig
from components.world.history import History, simulate_history
from components.world.world import World, now_end
from model.metrics import auc


class ExportConfig(StepConfig, WorldConfig):
    """The world, and where to write its history."""

    output: str = Field(default="", description="folder to export the history to (empty: describe only)")
    format: Literal["jsonl", "parquet"] = Field(default="jsonl", description="file format: jsonl or parquet")


class WorldDescription(BaseModel):
    """The history of a world in numbers."""

    world_end: str
    users: int
    items_alive: int = Field(description="items that can be shown at world_end")
    items_ever: int
    impressions: int = Field(description="distinct impressions")
    impression_copies: int
    late_impressions: int = Field(description="received an hour or more after their time")
    malformed_rows: int
    rates: dict[str, dict[str, float]] = Field(description="actions per impression before and after the shift")
    oracle_auc: dict[str, dict[str, float]] = Field(description="AUC of the world's own probabilities")
    files: list[str]


def run(config: ExportConfig) -> WorldDescription:
    """Describe the world of these settings and export its history if asked to."""
    world_config = config.world()
    if not world_config.world_end:
        world_config = world_config.model_copy(update={"world_end": now_end(datetime.now(UTC))})
    world = World(world_config)
    history = simulate_history(world)
    files = export(world, history, Path(config.output), config.format) if config.output else []
    return describe(world, history, files)


def export(world: World, history: History, folder: Path, form: str) -> list[str]:
    """Write impressions, actions and items (and malformed) to `folder`; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"impressions": history.impressions, "actions": history.actions}
    tables["items"] = world.catalogue(None, world.end_us)
    written = [_write(table, folder / f"{name}.{form}", history.malformed) for name, table in tables.items()]
    if form == "parquet":
        path = folder / "malformed.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in history.malformed))
        written.append(str(path))
    return written


def describe(world: World, history: History, files: list[str]) -> WorldDescription:
    shown = labelled(world, history)
    eras = {"before": shown[shown.era == 0], "after": shown[shown.era == 1]}
    eras = {name: rows for name, rows in eras.items() if len(rows)}
    actions = ("click", "long_view", "like")
    late = history.impressions["received_at"].cast(pa.int64()).to_numpy() - _us(history.impressions) > 3_600_000_000
    return WorldDescription(
        world_end=world.config.world_end,
        users=world.config.world_users,
        items_alive=len(world.alive(world.end_us)),
        items_ever=world.catalogue(None, world.end_us).num_rows,
        impressions=len(shown),
        impression_copies=history.impressions.num_rows - len(shown),
        late_impressions=int(late.sum()),
        malformed_rows=len(history.malformed),
        rates={e: {a: round(float(rows[a].mean()), 4) for a in actions} for e, rows in eras.items()},
        oracle_auc={e: {a: round(auc(rows[a], rows[f"p_{a}"]), 4) for a in actions} for e, rows in eras.items()},
        files=files,
    )


def labelled(world: World, history: History) -> pd.DataFrame:
    """One row per distinct impression: ids, page, position, time_us, era, 0/1 per action and p_<action>, the truth."""
    keys = ["request_id", "user_id", "item_id"]
    shown = history.impressions.select([*keys, "page", "position"]).to_pandas()
    shown["time_us"] = _us(history.impressions)
    shown = shown.drop_duplicates(keys).reset_index(drop=True)
    events = history.actions.select([*keys, "action"]).to_pandas().drop_duplicates()
    columns = (shown[name].to_numpy() for name in ("user_id", "item_id", "page", "position", "time_us"))
    truth = world.probabilities(*columns)
    for action in ("click", "long_view", "like"):
        done = events.loc[events.action == action, keys].assign(**{action: 1})
        shown = shown.merge(done, how="left", on=keys).fillna({action: 0})
        shown[f"p_{action}"] = truth[action]
    shown["era"] = world.era(shown["time_us"].to_numpy())
    return shown


def _us(events: pa.Table) -> Any:
    return events["timestamp"].cast(pa.int64()).to_numpy()


def _write(table: pa.Table, path: Path, malformed: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return str(path)
    frame = table.to_pandas()
    lines = frame.to_json(orient="records", lines=True, date_format="iso", date_unit="us")
    broken = [{k: v for k, v in row.items() if k != "kind"} for row in malformed if f"{row['kind']}s" == path.stem]
    path.write_text(lines + "".join(json.dumps(row) + "\n" for row in broken))
    return str(path)
