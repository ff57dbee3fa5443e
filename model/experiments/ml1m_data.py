"""MovieLens-1M, one history per user in a stable order, split leave-one-out: last item test, the one before validation.

The files have many equal timestamps; ratings of one second keep the order of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.errors import BadInput
from model.sequential import ItemHistories

Int64s = NDArray[np.int64]
SHORTEST = 4
"""Items of a user: two to learn from, one for validation, one for the test."""


@dataclass(frozen=True)
class Histories:
    """Users with their items (rows of the catalogue) and times (int64 seconds), oldest first; catalogue (V,) ids."""

    items: list[Int64s]
    times: list[Int64s]
    catalogue: Int64s

    def __len__(self) -> int:
        return len(self.items)


def read_histories(folder: Path) -> Histories:
    """All ratings of ratings.dat (`user::movie::rating::seconds`), none left out for its value.

    Raises BadInput if the file cannot be read or is malformed, or no user has enough ratings to be split.
    """
    path = folder / "ratings.dat"
    try:
        lines = path.read_text(encoding="latin-1").replace("::", " ")
        columns = np.array(lines.split(), dtype=np.int64).reshape(-1, 4)
    except OSError as error:
        raise BadInput(f"cannot read {path} ({error.strerror}); give the folder of MovieLens-1M") from error
    except ValueError as error:
        raise BadInput(f"{path} is no list of user::movie::rating::seconds; give the folder of MovieLens-1M") from error
    return group_by_user(columns[:, 0], columns[:, 1], columns[:, 3])


def group_by_user(user: Int64s, item: Int64s, seconds: Int64s) -> Histories:
    """From a log in file order. Users with fewer than SHORTEST items are left out."""
    order = np.lexsort([seconds, user])  # stable: the file's order among equal times
    user, item, seconds = user[order], item[order], seconds[order]
    starts = np.flatnonzero(np.r_[True, user[1:] != user[:-1]]) if len(user) else np.zeros(0, np.int64)
    catalogue, rows = np.unique(item, return_inverse=True)
    groups = zip(np.split(rows.reshape(-1), starts[1:]), np.split(seconds, starts[1:]), strict=True)
    kept = [(own, times) for own, times in groups if len(own) >= SHORTEST]
    if not kept:
        raise BadInput(f"no user has {SHORTEST} items; leave-one-out needs that many")
    return Histories([own for own, _ in kept], [times for _, times in kept], catalogue)


@dataclass(frozen=True)
class TrainBatch:
    """Histories without their last item, and the item that follows each of their items, wanted (T,)."""

    histories: ItemHistories
    wanted: Tensor


@dataclass(frozen=True)
class Question:
    """Histories of B users, the items that come next (B,), and what no user is offered: seen (user, item) pairs."""

    histories: ItemHistories
    wanted: Tensor
    seen: tuple[Tensor, Tensor]


def training_batches(data: Histories, size: int, max_length: int, seed: int, epoch: int) -> Iterator[TrainBatch]:
    """One pass over the users in random order, `size` at a time, the newest max_length + 1 training items of each."""
    order = np.random.default_rng([seed, epoch]).permutation(len(data))
    for start in range(0, len(order), size):
        users = order[start : start + size]
        parts = [slice(max(len(data.items[u]) - 2 - max_length - 1, 0), len(data.items[u]) - 2) for u in users]
        items = [data.items[u][part] for u, part in zip(users, parts, strict=True)]
        times = [data.times[u][part] for u, part in zip(users, parts, strict=True)]
        histories = ItemHistories.of([x[:-1] for x in items], [x[:-1] for x in times], [x[1:] for x in times])
        yield TrainBatch(histories, torch.from_numpy(np.concatenate([x[1:] for x in items])))


def questions(data: Histories, size: int, max_length: int, *, held_out: int) -> Iterator[Question]:
    """held_out = 2: the validation item after the training items; 1: the test item after these and the validation item.

    The target's time is known, the item not. Seen are all earlier items, those before the newest max_length too.
    Users come by length, so that a batch has little padding where a model pads.
    """
    order = np.argsort([len(items) for items in data.items], kind="stable")
    for start in range(0, len(order), size):
        users = order[start : start + size]
        ends = [len(data.items[u]) - held_out for u in users]
        firsts = [max(end - max_length, 0) for end in ends]
        spans = list(zip(users, firsts, ends, strict=True))
        histories = ItemHistories.of(
            [data.items[u][first:end] for u, first, end in spans],
            [data.times[u][first:end] for u, first, end in spans],
            [data.times[u][first + 1 : end + 1] for u, first, end in spans],
        )
        wanted = torch.tensor([int(data.items[u][end]) for u, _, end in spans])
        owner = torch.arange(len(users)).repeat_interleave(torch.tensor(ends))
        seen = torch.from_numpy(np.concatenate([data.items[u][:end] for u, _, end in spans]))
        yield Question(histories, wanted, (owner, seen))
