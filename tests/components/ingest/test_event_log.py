"""Whatever the source: where events lie, that each enters once, and that a crash loses none."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.schemas import ACTION_EVENTS, IMPRESSIONS
from components.storage import Storage
from tests.components.ingest.cases import KUAIRAND_LOG, WORLD, content, ingest


def test_files_lie_in_the_utc_hour_of_their_events_with_the_schema_of_the_log(store: Storage) -> None:
    ingest(store, **WORLD)
    for kind, schema in (("impressions", IMPRESSIONS), ("actions", ACTION_EVENTS)):
        paths = store.list(f"events/{kind}")
        assert len(paths) > 20
        for path in paths:
            table = store.read_table(path)
            assert table.schema == schema
            hours = {f"dt={t:%Y-%m-%d}/hour={t:%H}" for t in table["timestamp"].to_pylist()}
            assert hours == {"/".join(path.split("/")[2:4])}


def test_ingesting_again_changes_nothing_and_returns_the_same_result(store: Storage, kuairand: Path) -> None:
    first = ingest(store, source="kuairand", path=str(kuairand))
    before = content(store)
    assert ingest(store, source="kuairand", path=str(kuairand)) == first
    assert content(store) == before


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(crash_after=st.integers(0, 30))
def test_running_again_after_a_crash_gives_what_an_undisturbed_run_gives(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, crash_after: int
) -> None:
    folder = tmp_path_factory.mktemp("crash")
    whole, crashed = Storage(f"file://{folder}/whole"), Storage(f"file://{folder}/crashed")
    small = {**WORLD, "world_impressions": 200}
    ingest(whole, **small)
    writes = 0
    original = Storage.write_table

    def dying(self: Storage, path: str, table: pa.Table) -> None:
        nonlocal writes
        writes += 1
        if writes > crash_after:
            raise OSError("the machine died")
        original(self, path, table)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "write_table", dying)
        with pytest.raises(OSError, match="the machine died"):
            ingest(crashed, **small)
    assert crashed.list("ingests") == []
    ingest(crashed, **small)
    assert content(crashed) == content(whole)


def test_a_bucket_receives_the_same_files_as_a_folder(store: Storage, kuairand: Path, s3_root: str) -> None:
    bucket = Storage(s3_root)
    assert ingest(bucket, source="kuairand", path=str(kuairand)) == ingest(store, source="kuairand", path=str(kuairand))
    assert content(bucket) == content(store)


def test_another_content_has_another_name_and_another_place_the_same(tmp_path: Path, kuairand: Path) -> None:
    stores = [Storage(f"file://{tmp_path}/{n}") for n in range(3)]
    first = ingest(stores[0], source="kuairand", path=str(kuairand))
    moved = ingest(stores[1], source="kuairand", path=str(kuairand.rename(tmp_path / "elsewhere")))
    log = tmp_path / "elsewhere" / "data" / "log_standard_4_22_to_5_08_pure.csv"
    log.write_text(KUAIRAND_LOG + "1,17,20220501,0,1651400000001,0,0,0,0,0,0,0,0,9000000,0,0,0,0,4\n")
    longer = ingest(stores[2], source="kuairand", path=str(tmp_path / "elsewhere"))
    assert first == moved
    assert content(stores[0]) == content(stores[1])
    assert longer.name != first.name
