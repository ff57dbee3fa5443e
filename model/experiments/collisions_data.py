"""MovieLens ratings as a log in time order, its split by time, and the hashing that makes ids collide."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from components.errors import BadInput

POSITIVE = 4  # a rating of at least this is a positive
SECOND_US = 1_000_000

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Ratings:
    """Ratings in the order (time, user, movie), one array per column."""

    user: Int64  # [n]
    movie: Int64  # [n]
    genres: Float32  # [n, genres]: the movie's genres, each 1 / their number; zeros where it has none
    time: Int64  # [n], UTC microseconds
    label: Float32  # [n], 1 = rating >= 4

    def __len__(self) -> int:
        return len(self.user)

    def rows(self, chosen: Int64 | Bool | slice) -> Ratings:
        """The ratings at these places."""
        return Ratings(
            self.user[chosen], self.movie[chosen], self.genres[chosen], self.time[chosen], self.label[chosen]
        )


@dataclass(frozen=True)
class Split:
    """Ratings before the first cut, from there to the second, and after it."""

    train: Ratings
    validation: Ratings
    test: Ratings


def read_ratings(folder: Path) -> Ratings:
    """MovieLens-1M's ratings.dat and movies.dat (`a::b::c` lines). BadInput if one is absent or malformed."""
    columns = _read_columns(folder / "ratings.dat")
    user, movie, rating, seconds = columns[:, np.lexsort((columns[1], columns[0], columns[3]))]
    if rating.min() < 1 or rating.max() > 5:
        raise BadInput(f"{folder}/ratings.dat has ratings outside 1 to 5; give the folder of MovieLens-1M")
    catalogue, genres = _read_genres(folder / "movies.dat")
    place = np.searchsorted(catalogue, movie).clip(max=len(catalogue) - 1)
    known = catalogue[place] == movie
    return Ratings(
        user=user,
        movie=movie,
        genres=np.where(known[:, None], genres[place], np.float32(0)),
        time=seconds * SECOND_US,
        label=(rating >= POSITIVE).astype(np.float32),
    )


def split_by_time(ratings: Ratings, train: float, validation: float) -> Split:
    """Cuts at the times of the ratings at those shares of the log, so that equal times stay together.

    BadInput if a part lacks positives or negatives.
    """
    first, second = (ratings.time[int(len(ratings) * share)] for share in (train, train + validation))
    cuts = np.searchsorted(ratings.time, [first, second])
    parts = [ratings.rows(slice(*ends)) for ends in ((0, cuts[0]), (cuts[0], cuts[1]), (cuts[1], len(ratings)))]
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        if not len(part) or not 0 < part.label.mean() < 1:
            raise BadInput(f"the {name} part lacks positives or negatives; give a longer log")
    return Split(*parts)


# Hashing


def md5_modulo(ids: Int64, modulus: int, salt: str = "") -> Int64:
    """int(md5(salt + str(id))) % modulus of each id: with no salt the hashing behind Monolith's Table 1 (2.3.1)."""
    return _modulo(_digests(ids, salt), modulus)


def collision_rate(before: Int64, after: Int64) -> float:
    """1 - distinct ids after hashing / distinct ids before, as the paper counts it."""
    return 1 - len(np.unique(after)) / len(np.unique(before))


def modulus_for(ids: Int64, rate: float, salt: str = "") -> int:
    """The modulus for which `md5_modulo` of these distinct ids collides at the rate, as nearly as any near it.

    Looks at 41 moduli within 2 % of the one that gives the rate in expectation; of equally good ones the smallest.
    BadInput for fewer than two ids.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must be above 0 and below 1, got {rate}")
    if len(ids) < 2:
        raise BadInput("one id collides with none; give a log of several users and movies")
    digests, centre = _digests(ids, salt), _expected_modulus(len(ids), rate)
    step = max(1, centre // 1000)
    moduli = [m for m in range(centre - 20 * step, centre + 20 * step + 1, step) if m > 0]
    errors = [abs(1 - len(np.unique(_modulo(digests, modulus))) / len(ids) - rate) for modulus in moduli]
    return moduli[int(np.argmin(errors))]


def colliding(ids: Int64, hashed: Int64) -> Int64:
    """The ids (of distinct ones) that share their hash with another."""
    _, place, counts = np.unique(hashed, return_inverse=True, return_counts=True)
    return ids[counts[place] > 1]


def _digests(ids: Int64, salt: str) -> NDArray[np.uint64]:
    """[n, 2]: high and low half of each id's MD5."""
    raw = b"".join(hashlib.md5(f"{salt}{i}".encode(), usedforsecurity=False).digest() for i in ids.tolist())
    return np.frombuffer(raw, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _modulo(digests: NDArray[np.uint64], modulus: int) -> Int64:
    """A 128-bit remainder by halves; a modulus below 2^31 keeps the product inside 64 bits."""
    if not 0 < modulus < 2**31:
        raise ValueError(f"modulus must be above 0 and below 2**31, got {modulus}")
    m, high_unit = np.uint64(modulus), np.uint64(2**64 % modulus)
    return ((digests[:, 0] % m * high_unit + digests[:, 1] % m) % m).astype(np.int64)


def _expected_modulus(ids: int, rate: float) -> int:
    """m with 1 - m (1 - (1 - 1/m)^ids) / ids = rate, by bisection (the left side falls with m)."""
    low, high = 1.0, ids / rate  # a rate is at most about ids / 2m
    for _ in range(64):
        m = (low + high) / 2
        expected = 1 + m * math.expm1(ids * math.log1p(-1 / m)) / ids
        low, high = (m, high) if expected > rate else (low, m)
    return max(1, round(high))


# Files


def _read_columns(path: Path) -> Int64:
    """[4, n]: the integers of `a::b::c::d` lines."""
    names = ["user", "_1", "movie", "_2", "rating", "_3", "seconds"]
    options = {
        "read_options": pa.csv.ReadOptions(column_names=names),
        "parse_options": pa.csv.ParseOptions(delimiter=":"),
        "convert_options": pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names[::2], pa.int64()), include_columns=names[::2]
        ),
    }
    try:
        table = pa.csv.read_csv(path, **options)
    except (OSError, pa.ArrowInvalid) as error:
        raise BadInput(f"cannot read ratings ({error}); give the folder of MovieLens-1M, with {path.name}") from error
    return np.stack([table[name].to_numpy() for name in names[::2]])


def _read_genres(path: Path) -> tuple[Int64, Float32]:
    """Movie ids in order, and [movies, genres]: each row's genres share 1 among them."""
    if not path.is_file():
        raise BadInput(f"no {path.name} in {path.parent}; give the folder of MovieLens-1M")
    lines = [line.split("::") for line in path.read_text("latin-1").splitlines() if line]
    try:
        genres_of = {int(line[0]): line[2].split("|") for line in lines}
    except (IndexError, ValueError) as error:
        raise BadInput(f"{path} has a line that is not `id::title::genre|genre` ({error})") from error
    names = sorted({genre for genres in genres_of.values() for genre in genres})
    place = {name: i for i, name in enumerate(names)}
    shares = np.zeros((len(genres_of), len(names)), np.float32)
    for row, movie in enumerate(sorted(genres_of)):
        shares[row, [place[genre] for genre in genres_of[movie]]] = 1 / len(genres_of[movie])
    return np.array(sorted(genres_of), dtype=np.int64), shares
