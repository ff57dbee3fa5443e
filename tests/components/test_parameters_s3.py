from __future__ import annotations

import pytest

from components.errors import AlreadyExists, CorruptLog
from components.parameters.compaction import compact, retain
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.storage import Storage
from tests.components.parameter_world import TinyTrainer, identical, publish_delta, small_log


def test_the_log_works_on_s3(s3_root: str) -> None:
    held = small_log(s3_root, deltas=2)
    storage = Storage(s3_root)
    reader = LogReader(storage, "ranker", 1)
    assert reader.head() == 2
    for n, expected in enumerate(held):
        assert identical(reader.load(n, with_state=True), expected)
    stale = LogWriter(storage, "ranker", 1)
    stale.reader.head = lambda: 1  # type: ignore[method-assign]
    with pytest.raises(AlreadyExists):  # a trainer that looked before the other published loses at the create
        publish_delta(stale, TinyTrainer(), 2)
    assert len(storage.list("parameters/ranker/1/delta-2")) == 4
    compact(storage, "ranker", 1)
    assert len(retain(storage, "ranker", 1, keep=0)) == 6
    assert identical(reader.load(with_state=True), held[2])
    tables = next(path for path in storage.list("parameters/ranker/1/snapshot-2") if "-tables" in path)
    storage.write_bytes(tables, storage.read_bytes(tables)[:-1])
    with pytest.raises(CorruptLog, match=r"s3://freshet/store/parameters/ranker/1/snapshot-2/.*truncated"):
        reader.load()
