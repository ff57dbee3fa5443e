"""The catalogue that the server follows: later files win, and only the rows that win are kept."""

from __future__ import annotations

import itertools
import logging
import random

import pyarrow as pa
import pytest

from components.errors import BadInput
from components.items import Items
from components.sequence_data import read_items
from components.serve import items as items_module
from components.serve.items import ItemFolder
from components.storage import Storage
from tests.components.serving import item_rows


def categories(items: Items) -> dict[int, int]:
    ids = items.catalogue.item_id
    return dict(zip(ids.tolist(), items.catalogue.features(ids)[:, 1].tolist(), strict=True))


def write(storage: Storage, name: str, item_ids: list[int], category: int) -> None:
    storage.write_table(f"items/{name}.parquet", item_rows(item_ids, category=category))


def test_the_last_file_by_name_wins_in_whatever_order_files_come(storage: Storage) -> None:
    files = {"a": [1, 2, 3], "b": [2, 3], "c": [3, 4], "d": [4, 4]}
    for number, order in enumerate(itertools.permutations(files)):
        store = Storage(f"{storage.root}/{number}")
        folder = ItemFolder(store)
        for name in order:
            write(store, name, files[name], ord(name))
            assert folder.refresh()
        assert categories(folder.items) == {1: ord("a"), 2: ord("b"), 3: ord("c"), 4: ord("d")}, order
        assert folder.items.item_id.tolist() == [1, 2, 3, 4]


def test_a_restart_sees_the_same_items_as_a_server_that_saw_every_file_come(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items_module, "_AT_ONCE", 3)
    chance, follower = random.Random(0), ItemFolder(storage)
    for number in range(40):
        name = f"{chance.randrange(10**6):06d}"
        write(storage, name, chance.choices(range(30), k=10), number)
        if chance.random() < 0.4:
            follower.refresh()
    follower.refresh()
    fresh = ItemFolder(storage)
    fresh.refresh()
    assert categories(follower.items) == categories(fresh.items)
    assert len(fresh.items) == 30


def test_of_two_rows_of_an_item_in_one_file_the_later_wins(storage: Storage) -> None:
    rows = item_rows([7, 8, 7]).set_column(2, "category", [[1, 2, 3]])
    storage.write_table("items/a.parquet", rows)
    folder = ItemFolder(storage)
    folder.refresh()
    assert categories(folder.items) == {7: 3, 8: 2}


def test_memory_is_bound_to_the_items_however_many_files_tell_of_them(storage: Storage) -> None:
    folder = ItemFolder(storage)
    for day in range(20):
        write(storage, f"{day:02d}", list(range(50)), day)
        folder.refresh()
    assert folder._rows.num_rows == len(folder._file) == 50
    assert folder._rows["item_id"].num_chunks == 1, "no row of an older file is kept alive by a slice"
    assert set(categories(folder.items).values()) == {19}
    assert not folder.refresh()


def test_an_unreadable_file_is_reported_once_and_left_out(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    write(storage, "a", [1], 1)
    storage.write_bytes("items/b.parquet", b"PAR1 truncated")
    folder = ItemFolder(storage)
    with caplog.at_level(logging.ERROR):
        folder.refresh()
        folder.refresh()
    assert len(caplog.records) == 1 and "items/b.parquet is left out" in caplog.text
    assert categories(folder.items) == {1: 1}


def test_items_without_what_is_optional_are_read_and_a_file_with_nulls_stops_no_other(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    ids = pa.table({"item_id": [7], "author_id": [1], "category": [5]})
    storage.write_table("items/a.parquet", ids)
    folder = ItemFolder(storage)
    folder.refresh()
    assert categories(folder.items) == {7: 5}
    assert read_items(storage).item_id.tolist() == [7]
    storage.write_table("items/b.parquet", ids.set_column(1, "author_id", pa.array([None], pa.int64())))
    write(storage, "c", [8], 6)
    folder.refresh()
    assert categories(folder.items) == {7: 5, 8: 6}
    assert "items/b.parquet is left out" in caplog.text
    with pytest.raises(BadInput, match=r"items/b\.parquet does not hold what it must .* write it again"):
        read_items(storage)
