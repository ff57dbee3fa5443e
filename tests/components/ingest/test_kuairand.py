"""KuaiRand's files, as they are published."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from components.errors import BadInput
from components.schemas import ITEMS
from components.storage import Storage
from tests.components.ingest.cases import KUAIRAND_LOG, events, ingest, shared


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


@pytest.mark.parametrize(("play_ms", "bad"), [("1e300", {"too_large_play_time_ms": 1}), ("1e38", {})])
def test_no_play_time_stops_the_others(store: Storage, kuairand: Path, play_ms: str, bad: dict[str, int]) -> None:
    log = kuairand / "data" / "log_standard_4_22_to_5_08_pure.csv"
    log.write_text(KUAIRAND_LOG.replace("7200000", play_ms))
    result = ingest(store, source="kuairand", path=str(kuairand), max_bad_share=0.2)
    assert (result.impressions, result.quarantined) == (4 - len(bad), bad)
    acted = events(store, "actions")
    assert acted[acted.user_id == 9].timestamp.tolist() == [1651400000000000 + 1_800_000_000] * (1 - len(bad))


def test_missing_kuairand_columns_are_named(store: Storage, kuairand: Path) -> None:
    log = kuairand / "data" / "log_standard_4_22_to_5_08_pure.csv"
    log.write_text(KUAIRAND_LOG.replace("time_ms,is_click", "time,is_click"))
    with pytest.raises(BadInput, match="has no column time_ms; it has user_id, video_id"):
        ingest(store, source="kuairand", path=str(kuairand))
