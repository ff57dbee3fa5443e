from __future__ import annotations

from typing import Any

import pytest
from botocore.exceptions import ConnectionClosedError

from components.errors import AlreadyExists, CorruptLog
from components.parameters.compaction import compact, retain
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.storage import S3, Storage
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


def test_a_delta_whose_commit_is_answered_too_late_is_published_once_and_whole(s3_root: str) -> None:
    """boto3 repeats the create of the manifest by itself; the store has it and refuses the repeat."""
    held = small_log(s3_root, deltas=1)
    storage = Storage(s3_root)
    sent = lose_first_answer(storage, "delta-2/manifest.json")
    trainer = TinyTrainer()
    trainer.write("item", 50)
    publish_delta(LogWriter(storage, "ranker", 1), trainer, 2)
    assert sent == [200, 412]
    assert len(storage.list("parameters/ranker/1/delta-2")) == 4
    loaded = LogReader(storage, "ranker", 1).load()
    assert loaded.n == 2
    assert set(loaded.tables["item"].keys) == {*held[1].tables["item"].keys, 50}


def lose_first_answer(storage: Storage, path: str) -> list[int]:
    """Deliver all PUTs of `path`, but lose the answer to the first; returns the store's answers, as they come."""
    assert isinstance(storage.backend, S3)
    client, answers = storage.backend.client, list[int]()

    def deliver(request: Any, **_: Any) -> Any:
        if not request.url.endswith(path):
            return None
        answer = client._endpoint.http_session.send(request)
        answers.append(answer.status_code)
        if len(answers) == 1:
            raise ConnectionClosedError(endpoint_url=request.url)
        return answer

    client.meta.events.register("before-send.s3.PutObject", deliver)
    return answers
