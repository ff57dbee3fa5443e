"""Ingest: every valid row enters the event log once, every bad one is set aside with its reason."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.config import cli
from components.errors import BadInput
from components.ingest.config import IngestConfig
from components.ingest.rows import Rows
from components.ingest.run import IngestResult, run
from components.schemas import ACTION_EVENTS, IMPRESSIONS, ITEMS, QUARANTINE, hash_id
from components.storage import Storage
from components.windows import from_us
from components.world.config import WorldConfig
from components.world.history import simulate_history
from components.world.record import record_world, recorded_world
from components.world.world import World

NOW_US = 1_700_000_000_000_000
WORLD = {"world_end": "2025-01-03T00:00:00Z", "world_users": 30, "world_items": 60, "world_impressions": 800}

KUAIRAND_LOG = """\
user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,\
duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab
712,5239,20220425,0,1650812741436,1,1,1,1,1,1,1,61802,49866,0,0,0,0,1
13414,6831,20220425,0,1650812934945,1,0,0,0,0,0,0,1184,11933,0,0,0,0,0
13414,6831,20220425,0,1650812934945,1,0,0,0,0,0,0,1184,11933,0,0,0,0,0
13414,17,20220425,0,1650812934945,0,0,0,0,0,0,0,0,11933,0,0,0,0,4
9,17,20220501,0,1651400000000,0,0,0,0,0,0,0,7200000,9000000,0,0,0,0,4
"""
KUAIRAND_VIDEOS = """\
video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,music_id,\
music_type,tag
5239,77,NORMAL,2022-04-10,LongImport,0.0,49866.0,720.0,1280.0,9155697141,9.0,"20,43"
6831,78,NORMAL,2022-04-10,LongImport,0.0,,720.0,1280.0,9155697141,,0
17,79,NORMAL,2022-04-10,LongImport,0.0,9000000.0,720.0,1280.0,9155697141,9.0,
"""


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/store")


@pytest.fixture
def kuairand(tmp_path: Path) -> Path:
    folder = tmp_path / "KuaiRand-Pure"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "log_standard_4_22_to_5_08_pure.csv").write_text(KUAIRAND_LOG)
    (folder / "data" / "video_features_basic_pure.csv").write_text(KUAIRAND_VIDEOS)
    return folder


def ingest(store: Storage, **fields: Any) -> IngestResult:
    return run(IngestConfig.model_validate({"root": store.root, **fields}))


def events(store: Storage, kind: str) -> pd.DataFrame:
    """All events of a kind in time order, times as UTC microseconds."""
    tables = [store.read_table(path) for path in store.list(f"events/{kind}")]
    frame = (pa.concat_tables(tables) if tables else pa.table({"timestamp": []})).to_pandas()
    for name in ("timestamp", "received_at"):
        if len(frame):
            frame[name] = frame[name].astype("datetime64[us, UTC]").astype("int64")
    return frame.sort_values(["timestamp", "request_id"]).reset_index(drop=True) if len(frame) else frame


def content(store: Storage) -> dict[str, bytes]:
    folders = ("events", "items", "ingests", "quarantine", "world")
    return {path: store.read_bytes(path) for folder in folders for path in store.list(folder)}


def shared(name: str) -> Path:
    folder = Path(os.environ.get("FRESHET_SHARED", Path(__file__).parents[3] / "shared")) / "data" / name
    if not folder.exists():
        pytest.skip(f"{name} is not at {folder}; set FRESHET_SHARED to the folder that holds data/{name}")
    return folder


# KuaiRand


def test_a_kuairand_row_is_an_impression_on_its_page_and_its_feedback_when_playing_ends(
    store: Storage, kuairand: Path
) -> None:
    result = ingest(store, source="kuairand", path=str(kuairand))
    shown, acted = events(store, "impressions"), events(store, "actions")
    assert shown[["user_id", "item_id", "timestamp", "page", "position"]].to_numpy().tolist() == [
        [712, 5239, 1650812741436000, 2, 0],
        *sorted(
            [[13414, 6831, 1650812934945000, 1, 0], [13414, 17, 1650812934945000, 5, 0]], key=lambda r: order(shown, r)
        ),
        [9, 17, 1651400000000000, 5, 0],
    ]
    first = acted[acted.user_id == 712]
    assert set(first.action) == {"click", "like", "long_view", "follow", "comment", "share", "dislike", "watch"}
    assert set(first.timestamp) == {1650812741436000 + 61_802_000}
    assert set(first.request_id) == {int(shown.request_id[0])}
    assert first[first.action == "watch"].value.tolist() == [61.802]
    assert acted[acted.user_id == 9].timestamp.tolist() == [1651400000000000 + 1_800_000_000]
    assert (result.duplicates, result.event_rows, result.quarantined) == (1, 5, {})
    assert (shown.received_at == shown.timestamp).all()


def order(shown: pd.DataFrame, row: list[int]) -> int:
    return int(shown[(shown.user_id == row[0]) & (shown.item_id == row[1])].index[0])


def test_kuairand_videos_become_items_with_author_first_tag_and_duration(store: Storage, kuairand: Path) -> None:
    ingest(store, source="kuairand", path=str(kuairand / "data"))
    table = store.read_table(store.list("items")[0])
    assert table.schema == ITEMS
    rows = table.select(["item_id", "author_id", "category", "duration_s"]).to_pylist()
    assert [list(row.values()) for row in rows] == [
        [5239, 77, 21, pytest.approx(49.866)],
        [6831, 78, 1, None],
        [17, 79, 0, pytest.approx(9000.0)],
    ]


def test_a_log_ingested_slice_by_slice_is_the_log_ingested_at_once(tmp_path: Path, kuairand: Path) -> None:
    whole, sliced = Storage(f"file://{tmp_path}/whole"), Storage(f"file://{tmp_path}/sliced")
    ingest(whole, source="kuairand", path=str(kuairand))
    ingest(sliced, source="kuairand", path=str(kuairand), until_time="2022-05-01")
    ingest(sliced, source="kuairand", path=str(kuairand), from_time="2022-05-01", until_time="2022-05-02")
    for kind in ("impressions", "actions"):
        keys = [
            name for name in events(whole, kind).columns if name in ("timestamp", "request_id", "item_id", "action")
        ]
        one, many = (events(s, kind).sort_values(keys).reset_index(drop=True) for s in (whole, sliced))
        pd.testing.assert_frame_equal(one, many)


def test_an_impression_logged_twice_with_different_feedback_stays_once_with_both(
    store: Storage, kuairand: Path
) -> None:
    log = kuairand / "data" / "log_standard_4_22_to_5_08_pure.csv"
    log.write_text(KUAIRAND_LOG + "13414,6831,20220425,0,1650812934945,1,1,0,0,0,0,0,1184,11933,0,0,0,0,0\n")
    ingest(store, source="kuairand", path=str(kuairand))
    shown, acted = events(store, "impressions"), events(store, "actions")
    assert len(shown[(shown.user_id == 13414) & (shown.item_id == 6831)]) == 1
    assert sorted(acted[(acted.user_id == 13414)].action) == ["click", "like", "watch"]


def test_all_parts_of_a_kuairand_log_are_read(store: Storage, kuairand: Path) -> None:
    header, *rows = KUAIRAND_LOG.splitlines(keepends=True)
    folder = kuairand / "data"
    (folder / "log_standard_4_22_to_5_08_pure.csv").write_text(header + "".join(rows[:2]))
    (folder / "log_standard_4_08_to_4_21_pure.csv").write_text(header + "".join(rows[3:]))
    assert ingest(store, source="kuairand", path=str(kuairand)).impressions == 4


def test_the_real_kuairand_log_is_read_to_the_last_row(store: Storage) -> None:
    result = ingest(store, source="kuairand", path=str(shared("KuaiRand-Pure")))
    assert result.event_rows == 185_061
    assert result.duplicates == 4_677
    assert result.impressions == 180_022
    assert result.item_rows == result.items == 7_583
    assert result.quarantined == {}
    assert result.impressions == sum(store.read_table(p).num_rows for p in store.list("events/impressions"))


# MovieLens


def ml_1m(folder: Path) -> Path:
    folder.mkdir()
    lines = ["2::10::5::978300760", "1::10::3::978300760", "1::11::4::978300760", "1::12::1::978300761"]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n")
    movies = ["10::Les Misérables (1995)::Drama|War", "11::Jumanji: 2 :: more (1995)::Comedy", "12::None::Odd"]
    (folder / "movies.dat").write_bytes("\n".join(movies[:1] + movies[2:]).encode("latin-1"))
    return folder


def test_movielens_ratings_are_impressions_with_a_rating_and_a_like_from_four_stars(
    store: Storage, tmp_path: Path
) -> None:
    ingest(store, source="movielens", path=str(ml_1m(tmp_path / "ml-1m")))
    acted = events(store, "actions")
    assert acted[acted.action == "rating"].value.tolist() == [5.0, 3.0, 4.0, 1.0]
    assert acted[acted.action == "like"].item_id.tolist() == [10, 11]
    items = store.read_table(store.list("items")[0]).to_pydict()
    assert (items["item_id"], items["category"]) == ([10, 12], [8, 0])


def test_ratings_of_one_second_keep_the_order_of_the_file(store: Storage, tmp_path: Path) -> None:
    ingest(store, source="movielens", path=str(ml_1m(tmp_path / "ml-1m")))
    shown = events(store, "impressions")
    start = 978300760_000000
    assert shown[["user_id", "item_id"]].to_numpy().tolist() == [[2, 10], [1, 10], [1, 11], [1, 12]]
    assert shown.timestamp.tolist() == [start, start + 1, start + 2, start + 1_000_000]


def test_movielens_100k_is_read_from_its_tab_separated_file(store: Storage, tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n186\t302\t5\t891717742\n")
    flags = ["0"] * 19
    flags[8] = flags[12] = "1"
    (tmp_path / "u.item").write_bytes(f"242|Kolya é (1996)|24-Jan-1997||http://x|{'|'.join(flags)}\n".encode("latin-1"))
    result = ingest(store, source="movielens", path=str(tmp_path), like_stars=5.0)
    assert (result.impressions, result.actions) == (2, {"like": 1, "rating": 2})
    assert store.read_table(store.list("items")[0])["category"].to_pylist() == [8]


def test_the_real_movielens_100k_is_read_to_the_last_row(store: Storage) -> None:
    result = ingest(store, source="movielens", path=str(shared("ml-100k")), until_time="1997-10-01")
    whole = pd.read_csv(shared("ml-100k") / "u.data", sep="\t", names=["user", "item", "stars", "time"])
    early = whole[whole.time < pd.Timestamp("1997-10-01", tz="UTC").timestamp()]
    assert result.impressions == len(early)
    assert result.actions == {"like": int((early.stars >= 4).sum()), "rating": len(early)}
    assert result.items == 1682


# any file


LOG = {
    "uid": ["a", "b", "a"],
    "sku": ["x", "y", "y"],
    "when": ["2024-01-01T00:00:00Z", "2024-01-01T01:00:00+01:00", "2024-01-02"],
    "clicked": [1, 0, 1],
    "seconds": [2.5, 0.0, None],
}
MAPPING = "user_id=uid,item_id=sku,timestamp=when,click=clicked,watch=seconds"


def written(path: Path, columns: Mapping[str, Any]) -> Path:
    frame = pd.DataFrame(columns)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pandas(frame), path)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)
    return path


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


def test_feedback_rows_are_an_impression_and_its_action(store: Storage, tmp_path: Path) -> None:
    path = written(tmp_path / "log.csv", {"user_id": [1, 1], "item_id": [7, 8], "timestamp": [1700000000, 1700000001]})
    result = ingest(store, source="files", path=str(path))
    assert (result.impressions, result.actions) == (2, {"like": 2})


def test_item_rows_become_the_catalogue(store: Storage, tmp_path: Path) -> None:
    path = written(tmp_path / "items.csv", {"sku": [7, 8], "brand": [3, None], "duration_s": [1.5, None]})
    result = ingest(store, source="files", path=str(path), kind="items", columns="item_id=sku,author_id=brand")
    items = store.read_table(store.list("items")[0]).to_pydict()
    assert (items["author_id"], items["duration_s"], result.items) == ([3, 0], [1.5, None], 2)


def test_ids_are_exact_to_the_last_of_64_bits_even_beside_bad_ones(store: Storage, tmp_path: Path) -> None:
    big = [2**63 - 1, -(2**63), 2**53 + 1]
    rows = [{"user_id": str(i), "item_id": str(i), "timestamp": "1700000000"} for i in big]
    rows += [{"user_id": str(2**63), "item_id": "1", "timestamp": "1700000000"}]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = ingest(store, source="files", path=str(path), max_bad_share=0.5)
    assert sorted(events(store, "impressions").user_id) == sorted(big)
    assert result.quarantined == {"non_integer_user_id": 1}


# bad rows and bad input


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


def test_a_larger_bad_share_can_be_allowed_afterwards(store: Storage, tmp_path: Path) -> None:
    columns = {"user_id": ["1", "x"], "item_id": [1, 2], "timestamp": [1700000000] * 2}
    path = str(written(tmp_path / "log.csv", columns))
    with pytest.raises(BadInput, match="nothing was ingested"):
        ingest(store, source="files", path=path)
    assert ingest(store, source="files", path=path, max_bad_share=0.5).impressions == 1


def truncated(path: Path) -> Path:
    written(path, LOG)
    path.write_bytes(path.read_bytes()[:-40])
    return path


def plain(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (lambda d: d / "nowhere", {"source": "kuairand"}, "nowhere does not exist; set --path"),
        (lambda d: "", {"source": "files"}, "no path given; set --path"),
        (lambda d: d, {"source": "kuairand"}, r"has no log_standard_\*\.csv"),
        (lambda d: d, {"source": "movielens"}, r"has no ratings\.dat or u\.data"),
        (lambda d: d, {"source": "files"}, r"holds no file ending in \.parquet"),
        (lambda d: plain(d / "log.xls", "x"), {"source": "files"}, "is of no known format"),
        (lambda d: plain(d / "log.csv", ""), {"source": "files"}, r"log\.csv is empty"),
        (lambda d: plain(d / "log.csv", "user_id,item_id,timestamp\n"), {"source": "files"}, "has no rows"),
        (lambda d: plain(d / "log.jsonl", "\n"), {"source": "files"}, "has no rows"),
        (lambda d: plain(d / "u.data", ""), {"source": "movielens"}, "is empty"),
        (lambda d: plain(d / "u.data", "a,b,c\nd,e,f\n"), {"source": "movielens"}, "holds no line of user, item"),
        (lambda d: truncated(d / "log.parquet"), {"source": "files"}, "not a readable Parquet file, maybe truncated"),
        (lambda d: plain(d / "log.parquet", "no parquet"), {"source": "files"}, "not a readable Parquet file"),
        (
            lambda d: plain(d / "log.csv", "uid,item_id\n1,2\n"),
            {"source": "files"},
            "has no column user_id, timestamp; it has uid, item_id",
        ),
        (
            lambda d: plain(d / "log.csv", "user_id,item_id,timestamp\n1,2,3\n"),
            {"source": "files", "columns": "uid=user_id"},
            "--columns maps uid, but rows of kind feedback have only user_id",
        ),
        (
            lambda d: plain(d / "log.csv", "user_id,item_id,timestamp\n1,2,3\n"),
            {"source": "files", "columns": "user_id"},
            "--columns has 'user_id'; write it as name=name",
        ),
        (
            lambda d: plain(d / "log.csv", "user_id,item_id,timestamp,action\n1,2,1700000000,buy\n"),
            {"source": "files", "action_names": "buy=purchase"},
            "--action-names maps to purchase; known actions are click",
        ),
        (
            lambda d: plain(d / "log.csv", "user_id,item_id,timestamp\n1,2,1700000000\n"),
            {"source": "files", "from_time": "2024-01-01"},
            "no event lies in",
        ),
    ],
)
def test_bad_input_is_refused_with_what_is_wrong_and_what_to_do(
    store: Storage, tmp_path: Path, make: Any, fields: dict[str, str], message: str
) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    with pytest.raises(BadInput, match=message):
        ingest(store, path=str(make(folder)), **fields)
    assert store.list("events") == []


def test_missing_kuairand_columns_are_named(store: Storage, kuairand: Path) -> None:
    log = kuairand / "data" / "log_standard_4_22_to_5_08_pure.csv"
    log.write_text(KUAIRAND_LOG.replace("time_ms,is_click", "time,is_click"))
    with pytest.raises(BadInput, match="has no column time_ms; it has user_id, video_id"):
        ingest(store, source="kuairand", path=str(kuairand))


def test_a_time_that_is_none_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(IngestConfig, run, ["--from-time=yesterday"]) == 2
    assert "is not a time; write it like" in capsys.readouterr().err


# synthetic


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


def test_the_world_is_recorded_for_its_live_users(store: Storage) -> None:
    ingest(store, **WORLD)
    recorded = WorldConfig.model_validate_json(store.read_bytes("world/config.json"))
    assert recorded == WorldConfig.model_validate(WORLD)


def test_ingesting_a_world_without_a_given_end_again_changes_nothing_even_later(store: Storage) -> None:
    endless = {**WORLD, "world_end": ""}
    first = ingest(store, **endless)
    recorded = store.read_json("world/config.json")
    earlier = {**recorded, "world_end": "2025-01-03T00:00:00+00:00"}  # as if recorded at another time
    assert ingest(store, **endless) == first
    other = Storage(f"{store.root}/other")
    other.write_bytes("world/config.json", json.dumps(earlier).encode())
    last = ingest(other, **endless).last_event
    assert last is not None and last < datetime(2025, 1, 3, tzinfo=UTC)
    assert store.read_json("world/config.json") == recorded


def test_a_second_world_in_one_root_is_refused_and_the_live_settings_of_the_first_stand(store: Storage) -> None:
    first = ingest(store, **WORLD)
    live = WorldConfig.model_validate({**WORLD, "world_shift_at": "2025-01-04T00:00:00Z", "world_day_s": 600})
    record_world(store, live, replace=True)
    assert ingest(store, **WORLD) == first
    assert recorded_world(store) == live
    with pytest.raises(BadInput, match="already holds a synthetic world that differs in world_seed; use"):
        ingest(store, **WORLD, world_seed=8)


def test_a_world_without_a_given_end_ends_where_the_slice_ends(store: Storage) -> None:
    ingest(store, **{**WORLD, "world_end": ""}, until_time="2025-02-01T00:00:00Z")
    assert store.read_json("world/config.json")["world_end"] == "2025-02-01T00:00:00+00:00"


# the event log


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


# parsing


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.none()), max_size=30), st.booleans())
def test_integer_ids_survive_any_column_type(values: list[int | None], as_text: bool) -> None:
    column = pa.array([None if v is None else str(v) for v in values] if as_text else values)
    column = column.cast(pa.string() if as_text else pa.int64())
    rows = Rows(pa.table({"id": column}), "impression", "test")
    parsed = rows.ids("id")
    assert [int(v) for v, ok in zip(parsed, rows.good, strict=True) if ok] == [v for v in values if v is not None]
    assert Counter(rows.bad()["reason"].to_pylist()) == Counter(["missing_id"] * values.count(None))


@settings(deadline=None)
@given(st.lists(st.text(max_size=8), max_size=20))
def test_any_text_is_an_id_or_a_reason_and_never_a_crash(values: list[str]) -> None:
    rows = Rows(pa.table({"x": pa.array(values, pa.string())}), "impression", "test")
    ids = rows.ids("x")
    for value, parsed, good in zip(values, ids, rows.good, strict=True):
        if good:
            assert float(value.strip()) == parsed  # strip and not float alone: float refuses '0\x1f'
    for read in (lambda r: r.numbers("x"), lambda r: r.times("x", "iso", NOW_US), lambda r: r.times("x", "ms", NOW_US)):
        fresh = Rows(rows.table, "impression", "test")
        read(fresh)
        assert len(fresh.bad()) == int((~fresh.good).sum())


@settings(deadline=None)
@given(st.lists(st.integers(631_152_000_000_000, NOW_US), min_size=1, max_size=20), st.sampled_from(["us", "iso"]))
def test_times_are_read_exactly_to_the_microsecond(times: list[int], unit: str) -> None:
    texts = [str(t) if unit == "us" else from_us(t).isoformat() for t in times]
    rows = Rows(pa.table({"t": texts}), "impression", "test")
    assert rows.times("t", unit, NOW_US).tolist() == times
    assert rows.good.all()
