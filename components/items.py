"""The items of the item log, items/*.parquet: side features, and when each item is available."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from model.catalogue import Int64s, ItemCatalogue

_ALWAYS = np.iinfo(np.int64)


class Items:
    """One immutable view of the log."""

    def __init__(self, table: pa.Table) -> None:
        """table: of the schema ITEMS, later rows win."""
        self.catalogue = ItemCatalogue.from_table(table)
        ids = table["item_id"].to_numpy()
        unique, last = np.unique(ids[::-1], return_index=True)
        place = len(ids) - 1 - last
        self.item_id: Int64s = unique  # ascending
        self._from = _times(table["available_from"], _ALWAYS.min)[place]
        self._until = _times(table["available_until"], _ALWAYS.max)[place]

    def __len__(self) -> int:
        return len(self.item_id)

    def available(self, first_us: int, last_us: int) -> Int64s:
        """Ascending ids of the items that are available at some time of [first, last]: of [from, until) of theirs."""
        return self.item_id[(self._from <= last_us) & (first_us < self._until)]


def _times(column: pa.ChunkedArray, missing: int) -> NDArray[np.int64]:
    return column.cast(pa.int64()).fill_null(missing).to_numpy()
