"""Follows the catalogue while others write to it."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.errors import BadInput
from components.items import Items
from components.schemas import ITEMS
from components.storage import Storage

_AT_ONCE = 64
"""Files that are held in memory at a time while a long catalogue is read."""

log = logging.getLogger("freshet.serve.items")


class ItemFolder:
    """Follows items/*.parquet. Of each item one row is kept: the last of the file whose name comes last."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.items = Items(ITEMS.empty_table())
        self._files: dict[str, int] = {}  # those that were read, numbered as they came
        self._rows = ITEMS.empty_table()
        self._file: NDArray[np.int64] = np.zeros(0, np.int64)  # of each row

    def refresh(self) -> bool:
        """Read files that are new; True when the items changed. An unreadable file is reported and left out."""
        paths = [p for p in self.storage.list("items") if p.endswith(".parquet") and p not in self._files]
        for first in range(0, len(paths), _AT_ONCE):
            self._fold({path: self._read(path) for path in paths[first : first + _AT_ONCE]})
        if paths:
            self.items = Items(self._rows)
        return bool(paths)

    def _read(self, path: str) -> pa.Table:
        try:
            return self.storage.read_table_as(path, ITEMS)
        except BadInput as error:
            log.error("%s is left out: %s", path, error)
            return ITEMS.empty_table()

    def _fold(self, new: dict[str, pa.Table]) -> None:
        """Add the rows of new files, whose names may come before those of files that are known already."""
        numbers = range(len(self._files), len(self._files) + len(new))
        self._files |= dict(zip(new, numbers, strict=True))
        rows = pa.concat_tables([self._rows, *new.values()])
        file = np.concatenate([self._file, np.repeat(numbers, [len(table) for table in new.values()])])
        rank = np.argsort(np.argsort(list(self._files)))  # of each file by name
        order = np.argsort(rank[file], kind="stable")[::-1]
        _, winner = np.unique(rows["item_id"].to_numpy()[order], return_index=True)
        self._rows, self._file = rows.take(order[winner]).combine_chunks(), file[order[winner]]
