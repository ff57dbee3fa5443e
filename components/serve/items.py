"""The items that can be recommended now."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.errors import BadInput
from components.schemas import ITEMS
from components.storage import Storage
from model.catalogue import Int64s, ItemCatalogue

_ALWAYS = np.iinfo(np.int64)
log = logging.getLogger("freshet.serve.items")


class Items:
    """One immutable view of items/: side features, and when each item is available."""

    def __init__(self, table: pa.Table) -> None:
        """table: of the `items` schema, later rows win."""
        self.catalogue = ItemCatalogue.from_tables([table])
        ids = table["item_id"].to_numpy()
        unique, last = np.unique(ids[::-1], return_index=True)
        place = len(ids) - 1 - last
        self.item_id: Int64s = unique
        self._from = _times(table["available_from"], _ALWAYS.min)[place]
        self._until = _times(table["available_until"], _ALWAYS.max)[place]

    def __len__(self) -> int:
        return len(self.item_id)

    def available(self, now_us: int) -> Int64s:
        """Ascending ids of the items with available_from <= now < available_until."""
        return self.item_id[(self._from <= now_us) & (now_us < self._until)]


class ItemFolder:
    """Follows items/*.parquet."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._tables: dict[str, pa.Table] = {}
        self.items = Items(ITEMS.empty_table())

    def refresh(self) -> bool:
        """Read files that are new; True when the items changed. An unreadable file is reported and left out."""
        paths = [p for p in self.storage.list("items") if p.endswith(".parquet") and p not in self._tables]
        for path in paths:
            try:
                self._tables[path] = self.storage.read_table(path).select(ITEMS.names).cast(ITEMS)
            except (BadInput, KeyError, pa.ArrowInvalid) as error:
                log.error("%s is left out: %s", path, error)
                self._tables[path] = ITEMS.empty_table()
        if paths:
            self.items = Items(pa.concat_tables([self._tables[path] for path in sorted(self._tables)]))
        return bool(paths)


def _times(column: pa.ChunkedArray, missing: int) -> NDArray[np.int64]:
    return column.cast(pa.int64()).fill_null(missing).to_numpy()
