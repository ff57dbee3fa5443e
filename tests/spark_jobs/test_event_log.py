"""Files of the event log: what a join believes of them, and that their names are taken as they are."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.errors import BadInput
from components.schemas import IMPRESSIONS, TIMESTAMP
from components.storage import Storage
from spark_jobs.event_log import check_files
from tests.spark_jobs.log import HOURS, action, at, impression, interactions, join, quarantined, table, write

PATH = "events/impressions/dt=2026-03-01/hour=10/log.parquet"


def written(storage: Storage, rows: pa.Table, statistics: bool) -> list[str]:
    place = Path(storage.root.removeprefix("file://")) / PATH
    place.parent.mkdir(parents=True)
    pq.write_table(rows, place, write_statistics=statistics)
    return [PATH]


@pytest.mark.parametrize("statistics", [True, False])
def test_a_null_is_found_with_and_without_statistics(storage: Storage, statistics: bool) -> None:
    rows = table("impressions", [impression(1, 5, 10), impression(2, 5, 11)])
    rows = rows.cast(pa.schema([field.with_nullable(True) for field in rows.schema]))
    place = rows.schema.get_field_index("timestamp")
    rows = rows.set_column(place, "timestamp", pa.array([at(10), None], pa.int64()).cast(TIMESTAMP))
    with pytest.raises(BadInput, match="1 rows have no 'timestamp', which every row needs"):
        check_files(storage, written(storage, rows, statistics), IMPRESSIONS)


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("minute", [-1, 60])
def test_a_file_with_events_of_another_hour_than_its_folder_is_refused(
    storage: Storage, statistics: bool, minute: float
) -> None:
    rows = table("impressions", [impression(1, 5, 10), impression(2, 5, minute)])
    with pytest.raises(BadInput, match="not of the UTC hour that its folder names; ingest it again"):
        check_files(storage, written(storage, rows, statistics), IMPRESSIONS)


@pytest.mark.parametrize("statistics", [True, False])
def test_a_sound_file_is_counted_whatever_else_it_holds(storage: Storage, statistics: bool) -> None:
    rows = table("impressions", [impression(1, 5, 0), impression(2, 5, 59)])
    nested = pa.array([{"user_id": None}] * 2, pa.struct([("user_id", pa.int64())]))
    assert check_files(storage, written(storage, rows.add_column(0, "context", nested), statistics), IMPRESSIONS) == 2


def test_a_root_may_have_any_name(spark: object, tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}/events/{{store}} [1]*")
    write(storage, "impressions", [impression(1, 5, 10)])
    (lost,) = write(storage, "actions", [action(9, 9, 10)])
    join(storage, HOURS[0])
    assert [row["request_id"] for row in interactions(storage, HOURS[0])] == [1]
    assert [row["source"] for row in quarantined(storage, HOURS[0])] == [lost]
