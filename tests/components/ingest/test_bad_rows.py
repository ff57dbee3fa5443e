"""Every bad row is set aside with its reason; too many of them fail the ingest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.config import cli
from components.errors import BadInput
from components.ingest.config import IngestConfig
from components.ingest.run import run
from components.schemas import QUARANTINE
from components.storage import Storage
from tests.components.ingest.cases import ingest, written

BAD_ROWS: dict[str, dict[str, Any]] = {
    "missing_user_id": {"user_id": None},
    "non_integer_user_id": {"user_id": "anonymous"},
    "non_integer_item_id": {"item_id": 12.5},
    "missing_timestamp": {"timestamp": ""},
    "unreadable_timestamp": {"timestamp": "soon"},
    "timestamp_in_future": {"timestamp": 32503680000},
    "timestamp_before_1990": {"timestamp": 5},
    "unknown_action": {"action": "teleport"},
    "missing_action": {"action": None},
    "missing_value": {"action": "watch"},
    "negative_value": {"action": "watch", "value": -2},
    "too_large_value": {"action": "watch", "value": 1e39},
    "not_a_number_value": {"action": "rating", "value": "NaN"},
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_set_aside_with_its_reason_and_all_of_its_content(
    store: Storage, tmp_path: Path, reason: str
) -> None:
    good = {"request_id": 1, "user_id": 1, "item_id": 2, "timestamp": 1700000000, "action": "click", "value": None}
    bad = good | BAD_ROWS[reason]
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    result = ingest(store, source="files", path=str(path), kind="actions", max_bad_share=0.5)
    assert result.quarantined == {reason: 1}
    assert result.actions == {"click": 1}
    table = store.read_table(str(result.quarantine_path))
    assert table.schema == QUARANTINE
    (row,) = table.to_pylist()
    assert (row["kind"], row["reason"], row["source"]) == ("action", reason, "log.jsonl")
    kept = json.loads(row["row"])
    assert {k: None if v is None else str(v) for k, v in kept.items()} == {
        k: None if v is None else str(v) for k, v in bad.items()
    }


def test_lines_that_are_no_rows_are_set_aside(store: Storage, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,2,1700000000\n1,2\n1,2,3,4\n3,4,1700000001\n")
    result = ingest(store, source="files", path=str(tmp_path / "log.csv"), max_bad_share=0.6)
    assert (result.impressions, result.quarantined, result.event_rows) == (2, {"malformed_row": 2}, 4)
    (tmp_path / "log.jsonl").write_text('{"user_id": 1, "item_id": 2, "timestamp": 1700000000}\n{"user_id"\n[1]\n')
    result = ingest(store, source="files", path=str(tmp_path / "log.jsonl"), max_bad_share=0.7)
    assert (result.impressions, result.quarantined) == (1, {"malformed_row": 2})


@pytest.mark.parametrize(
    "line",
    [
        pytest.param('{"user_id": 1' + "0" * 5000 + "}", id="a number of 5,000 digits"),
        pytest.param('{"user_id": ' + "[" * 100_000 + "]" * 100_000 + "}", id="100,000 brackets, one in another"),
        pytest.param('{"note": "\\ud83d"}', id="half of a surrogate pair"),
        pytest.param('{"\\ud83d": 1}', id="a name that is half of a surrogate pair"),
    ],
)
def test_no_line_of_json_can_stop_the_others(store: Storage, tmp_path: Path, line: str) -> None:
    good = '{"user_id": 1, "item_id": 2, "timestamp": 1700000000}'
    (tmp_path / "log.jsonl").write_text(f"{line}\n{good}\n")
    result = ingest(store, source="files", path=str(tmp_path / "log.jsonl"), max_bad_share=0.5)
    assert (result.impressions, result.quarantined) == (1, {"malformed_row": 1})
    (row,) = store.read_table(str(result.quarantine_path)).to_pylist()
    assert json.loads(row["row"]) == line, "it is kept as it was"


def test_a_good_row_is_no_copy_of_a_bad_one(store: Storage, tmp_path: Path) -> None:
    shown = "user_id,item_id,timestamp,click\n1,2,1700000000,maybe\n1,2,1700000000,1\n"
    (tmp_path / "log.csv").write_text(shown)
    result = ingest(store, source="files", path=str(tmp_path / "log.csv"), kind="impressions", max_bad_share=0.5)
    assert (result.impressions, result.actions, result.duplicates) == (1, {"click": 1}, 0)
    acted = "request_id,user_id,item_id,timestamp,action,received_at\n"
    acted += "1,1,2,1700000000,click,never\n1,1,2,1700000000,click,1700000000\n"
    (tmp_path / "log.csv").write_text(acted)
    result = ingest(store, source="files", path=str(tmp_path / "log.csv"), kind="actions", max_bad_share=0.5)
    assert (result.actions, result.duplicates) == ({"click": 1}, 0)


def test_a_bad_row_with_a_time_belongs_to_the_slice_of_that_time_only(store: Storage, tmp_path: Path) -> None:
    columns = {"user_id": ["1", "x", "3"], "item_id": [1, 2, 3], "timestamp": [1700000000, 1700000001, 1700000100]}
    path = str(written(tmp_path / "log.csv", columns))
    middle = "2023-11-14T22:14:00Z"
    first = ingest(store, source="files", path=path, until_time=middle, max_bad_share=0.5)
    second = ingest(store, source="files", path=path, from_time=middle, max_bad_share=0.5)
    assert (first.quarantined, first.event_rows) == ({"non_integer_user_id": 1}, 2)
    assert (second.quarantined, second.event_rows) == ({}, 1)


def test_too_many_bad_rows_fail_the_ingest_with_a_report_and_nothing_enters_the_log(
    store: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"user_id": ["1", "x", "y", "4"], "item_id": [1, 2, 3, 4], "timestamp": [1700000000] * 3 + [5]}
    path = written(tmp_path / "log.csv", columns)
    assert cli(IngestConfig, run, [f"--root={store.root}", "--source=files", f"--path={path}"]) == 2
    message = capsys.readouterr().err
    assert "3 of 4 rows (75.0%) are bad, more than --max-bad-share 5.0%; nothing was ingested" in message
    assert "non_integer_user_id" in message and "timestamp_before_1990" in message
    assert store.list("events") == store.list("ingests") == []
    (quarantined,) = store.list("quarantine")
    assert store.url(quarantined) in message
    assert store.read_table(quarantined).num_rows == 3


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"user_id": "anna"}, "ids that are text need --string-ids"),
        ({"timestamp": "2024-01-01"}, "are the times of --time-unit=s? (s, ms, us, iso)"),
        ({"timestamp": 1700000000000}, "are the times of --time-unit=s? (s, ms, us, iso)"),
        ({"action": "buy"}, "--action-names maps actions to those known: click, like"),
    ],
)
def test_bad_rows_name_the_setting_that_they_may_come_from(
    store: Storage, tmp_path: Path, row: dict[str, Any], hint: str
) -> None:
    columns = {"user_id": 1, "item_id": 2, "timestamp": 1700000000, "action": "click"} | row
    path = str(written(tmp_path / "log.csv", {name: [value] for name, value in columns.items()}))
    with pytest.raises(BadInput) as told:
        ingest(store, source="files", path=path)
    lines = str(told.value).splitlines()
    assert [line for line in lines if "--" in line and line.startswith(hint)], lines
    assert sum(line.startswith(("ids that", "are the", "--action")) for line in lines) == 1


def test_a_larger_bad_share_can_be_allowed_afterwards(store: Storage, tmp_path: Path) -> None:
    columns = {"user_id": ["1", "x"], "item_id": [1, 2], "timestamp": [1700000000] * 2}
    path = str(written(tmp_path / "log.csv", columns))
    with pytest.raises(BadInput, match="nothing was ingested"):
        ingest(store, source="files", path=path)
    assert ingest(store, source="files", path=path, max_bad_share=0.5).impressions == 1
