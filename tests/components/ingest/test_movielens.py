"""MovieLens' files, as they are published."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from components.storage import Storage
from tests.components.ingest.cases import events, ingest, shared


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
