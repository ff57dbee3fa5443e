"""Stochastic length (arXiv 2402.17152, equation 4): train on subsequences of long histories, serve on all of it.

A user with n <= N^(alpha / 2) interactions keeps them all. A longer one keeps the full sequence with probability
N^alpha / n^2, and else a subsequence of N^(alpha / 2) interactions. So attention costs O(N^alpha) per user.
What is drawn is a function of (seed, epoch, user, n): the same in any batch, and after a restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from components.errors import BadInput
from model.catalogue import Int64s
from model.events import UserEvents
from model.hashing import uniform
from model.settings import ModelConfig, Selection

SELECTIONS: tuple[str, ...] = get_args(Selection)
_LENGTH, _SELECTION = 1, 2  # different draws for whether and for what


@dataclass(frozen=True)
class StochasticLength:
    """The rule. limit: N, the newest interactions that are read at all; alpha in (1, 2], 2 = keep all of these.

    selection: which are kept, "weighted" (by age), "greedy" (the newest) or "uniform". BadInput for other values.
    """

    limit: int
    alpha: float = 2.0
    selection: str = "weighted"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit < 1 or not 1 < self.alpha <= 2:
            raise BadInput(
                "stochastic length needs a limit of at least 1 and an alpha above 1 and at most 2, "
                f"got {self.limit} and {self.alpha}"
            )
        if self.selection not in SELECTIONS:
            raise BadInput(f"unknown selection {self.selection!r}; use one of {', '.join(SELECTIONS)}")

    @classmethod
    def of(cls, config: ModelConfig) -> StochasticLength | None:
        """The rule of a model's settings; None when training reads whole histories."""
        if not config.max_interactions:
            return None
        return cls(config.max_interactions, config.stochastic_alpha, config.stochastic_selection, config.seed)

    @property
    def short(self) -> int:
        """N^(alpha / 2): the length of a subsequence."""
        return max(1, int(self.limit ** (self.alpha / 2) + 1e-9))

    def shortens(self, counts: Int64s) -> NDArray[np.bool_]:
        """(users,) whether it is chance what an epoch reads of so many interactions."""
        return np.minimum(counts, self.limit) > self.short

    def lengths(self, counts: Int64s, user_id: Int64s, epoch: int) -> Int64s:
        """(users,) interactions before -> after."""
        n = np.minimum(counts, self.limit)
        full = np.minimum(1.0, self.limit**self.alpha / np.maximum(n, 1).astype(np.float64) ** 2)
        whole = (n <= self.short) | (uniform(self.seed, _LENGTH, epoch, user_id, counts) < full)
        return np.where(whole, n, self.short)

    def cut(self, user: UserEvents, epoch: int, *, keep_new: bool) -> UserEvents:
        """The user's interactions of this epoch. keep_new: drop from the context alone, never what is to be learned.

        Action events stay with their interaction; the auxiliary series stays whole.
        """
        return self.cut_all([user], epoch, keep_new=keep_new)[0]

    def cut_all(self, users: list[UserEvents], epoch: int, *, keep_new: bool) -> list[UserEvents]:
        """`cut` for each of several users. BadInput for interactions that are not in order of time."""
        if any((np.diff(user.timestamp) < 0).any() for user in users):
            raise BadInput("stochastic length needs interactions in order of time; sort by (timestamp, request_id)")
        counts = np.array([len(user) for user in users], dtype=np.int64)
        ids = np.array([user.user_id for user in users], dtype=np.int64)
        kept = self.lengths(counts, ids, epoch).tolist()
        return [
            user if keep == len(user) else self._cut(user, keep, epoch, keep_new)
            for user, keep in zip(users, kept, strict=True)
        ]

    def _cut(self, user: UserEvents, keep: int, epoch: int, keep_new: bool) -> UserEvents:
        count = len(user)
        first = user.new_from if keep_new else count
        wanted = max(keep - (count - first), 0)
        newest = np.arange(max(first - max(self.limit - (count - first), 0), 0), first)
        chosen = newest if wanted >= len(newest) else newest[self._select(user, newest, wanted, epoch)]
        places = np.concatenate([chosen, np.arange(first, count)])
        return user.take(places, int(np.searchsorted(places, user.new_from)))

    def _select(self, user: UserEvents, places: Int64s, wanted: int, epoch: int) -> Int64s:
        """Ascending indices into places."""
        if self.selection == "greedy":
            return np.arange(len(places) - wanted, len(places))
        weights = np.ones(len(places))
        if self.selection == "weighted":
            weights = age_weights(user.timestamp[places])
        draw = uniform(self.seed, _SELECTION, epoch, user.user_id, len(user), places)
        order = np.argsort(_race(draw, weights), kind="stable")
        return np.sort(order[:wanted])


def age_weights(timestamp: Int64s) -> NDArray[np.float64]:
    """1 - f_i / sum(f) with f_i = t_n - t_i, the time since the interaction: newer ones are likelier to be kept."""
    age = (timestamp.max(initial=0) - timestamp).astype(np.float64)
    total = age.sum()
    return 1.0 - age / total if total > 0 else np.ones(len(age))


def _race(draw: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential arrival times: the first k are a weighted sample without replacement (Efraimidis and Spirakis)."""
    return -np.log1p(-draw) / np.maximum(weights, 1e-300)
