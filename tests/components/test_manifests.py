"""Publishing a manifest is the commit of a data set: first one stands, readers see nothing before it."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from components import manifests
from components.errors import BadInput
from components.manifests import Manifest
from components.storage import Storage


def write(storage: Storage, value: int) -> Manifest:
    path = f"{manifests.new_attempt('things/one')}/part-0.parquet"
    storage.write_table(path, pa.table({"value": [value]}))
    return Manifest(kind="interactions", name="one", files={"data": [path]}, counts={"rows": 1})


def test_data_is_invisible_until_its_manifest_is_published(storage: Storage) -> None:
    manifest = write(storage, 1)
    assert manifests.find(storage, "things/one") is None
    with pytest.raises(BadInput, match="run the join first"):
        manifests.require(storage, "things/one", "run the join first")
    manifests.publish(storage, "things/one", manifest)
    assert manifests.find(storage, "things/one") == manifest


def test_looking_for_a_manifest_is_one_request(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps look for one of each window: two requests each would be most of their time on S3."""
    manifest = manifests.publish(storage, "things/one", write(storage, 1))
    asked: list[str] = []
    inner = storage.backend

    class Counting:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(inner, name)

    monkeypatch.setattr(storage, "backend", Counting())
    assert manifests.find(storage, "things/one") == manifest
    assert manifests.find(storage, "things/two") is None
    assert asked == ["read", "read"]


def test_the_first_of_two_attempts_stands(storage: Storage) -> None:
    first, second = write(storage, 1), write(storage, 2)
    assert manifests.publish(storage, "things/one", first) == first
    assert manifests.publish(storage, "things/one", second) == first
    assert manifests.read_part(storage, first, "data").column("value").to_pylist() == [1]


def test_what_comes_second_leaves_nothing(storage: Storage) -> None:
    first = manifests.publish(storage, "things/one", write(storage, 1))
    manifests.publish(storage, "things/one", write(storage, 2))
    assert storage.list("things") == sorted([*first.files["data"], "things/one/manifest.json"])


def test_what_an_attempt_that_died_has_written_goes_with_the_commit_of_the_next(storage: Storage) -> None:
    write(storage, 1)
    storage.write_bytes("things/one/other.txt", b"not of an attempt")
    storage.write_bytes("things/one-more/attempt-1/part-0.parquet", b"of another data set")
    second = manifests.publish(storage, "things/one", write(storage, 2))
    others = ["things/one-more/attempt-1/part-0.parquet", "things/one/manifest.json", "things/one/other.txt"]
    assert storage.list("things") == sorted([*others, *second.files["data"]])


def test_a_truncated_manifest_is_named_with_the_remedy(storage: Storage) -> None:
    manifests.publish(storage, "things/one", write(storage, 1))
    path = "things/one/manifest.json"
    storage.write_bytes(path, storage.read_bytes(path)[:-9])
    with pytest.raises(BadInput, match=r"things/one/manifest\.json is truncated or no manifest; delete it"):
        manifests.find(storage, "things/one")


def test_an_unknown_part_is_refused_naming_those_that_exist(storage: Storage) -> None:
    with pytest.raises(BadInput, match="no part 'eval', only data"):
        manifests.read_part(storage, write(storage, 1), "eval")
