"""Side features of items: author, category and a duration bucket."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from components.errors import BadInput

Int64s = NDArray[np.int64]
DURATION_BUCKETS = 32
"""0 = unknown, otherwise 1 + floor(2 * log2(1 + seconds)), at most 31."""


def log_bucket(value: NDArray[np.floating], largest: int) -> Int64s:
    """1 + floor(2 * log2(1 + value)) limited to [1, largest]; 0 where the value is missing (NaN) or not positive."""
    known = np.nan_to_num(np.asarray(value, dtype=np.float64), nan=0.0)
    bucket = 1 + np.floor(2 * np.log2(1 + np.maximum(known, 0.0))).astype(np.int64)
    return np.where(known > 0, np.minimum(bucket, largest), 0).astype(np.int64)


def int64_ids(ids: ArrayLike, what: str) -> Int64s:
    """Ids as int64. Raises BadInput for numbers that a cast could merge: floats, uint64, objects."""
    given = np.asarray(ids)
    if given.size and not np.can_cast(given.dtype, np.int64):
        raise BadInput(f"{what} are {given.dtype}; ids are whole numbers of at most 64 bits: give int64")
    return given.astype(np.int64)


class ItemCatalogue:
    """item_id -> (author_id, category, duration bucket). An unknown item has zeros: 'none'."""

    def __init__(self, item_id: Int64s, author_id: Int64s, category: Int64s, duration_s: NDArray[np.float32]) -> None:
        """Arrays of equal length; a later entry replaces an earlier one of the same item.

        Raises BadInput for ids that are no int64, and for arrays that do not fit together.
        """
        ids, authors, categories = (
            int64_ids(item_id, "items"),
            int64_ids(author_id, "authors"),
            int64_ids(category, "categories"),
        )
        if not len(ids) == len(authors) == len(categories) == len(duration_s):
            raise BadInput(f"{len(ids)} items need an author, a category and a duration each")
        unique, last = np.unique(ids[::-1], return_index=True)
        place = len(ids) - 1 - last
        self.item_id: Int64s = unique
        self._features = np.zeros((len(unique) + 1, 3), dtype=np.int64)  # the last row is the unknown item
        self._features[:-1, 0] = authors[place]
        self._features[:-1, 1] = categories[place]
        self._features[:-1, 2] = log_bucket(np.asarray(duration_s)[place], DURATION_BUCKETS - 1)

    @classmethod
    def empty(cls) -> ItemCatalogue:
        """A catalogue that knows no item."""
        none = np.zeros(0, dtype=np.int64)
        return cls(none, none, none, np.zeros(0, dtype=np.float32))

    @classmethod
    def from_table(cls, table: pa.Table) -> ItemCatalogue:
        """From a table of the `items` schema, oldest rows first."""
        names = ("item_id", "author_id", "category", "duration_s")
        return cls(*(table[name].fill_null(0).to_numpy() for name in names))

    def __len__(self) -> int:
        return len(self.item_id)

    def features(self, item_id: Int64s) -> Int64s:
        """(n,) ids -> (n, 3) int64: author id, category, duration bucket."""
        place = np.searchsorted(self.item_id, item_id)
        place = np.minimum(place, max(len(self.item_id) - 1, 0))
        if not len(self.item_id):
            return np.zeros((len(item_id), 3), dtype=np.int64)
        known = self.item_id[place] == item_id
        return self._features[np.where(known, place, len(self.item_id))]
