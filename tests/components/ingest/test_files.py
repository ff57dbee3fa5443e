"""Any Parquet, CSV or JSONL file with a mapping of columns."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from components.config import cli
from components.errors import BadInput
from components.ingest.config import IngestConfig
from components.ingest.files import COLUMNS, REQUIRED
from components.ingest.run import run
from components.schemas import ITEMS, hash_id
from components.sequence_data import read_items
from components.storage import Storage
from tests.components.ingest.cases import LOG, MAPPING, events, ingest, written
from tests.spark_jobs.log import HOURS, publish_interactions


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_one_log_in_three_formats_gives_the_same_events(store: Storage, tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"log.{ending}", LOG)
    result = ingest(
        store, source="files", path=str(path), kind="impressions", columns=MAPPING, time_unit="iso", string_ids=True
    )
    shown, acted = events(store, "impressions"), events(store, "actions")
    day = 1704067200_000000
    assert result.quarantined == {}
    assert sorted(zip(shown.user_id, shown.item_id, shown.timestamp, strict=True)) == sorted(
        [
            (hash_id("a"), hash_id("x"), day),
            (hash_id("b"), hash_id("y"), day),
            (hash_id("a"), hash_id("y"), day + 86400_000000),
        ]
    )
    assert Counter(acted.action) == {"click": 2, "watch": 1}
    assert acted[acted.action == "watch"].value.tolist() == [2.5]
    assert shown.request_id.between(0, 2**53 - 1).all()


def test_action_rows_keep_their_request_and_their_names_can_be_mapped(store: Storage, tmp_path: Path) -> None:
    columns = {
        "request_id": [5, 5, 6],
        "user_id": [1, 1, 2],
        "item_id": [10, 10, 20],
        "timestamp": [1.7e9, 1.7e9 + 0.25, 1.7e9 + 3],
        "action": ["open", "watch", "buy"],
        "value": [None, 4.0, None],
    }
    path = written(tmp_path / "actions.jsonl", columns)
    names = "open=click,buy=like"
    ingest(store, source="files", path=str(path), kind="actions", action_names=names)
    acted = events(store, "actions")
    assert acted[["request_id", "action", "timestamp"]].to_numpy().tolist() == [
        [5, "click", 1_700_000_000_000_000],
        [5, "watch", 1_700_000_000_250_000],
        [6, "like", 1_700_000_003_000_000],
    ]
    assert store.list("events/impressions") == []


def test_flags_may_be_numbers_or_words_in_every_format(store: Storage, tmp_path: Path) -> None:
    row = {"user_id": 1, "timestamp": 1700000000}
    flags = [True, False, 1, 0, "true", "FALSE", None]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row | {"item_id": n, "click": flag}) + "\n" for n, flag in enumerate(flags)))
    assert ingest(store, source="files", path=str(path), kind="impressions").quarantined == {}
    assert sorted(events(store, "actions").item_id) == [0, 2, 4]
    table = {"user_id": [1, 1], "item_id": [10, 11], "timestamp": [1700000000, 1700000000], "click": [True, False]}
    for ending in ("csv", "parquet"):
        path = written(tmp_path / f"log.{ending}", table)
        result = ingest(store, source="files", path=str(path), kind="impressions")
        assert (result.impressions, result.actions, result.quarantined) == (2, {"click": 1}, {})


def test_an_impression_logged_again_with_other_feedback_stays_once_with_all_of_it(
    store: Storage, tmp_path: Path
) -> None:
    rows = ["1,0,2.5", "0,1,2.5", "1,0,2.5", "0,0,0"]
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp,click,like,watch\n" + "".join(f"1,2,1700000000,{r}\n" for r in rows))
    result = ingest(store, source="files", path=str(path), kind="impressions")
    assert (result.impressions, result.duplicates) == (1, 1), "one line is a copy, the others tell more"
    assert result.actions == {"click": 1, "like": 1, "watch": 1}


def test_values_of_several_lines_are_whole_in_a_file_of_any_size(store: Storage, tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\n" + "".join(f'{n},"two\nlines {n}"\n' for n in range(100_000)))
    result = ingest(store, source="files", path=str(path), kind="items")
    assert (result.items, result.quarantined) == (100_000, {})


def test_a_line_separator_inside_a_string_does_not_end_the_row(store: Storage, tmp_path: Path) -> None:
    row = {"user_id": "a\u2028b", "item_id": "x\x85y", "timestamp": 1700000000}
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", newline="")
    result = ingest(store, source="files", path=str(path), string_ids=True)
    assert (result.impressions, result.quarantined) == (1, {})
    assert events(store, "impressions").user_id.tolist() == [hash_id("a\u2028b")]


def test_a_root_in_which_nothing_may_be_written_is_an_error_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = written(tmp_path / "log.csv", {"user_id": [1], "item_id": [7], "timestamp": [1700000000]})
    (tmp_path / "file").touch()
    arguments = [f"--root=file://{tmp_path}/file/store", "--source=files", f"--path={log}"]
    assert cli(IngestConfig, run, arguments) == 1
    assert re.search(r"error: .*file/store.*name a place that this user may", capsys.readouterr().err)


def test_the_commands_of_the_readme_ingest_a_log_and_its_items(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python -m components\.ingest (.*)", readme)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FRESHET_ROOT", store.root)
    written(tmp_path / "log.csv", {"uid": ["a"], "sku": ["x"], "ts": ["2024-01-01T00:00:00Z"], "clicked": [1]})
    written(tmp_path / "items.csv", {"sku": ["x", "y"], "brand": ["b", "b"]})
    for command in commands:
        assert cli(IngestConfig, run, shlex.split(command)) == 0
    assert len(events(store, "impressions")) == len(events(store, "actions")) == 1
    assert sum(store.read_table(path).num_rows for path in store.list("items")) == 2


def test_a_mapped_column_that_is_nowhere_is_refused_or_all_would_be_negatives(store: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    row = {"user_id": 1, "item_id": 7, "timestamp": 1700000000}
    (folder / "a.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "b.jsonl").write_text(json.dumps(row | {"item_id": 8, "clicked": 1}) + "\n")
    with pytest.raises(BadInput, match=r"maps clickd, but no row of .* there are clicked, item_id, timestamp, user_id"):
        ingest(store, source="files", path=str(folder), kind="impressions", columns="click=clickd")
    assert store.list("events") == []
    found = ingest(store, source="files", path=str(folder), kind="impressions", columns="click=clicked")
    assert (found.impressions, found.actions) == (2, {"click": 1}), "a file in which nobody clicked may lack the field"


def test_events_of_windows_that_are_joined_already_are_counted(
    store: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They came too late for it: without a word they would be in the log, and in no training."""
    publish_interactions(store, HOURS[1], [])
    at_ten, hour = HOURS[0].start_us // 10**6, 3600
    times = [at_ten, at_ten + hour - 1, at_ten + hour, at_ten + 2 * hour - 1, at_ten + 2 * hour]
    for name, some in (("before", times[:2]), ("late", times)):
        path = written(tmp_path / f"{name}.csv", {"user_id": 1, "item_id": 7, "timestamp": some})
        ingest(store, source="files", path=str(path), kind="impressions")
        told = capsys.readouterr().err
        assert told.count("warning: 2 events are of windows that are joined") == (name == "late")
        assert told.count("warning") == (name == "late")


