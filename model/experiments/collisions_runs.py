"""One seed of the experiment: collisionless against hashed ids, and what admission and expiry cost and save."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from model.experiments.collisions_data import (
    Bool,
    Int64,
    Ratings,
    Split,
    colliding,
    collision_rate,
    md5_modulo,
    modulus_for,
    split_by_time,
)
from model.experiments.collisions_model import Keep, Settings, stream, train
from model.metrics import auc
from model.table import EmbeddingTable

USER_RATE, MOVIE_RATE = 0.0773, 0.0286  # the paper's Table 1
MULTIPLES = (1, 2, 4)  # of those rates
TABLE_1 = {"users": 162_541, "movies": 59_047}  # distinct ids
TABLE_1_MODULUS = 10**6
THRESHOLDS = (1, 2, 5, 10, 20, 50)
DAY_US = 86_400_000_000
DAYS_TO_LIVE = (0, 365, 90, 30, 7, 1)  # 0 = for ever
TRAIN_SHARE, VALIDATION_SHARE = 0.8, 0.1
WARM_UP_SHARE = 0.2  # of the stream, before its scores count


@dataclass(frozen=True)
class Table1:
    """One column of the paper's Table 1, and the rows of our table for the same ids."""

    ids: int
    hashed: int
    rows: int


def table_1() -> dict[str, Table1]:
    """The paper's hashing of ids 0, 1, 2 ... recomputed."""
    columns = {}
    for name, count in TABLE_1.items():
        ids = np.arange(count, dtype=np.int64)
        table = EmbeddingTable(name, 1, optimizer="sgd")
        table.upsert(ids, np.zeros((count, 1), np.float32))
        columns[name] = Table1(count, len(np.unique(md5_modulo(ids, TABLE_1_MODULUS))), len(table))
    return columns


# Collisions


@dataclass(frozen=True)
class Arm:
    """A model trained with ids that collide at some rate (0 = collisionless)."""

    user_rate: float
    movie_rate: float
    user_rows: int
    movie_rows: int
    test_auc: float
    best_epoch: int
    affected: float  # share of test ratings whose user or movie shares its row with another
    affected_auc: float  # over those ratings; NaN for the collisionless arm
    affected_auc_collisionless: float  # of the collisionless arm over the same ratings


def arms(ratings: Ratings, settings: Settings, seed: int) -> dict[int, Arm]:
    """By multiple of the paper's rates: 0 (collisionless), then 1, 2 and 4. Seed, start and batches are the same.

    Which ids collide depends on the seed too, as the ids are salted with it.
    """
    split = split_by_time(ratings, TRAIN_SHARE, VALIDATION_SHARE)
    labels = split.test.label
    free = train(split, settings, seed)
    nan = float("nan")
    result = {
        0: Arm(0, 0, free.user_rows, free.movie_rows, auc(labels, free.test_scores), free.best_epoch, 0.0, nan, nan)
    }
    for multiple in MULTIPLES:
        users = _Hashing.of(ratings.user, multiple * USER_RATE, f"{seed}:")
        movies = _Hashing.of(ratings.movie, multiple * MOVIE_RATE, f"{seed}:")
        run = train(_hashed(split, users, movies), settings, seed)
        hit = users.shares(split.test.user) | movies.shares(split.test.movie)
        result[multiple] = Arm(
            users.rate, movies.rate, run.user_rows, run.movie_rows, auc(labels, run.test_scores), run.best_epoch,
            float(hit.mean()), auc(labels[hit], run.test_scores[hit]), auc(labels[hit], free.test_scores[hit]),
        )  # fmt: skip
    return result


@dataclass(frozen=True)
class _Hashing:
    ids: Int64  # [n] distinct, ascending
    hashed: Int64  # [n]

    @classmethod
    def of(cls, column: Int64, rate: float, salt: str) -> _Hashing:
        ids = np.unique(column)
        return cls(ids, md5_modulo(ids, modulus_for(ids, rate, salt), salt))

    @property
    def rate(self) -> float:
        return collision_rate(self.ids, self.hashed)

    def apply(self, column: Int64) -> Int64:
        return self.hashed[np.searchsorted(self.ids, column)]

    def shares(self, column: Int64) -> Bool:
        """Whether each id's row is another's too."""
        return np.isin(column, colliding(self.ids, self.hashed))


def _hashed(split: Split, users: _Hashing, movies: _Hashing) -> Split:
    parts = (split.train, split.validation, split.test)
    return Split(*(replace(part, user=users.apply(part.user), movie=movies.apply(part.movie)) for part in parts))


# Admission and expiry


@dataclass(frozen=True)
class Kept:
    """One pass along the log with some rule of admission or expiry."""

    auc: float  # of scores given before learning, after the warm-up
    tail_auc: float  # the same over the last tenth of the ratings, where the log is sparse in time
    mean_rows: float  # users and movies, mean over the batches after the warm-up
    peak_rows: int
    user_rows: int  # at the end
    movie_rows: int
    memory_bytes: int  # both tables with index and bookkeeping, at their largest


def admission(ratings: Ratings, settings: Settings, seed: int) -> dict[int, Kept]:
    """By admission threshold, in occurrences."""
    return {n: kept(ratings, settings, seed, Keep(admission_threshold=n)) for n in THRESHOLDS}


def expiry(ratings: Ratings, settings: Settings, seed: int) -> dict[int, Kept]:
    """By time to live, in days of event time since an id's last rating."""
    return {days: kept(ratings, settings, seed, Keep(ttl_us=days * DAY_US)) for days in DAYS_TO_LIVE}


def kept(ratings: Ratings, settings: Settings, seed: int, keep: Keep) -> Kept:
    """Streams the log once. The rule holds for users and movies alike."""
    run = stream(ratings, settings, seed, keep)
    warm, tail = int(len(ratings) * WARM_UP_SHARE), int(len(ratings) * (TRAIN_SHARE + VALIDATION_SHARE))
    rows = run.user_rows + run.movie_rows
    return Kept(
        auc=auc(ratings.label[warm:], run.scores[warm:]),
        tail_auc=auc(ratings.label[tail:], run.scores[tail:]),
        mean_rows=float(rows[warm // settings.stream_batch :].mean()),
        peak_rows=int(rows.max()),
        user_rows=int(run.user_rows[-1]),
        movie_rows=int(run.movie_rows[-1]),
        memory_bytes=int(run.memory_bytes.max()),
    )
