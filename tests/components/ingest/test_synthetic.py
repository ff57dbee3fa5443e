"""The synthetic world's past."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from components.errors import BadInput
from components.ingest import synthetic
from components.ingest.batch import Batch
from components.ingest.config import IngestConfig
from components.storage import Storage
from components.world.config import WorldConfig
from components.world.history import simulate_history
from components.world.record import record_world, recorded_world
from components.world.world import World
from tests.components.ingest.cases import WORLD, content, events, ingest, written


def test_the_synthetic_history_enters_the_log_whole_and_its_malformed_rows_do_not(store: Storage) -> None:
    result = ingest(store, **WORLD, world_malformed_share=0.02)
    history = simulate_history(World(WorldConfig.model_validate(WORLD | {"world_malformed_share": 0.02})))
    assert sum(result.quarantined.values()) == len(history.malformed) > 0
    assert result.event_rows == history.impressions.num_rows + history.actions.num_rows + len(history.malformed)
    assert result.impressions + sum(result.actions.values()) + result.duplicates == result.event_rows - len(
        history.malformed
    )
    assert set(events(store, "impressions").request_id) == set(history.impressions["request_id"].to_pylist())


def test_copies_and_late_events_of_the_world_reach_the_log_for_the_join_to_resolve(store: Storage) -> None:
    ingest(store, **WORLD, world_duplicate_share=0.1, world_late_share=0.1)
    shown = events(store, "impressions")
    assert shown.duplicated(["request_id", "item_id"]).sum() > 20
    assert (shown.received_at - shown.timestamp > 3_600_000_000).sum() > 20


@pytest.mark.parametrize("given", [{"path": "log.csv"}, {"columns": "user_id=uid"}])
def test_the_world_does_not_come_in_place_of_a_log_whose_source_was_forgotten(
    store: Storage, given: dict[str, str]
) -> None:
    with pytest.raises(BadInput, match=f"has no --{next(iter(given))}; set --source to files, kuairand or movielens"):
        ingest(store, **WORLD, **given)
    assert content(store) == {}


def test_the_world_does_not_come_among_real_events(store: Storage, tmp_path: Path) -> None:
    log = written(tmp_path / "log.csv", {"user_id": [1], "item_id": [2], "timestamp": [1700000000]})
    name = ingest(store, source="files", path=str(log)).name
    before = content(store)
    with pytest.raises(BadInput, match=rf"holds other data \(ingests/{name}.json\).* use another --root"):
        ingest(store, **WORLD)
    assert content(store) == before


def test_the_world_is_recorded_for_its_live_users(store: Storage) -> None:
    ingest(store, **WORLD)
    recorded = WorldConfig.model_validate_json(store.read_bytes("world/config.json"))
    assert recorded == WorldConfig.model_validate(WORLD)


def test_ingesting_a_world_without_a_given_end_again_changes_nothing_even_later(store: Storage) -> None:
    endless = {**WORLD, "world_end": ""}
    first = ingest(store, **endless)
    recorded = json.loads(store.read_bytes("world/config.json"))
    earlier = {**recorded, "world_end": "2025-01-03T00:00:00+00:00"}  # as if recorded at another time
    assert ingest(store, **endless) == first
    other = Storage(f"{store.root}/other")
    other.write_bytes("world/config.json", json.dumps(earlier).encode())
    last = ingest(other, **endless).last_event
    assert last is not None and last < datetime(2025, 1, 3, tzinfo=UTC)
    assert json.loads(store.read_bytes("world/config.json")) == recorded


def test_a_second_world_in_one_root_is_refused_and_the_live_settings_of_the_first_stand(store: Storage) -> None:
    first = ingest(store, **WORLD)
    live = WorldConfig.model_validate({**WORLD, "world_shift_at": "2025-01-04T00:00:00Z", "world_day_s": 600})
    record_world(store, live, replace=True)
    assert ingest(store, **WORLD) == first
    assert recorded_world(store) == live
    with pytest.raises(BadInput, match="already holds a synthetic world that differs in world_seed; use"):
        ingest(store, **WORLD, world_seed=8)


def test_of_two_worlds_that_are_ingested_at_once_one_enters_the_log(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = synthetic.load

    def load(config: IngestConfig, now_us: int) -> Batch:
        record_world(store, WorldConfig.model_validate(WORLD))  # another ingest, which is a little faster
        return original(config, now_us)

    monkeypatch.setattr(synthetic, "load", load)
    with pytest.raises(BadInput, match="already holds a synthetic world that differs in world_seed; use"):
        ingest(store, **WORLD, world_seed=8)
    assert store.list("events") == store.list("ingests") == []
    assert recorded_world(store) == WorldConfig.model_validate(WORLD)


def test_a_world_without_a_given_end_ends_where_the_slice_ends(store: Storage) -> None:
    ingest(store, **{**WORLD, "world_end": ""}, until_time="2025-02-01T00:00:00Z")
    assert json.loads(store.read_bytes("world/config.json"))["world_end"] == "2025-02-01T00:00:00+00:00"
