"""MovieLens: ratings.dat with movies.dat (ml-1m, ml-10m) or u.data with u.item (ml-100k).

A rating is an impression and a `rating` action at the same time, and a like from `like_stars` stars on. Many ratings
share a second, so the order is declared: timestamp, then place in the file, which is added as microseconds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from components.errors import BadInput
from components.ingest.batch import Batch, Ints, actions_table, impressions_table, in_slice, items_table
from components.ingest.config import IngestConfig
from components.ingest.read import Raw, existing, pick, read_csv
from components.ingest.rows import Rows
from components.request_ids import request_ids

RATINGS = ("user_id", "item_id", "rating", "timestamp")
GENRES = (
    *("Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western", "IMAX"),
)
"""An item's category is the place (from 1) of its first genre in this list; 0 is none."""


def files(config: IngestConfig) -> list[Path]:
    path = existing(config.path)
    ratings = path if path.is_file() else pick(path, ["ratings.dat", "u.data"], "the ratings")[0]
    movies = ratings.with_name("movies.dat" if ratings.suffix == ".dat" else "u.item")
    return [ratings, movies] if movies.exists() else [ratings]


def load(config: IngestConfig, now_us: int) -> Batch:
    ratings, *movies = files(config)
    batch = Batch()
    _add_ratings(batch, ratings, config, now_us)
    if movies:
        _add_movies(batch, movies[0])
    return batch


def _add_ratings(batch: Batch, path: Path, config: IngestConfig, now_us: int) -> None:
    raw = read_csv(path, "::" if path.suffix == ".dat" else "\t", RATINGS, quoted=False)
    rows = Rows(raw.table, "impression", raw.source)
    user, item = rows.ids("user_id"), rows.ids("item_id")
    second = rows.times("timestamp", "s", now_us)
    stars = rows.numbers("rating")
    if not rows.good.any():
        raise BadInput(f"{path} holds no line of user, item, stars and seconds; give MovieLens' ratings.dat or u.data")
    inside = in_slice(second, config.from_us, config.until_us)
    copies = rows.copies(user, item, stars, second)
    time = second + order_within_second(second, rows.good & ~copies)
    batch.event_rows += int(inside.sum()) + raw.malformed.num_rows
    batch.duplicates += int((copies & inside).sum())
    batch.set_aside(raw.malformed, rows.bad(inside))
    keep = np.flatnonzero(rows.good & inside & ~copies)
    keep = keep[np.argsort(time[keep])]
    request = request_ids(user, item, second)
    batch.impressions = impressions_table(request[keep], user[keep], item[keep], time[keep])
    liked = keep[stars[keep] >= config.like_stars]
    batch.actions = pa.concat_tables(
        [
            actions_table(request[keep], user[keep], item[keep], time[keep], "rating", stars[keep]),
            actions_table(request[liked], user[liked], item[liked], time[liked], "like"),
        ]
    )


def order_within_second(second: Ints, counted: np.ndarray) -> Ints:
    """0, 1, 2, ... for the counted rows of each second in file order, 0 for the others."""
    order = np.zeros(len(second), dtype=np.int64)
    order[counted] = pd.Series(second[counted]).groupby(second[counted]).cumcount().to_numpy()
    return order


def _add_movies(batch: Batch, path: Path) -> None:
    if path.suffix == ".dat":
        raw = read_csv(path, "::", ("item_id", "title", "genres"), encoding="latin-1", quoted=False)
    else:
        flags = [f"genre_{i}" for i in range(19)]
        names = ("item_id", "title", "release", "video_release", "url", *flags)
        raw = read_csv(path, "|", names, encoding="latin-1", quoted=False)
    rows = Rows(raw.table, "item", raw.source)
    item = rows.ids("item_id")
    category = _first_genre(raw) if path.suffix == ".dat" else _first_flag(rows)
    good = rows.good
    batch.item_rows += raw.table.num_rows + raw.malformed.num_rows
    batch.set_aside(raw.malformed, rows.bad())
    batch.items = items_table(item[good], np.zeros(int(good.sum()), np.int64), category[good])


def _first_genre(raw: Raw) -> Ints:
    numbers = {name: number for number, name in enumerate(GENRES, start=1)}
    genres = raw.table["genres"].to_pylist()
    return np.array([numbers.get((text or "").split("|")[0], 0) for text in genres], dtype=np.int64)


def _first_flag(rows: Rows) -> Ints:
    """u.item has one 0/1 column per genre; the first of them means "unknown"."""
    flags = np.stack([rows.flags(f"genre_{i}") for i in range(1, 19)], axis=1)
    return np.where(flags.any(axis=1), flags.argmax(axis=1) + 1, 0)