def test_feedback_rows_are_an_impression_and_its_action(store: Storage, tmp_path: Path) -> None:
    path = written(tmp_path / "log.csv", {"user_id": [1, 1], "item_id": [7, 8], "timestamp": [1700000000, 1700000001]})
    result = ingest(store, source="files", path=str(path))
    assert (result.impressions, result.actions) == (2, {"like": 2})


def test_item_rows_become_the_catalogue(store: Storage, tmp_path: Path) -> None:
    path = written(tmp_path / "items.csv", {"sku": [7, 8], "brand": [3, None], "duration_s": [1.5, None]})
    result = ingest(store, source="files", path=str(path), kind="items", columns="item_id=sku,author_id=brand")
    items = store.read_table(store.list("items")[0]).to_pydict()
    assert (items["author_id"], items["duration_s"], result.items) == ([3, 0], [1.5, None], 2)


@pytest.mark.parametrize("number", range(4))
def test_the_catalogue_that_was_ingested_last_wins(store: Storage, tmp_path: Path, number: int) -> None:
    for author in (10 + number, 20 + number):
        path = written(tmp_path / "items.csv", {"item_id": [7], "author_id": [author]})
        result = ingest(store, source="files", path=str(path), kind="items")
    assert read_items(store).catalogue.features(np.array([7]))[0, 0] == 20 + number
    files = store.list("items")
    store.delete(f"ingests/{result.name}.json")
    ingest(store, source="files", path=str(path), kind="items")
    assert store.list("items") == files, "a crash before the end of an ingest leaves a file that the next try takes"


