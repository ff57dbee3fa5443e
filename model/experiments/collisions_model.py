"""DeepFM over embedding tables, trained in epochs with early stopping or in one pass along the stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from model.experiments.collisions_data import Int64, Ratings, Split
from model.metrics import auc
from model.table import EmbeddingTable

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    """Of the model and its training."""

    dim: int = 16
    hidden: tuple[int, ...] = (64, 32)
    dense_learning_rate: float = 1e-3  # Adam
    table_learning_rate: float = 0.1  # Adagrad, on the gradient of the summed loss
    initial_accumulator: float = 1.0
    batch: int = 1024
    epochs: int = 12  # at most
    patience: int = 2  # epochs without a better validation AUC before training stops
    stream_batch: int = 256


@dataclass(frozen=True)
class Keep:
    """Which ids the user and the movie table give a row, and for how long."""

    admission_threshold: int = 1  # occurrences
    ttl_us: int = 0  # event time since the last update; 0 = for ever


class DeepFM(torch.nn.Module):
    """Guo et al. 2017, equations 1 to 4, over the fields user, movie and genres (the mean of the movie's).

    A table's row is the first-order weight and the `dim` factors of its id: float32 [1 + dim].
    """

    def __init__(self, settings: Settings, genres: int, seed: int, keep: Keep = Keep()) -> None:
        super().__init__()
        torch.manual_seed(seed)

        def table(slot: str, keep: Keep) -> EmbeddingTable:
            return EmbeddingTable(
                slot,
                1 + settings.dim,
                learning_rate=settings.table_learning_rate,
                initial_accumulator=settings.initial_accumulator,
                seed=seed,
                admission_threshold=keep.admission_threshold,
                ttl_us=keep.ttl_us,
                sweep_steps=1,  # a step of the stream can be weeks: all that has expired goes at once
            )

        self.user, self.movie, self.genre = table("user", keep), table("movie", keep), table("genre", Keep())
        self.register_buffer("genre_ids", torch.arange(genres))
        self.bias = torch.nn.Parameter(torch.zeros(()))
        layers: list[torch.nn.Module] = []
        widths = (3 * settings.dim, *settings.hidden)
        for width, following in pairwise(widths):
            layers += [torch.nn.Linear(width, following), torch.nn.ReLU()]
        self.deep = torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], 1))
        self.dense = torch.optim.Adam(self.parameters(), lr=settings.dense_learning_rate)

    def forward(self, ratings: Ratings) -> torch.Tensor:
        """Log-odds of a positive, float32 [n]."""
        genres_NG = torch.from_numpy(ratings.genres)
        rows_NFE = torch.stack(
            [
                self.user(torch.from_numpy(ratings.user)),
                self.movie(torch.from_numpy(ratings.movie)),
                genres_NG @ self.genre(self.genre_ids),
            ],
            dim=1,
        )
        first_order_N = rows_NFE[:, :, 0].sum(1)
        factors_NFD = rows_NFE[:, :, 1:]
        pairs_N = (factors_NFD.sum(1).square() - factors_NFD.square().sum(1)).sum(1) / 2
        return self.bias + first_order_N + pairs_N + self.deep(factors_NFD.flatten(1)).squeeze(1)

    def learn(self, ratings: Ratings, now_us: int = 0) -> Scores:
        """One step on a batch; returns the log-odds [n] that the model gave it before the step."""
        logits = self(ratings)
        self.dense.zero_grad()
        # A sum: the gradient of a row is that of its ratings, whatever the batch size; Adam does not see the scale.
        torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(ratings.label), reduction="sum"
        ).backward()
        self.dense.step()
        for table in (self.user, self.movie, self.genre):
            table.step(now_us=now_us)
        return logits.detach().numpy()

    def score(self, ratings: Ratings, batch: int = 8192) -> Scores:
        """Log-odds [n]; changes nothing."""
        with torch.no_grad():
            starts = range(0, len(ratings), batch)
            return np.concatenate([self(ratings.rows(slice(i, i + batch))).numpy() for i in starts])


@dataclass
class Trained:
    """A run with early stopping."""

    test_scores: Scores  # [test], at the epoch with the best validation AUC
    validation_auc: list[float] = field(default_factory=list)  # per epoch
    user_rows: int = 0
    movie_rows: int = 0

    @property
    def best_epoch(self) -> int:
        """1-based."""
        return int(np.argmax(self.validation_auc)) + 1


def train(split: Split, settings: Settings, seed: int) -> Trained:
    """Shuffled epochs over the train part until validation has not improved for `patience` of them.

    The order of the batches and the dense start depend on the seed alone, so that arms of a seed are paired.
    """
    model = DeepFM(settings, split.train.genres.shape[1], seed)
    shuffled = np.random.default_rng(seed)
    run = Trained(np.empty(0, np.float32))
    for epoch in range(settings.epochs):
        order: Int64 = shuffled.permutation(len(split.train))
        for start in range(0, len(order), settings.batch):
            model.learn(split.train.rows(order[start : start + settings.batch]))
        run.validation_auc.append(auc(split.validation.label, model.score(split.validation)))
        if run.best_epoch == epoch + 1:  # chosen by validation alone; only then is the test part looked at
            run.test_scores = model.score(split.test)
        elif epoch + 1 - run.best_epoch >= settings.patience:
            break
    run.user_rows, run.movie_rows = len(model.user), len(model.movie)
    return run


@dataclass(frozen=True)
class Streamed:
    """One pass along the log, every batch scored before it is learned from."""

    scores: Scores  # [n]
    user_rows: Int64  # [batches], after each batch
    movie_rows: Int64  # [batches]
    memory_bytes: Int64  # [batches]: of both tables


def stream(ratings: Ratings, settings: Settings, seed: int, keep: Keep) -> Streamed:
    """The log in its order, in batches whose event time is that of their newest rating."""
    model = DeepFM(settings, ratings.genres.shape[1], seed, keep)
    scores, sizes = [], []
    for start in range(0, len(ratings), settings.stream_batch):
        batch = ratings.rows(slice(start, start + settings.stream_batch))
        scores.append(model.learn(batch, now_us=int(batch.time[-1])))
        for table in (model.user, model.movie):
            table.drop_tombstones(table.advance_epoch())  # as if every reader had each batch's changes
        stats = [table.stats() for table in (model.user, model.movie)]
        memory = sum(s["row_bytes"] + s["overhead_bytes"] for s in stats)
        sizes.append((len(model.user), len(model.movie), memory))
    return Streamed(np.concatenate(scores), *np.array(sizes, dtype=np.int64).T)
