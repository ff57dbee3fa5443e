"""Sequence datasets as training needs them: users, the range of event times learned from, and the items of then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from components import manifests
from components.errors import BadInput
from components.manifests import Manifest
from components.schemas import ITEMS
from components.storage import Storage
from spark_jobs.sequences import SEQUENCES

if TYPE_CHECKING:
    from components.items import Items
    from model.dataset import SequenceDataset

Int64s = npt.NDArray[np.int64]


def dataset_folder(dataset: str) -> str:
    return f"sequences/{dataset}"


def manifest_path(dataset: str) -> str:
    return f"{dataset_folder(dataset)}/{manifests.NAME}"


def require_dataset(storage: Storage, dataset: str) -> Manifest:
    """The manifest of a sequence dataset; BadInput when it is not published."""
    return manifests.require(storage, dataset_folder(dataset), "run python -m components.sequences, or check --dataset")


@dataclass(frozen=True)
class Part:
    """One part (train or eval) of a dataset. New interactions are those from new_from on: what is learned from."""

    users: SequenceDataset | None  # None: no new interaction
    new: dict[str, Int64s]  # the new interactions: timestamp (us), item_id, user_id, page, actions (bitmask), each [n]

    @property
    def event_range(self) -> tuple[int, int] | None:
        """First and newest event time (us); None without events."""
        times = self.new["timestamp"]
        return (int(times.min()), int(times.max())) if len(times) else None


def read_part(storage: Storage, manifest: Manifest, part: str) -> Part:
    """Read one part; BadInput when the dataset has none of that name."""
    from model.dataset import SequenceDataset

    if part not in manifest.files:
        raise BadInput(f"dataset {manifest.name} has no part {part!r}, only {', '.join(manifest.files)}")
    tables = [SEQUENCES.empty_table(), *map(storage.read_table, manifest.files[part])]
    users = SequenceDataset(pa.concat_tables(tables, promote_options="permissive"))
    is_new = users.is_new()
    new = {name: users.column(name)[is_new].astype(np.int64) for name in ("timestamp", "item_id", "page", "actions")}
    new["user_id"] = users.user_id[users.owners()[is_new]]
    return Part(users if is_new.any() else None, new)


def item_files(storage: Storage) -> list[str]:
    """The files of the item log as it is now."""
    return [path for path in storage.list("items") if path.endswith(".parquet")]


def read_items(storage: Storage, files: Sequence[str] | None = None) -> Items:
    """The item log, or these files of it, in order of name; a later row of the same item wins.

    BadInput names a file that holds no items.
    """
    from components.items import Items

    paths = item_files(storage) if files is None else files
    return Items(pa.concat_tables([ITEMS.empty_table(), *(storage.read_table_as(path, ITEMS) for path in paths)]))