def test_an_earlier_catalogue_that_is_ingested_again_is_told_to_change_nothing_and_how_it_wins(
    store: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def give(name: str, author: int) -> str:
        path = written(tmp_path / name, {"item_id": [7], "author_id": [author]})
        assert cli(IngestConfig, run, [f"--root={store.root}", "--source=files", "--kind=items", f"--path={path}"]) == 0
        return capsys.readouterr().err

    assert (give("monday.csv", 10), give("tuesday.csv", 20)) == ("", "")
    assert re.fullmatch(r"files-\w+ has been ingested before; nothing is changed\n", give("tuesday.csv", 20))
    assert "to let them win, ingest the file under another name" in give("monday.csv", 10)
    give("monday-again.csv", 10)
    assert read_items(store).catalogue.features(np.array([7]))[0, 0] == 10


def test_the_catalogue_that_was_ingested_last_wins_though_the_clock_was_set_back(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        ahead = timedelta(hours=1)

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + cls.ahead

    monkeypatch.setattr("components.ingest.run.datetime", Clock)
    store.write_table("items/of-the-owner.parquet", ITEMS.empty_table())
    for author in (10, 20, 30):
        path = written(tmp_path / "items.csv", {"item_id": [7], "author_id": [author]})
        ingest(store, source="files", path=str(path), kind="items")
        assert read_items(store).catalogue.features(np.array([7]))[0, 0] == author
        Clock.ahead = timedelta(0)


def test_ids_are_exact_to_the_last_of_64_bits_even_beside_bad_ones(store: Storage, tmp_path: Path) -> None:
    big = [2**63 - 1, -(2**63), 2**53 + 1]
    rows = [{"user_id": str(i), "item_id": str(i), "timestamp": "1700000000"} for i in big]
    rows += [{"user_id": str(2**63), "item_id": "1", "timestamp": "1700000000"}]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = ingest(store, source="files", path=str(path), max_bad_share=0.5)
    assert sorted(events(store, "impressions").user_id) == sorted(big)
    assert result.quarantined == {"non_integer_user_id": 1}


@pytest.mark.parametrize("kind", COLUMNS)
def test_the_help_names_the_columns_of_each_kind_and_which_may_be_absent(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli(IngestConfig, run, ["--help"])
    shown = capsys.readouterr().out
    (told,) = re.findall(rf"^  {kind} +(.*?)(?=^  [a-z]|^$)", shown, re.MULTILINE | re.DOTALL)
    assert told.partition("[")[0].split()[: len(REQUIRED[kind])] == REQUIRED[kind]
    assert set(COLUMNS[kind].split()) <= set(re.findall(r"[a-z_]+", told))
