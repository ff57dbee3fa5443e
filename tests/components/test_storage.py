"""The storage root: atomic writes, create-if-absent, the same behaviour on files and on S3."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.exceptions import ReadTimeoutError, ResponseStreamingError
from botocore.response import StreamingBody

from components.errors import AlreadyExists, BadInput
from components.storage import S3, LocalFiles, Storage


@pytest.fixture(params=["file", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/store" if request.param == "file" else request.getfixturevalue("s3_root"))


def test_what_is_written_is_read_back(anywhere: Storage) -> None:
    anywhere.write_bytes("a/b.bin", b"one")
    anywhere.write_bytes("a/b.bin", b"two")
    assert anywhere.read_bytes("a/b.bin") == b"two"
    assert anywhere.exists("a/b.bin") and not anywhere.exists("a")


def test_create_succeeds_for_exactly_one_of_many(anywhere: Storage) -> None:
    def attempt(who: int) -> int | None:
        try:
            anywhere.create("manifest.json", str(who).encode())
        except AlreadyExists:
            return None
        return who

    with ThreadPoolExecutor(8) as pool:
        winners = [who for who in pool.map(attempt, range(16)) if who is not None]
    assert len(winners) == 1
    assert anywhere.read_bytes("manifest.json") == str(winners[0]).encode()


def test_s3_is_asked_again_when_writers_conflict_and_none_of_them_wins(s3_root: str) -> None:
    store = Storage(s3_root)
    answers = answer_conflict_to_create(store, 2)
    store.create("manifest.json", b"mine")
    assert answers == [409, 409]
    assert store.read_bytes("manifest.json") == b"mine"


def test_a_conflict_that_another_writer_has_won_is_lost_at_once(s3_root: str) -> None:
    store = Storage(s3_root)
    store.write_bytes("manifest.json", b"theirs")
    answers = answer_conflict_to_create(store, 2)
    with pytest.raises(AlreadyExists):
        store.create("manifest.json", b"mine")
    assert answers == [409]


def test_a_store_that_lets_a_second_writer_win_is_refused_and_keeps_nothing(s3_root: str) -> None:
    """As S3-compatible stores do that do not know the header: both writers would own the manifest."""

    def ignore(params: dict[str, Any], **_: object) -> None:
        params["headers"].pop("If-None-Match", None)

    for _ in range(2):
        store = Storage(s3_root)
        assert isinstance(store.backend, S3)
        store.backend.client.meta.events.register("before-call.s3.PutObject", ignore)
        with pytest.raises(BadInput, match=r"ignores If-None-Match.* use a store"):
            store.create("manifest.json", b"mine")
        assert store.list("") == []


def test_whether_a_store_refuses_is_looked_at_once(s3_root: str) -> None:
    store, sent = Storage(s3_root), list[str]()
    assert isinstance(store.backend, S3)
    store.backend.client.meta.events.register("before-send.s3.*", lambda request, **_: sent.append(request.method))
    for path in ("a", "b", "c"):
        store.create(path, b"1")
    assert sent == ["PUT"] * 4


@pytest.mark.parametrize("error", [ResponseStreamingError(error="reset"), ReadTimeoutError(endpoint_url="http://s3")])
@pytest.mark.parametrize("breaks", [2, 9])
def test_an_answer_that_breaks_off_is_asked_for_again_and_given_up_at_last(
    s3_root: str, monkeypatch: pytest.MonkeyPatch, error: Exception, breaks: int
) -> None:
    store = Storage(s3_root)
    store.write_bytes("a", b"all of it")
    left = [error] * breaks
    original = StreamingBody.read

    def read(self: StreamingBody, **how: Any) -> Any:
        if left:
            raise left.pop()
        return original(self, **how)

    monkeypatch.setattr(StreamingBody, "read", read)
    monkeypatch.setattr("components.storage._PAUSES", (0, 0))
    if breaks == 2:
        assert store.read_bytes("a") == b"all of it"
    else:
        with pytest.raises(type(error)):
            store.read_bytes("a")


def answer_conflict_to_create(store: Storage, times: int) -> list[int]:
    """S3 answers 409 to so many conditional writes that it gets from `store`; returns these answers, as they come."""
    assert isinstance(store.backend, S3)
    answers = list[int]()

    def conflict(request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        if len(answers) == times:
            return None
        answers.append(409)
        answer = AWSResponse(request.url, 409, {}, None)
        answer._content = b"<Error><Code>ConditionalRequestConflict</Code></Error>"
        return answer

    store.backend.client.meta.events.register("before-send.s3.PutObject", conflict)
    return answers


def test_a_missing_path_is_file_not_found(anywhere: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        anywhere.read_bytes("nowhere")


def test_listing_is_sorted_recursive_and_bound_to_the_folder(anywhere: Storage) -> None:
    for path in ("x/2/b", "x/1/a", "xy/other"):
        anywhere.write_bytes(path, b"")
    assert anywhere.list("x") == ["x/1/a", "x/2/b"]
    assert anywhere.list("") == ["x/1/a", "x/2/b", "xy/other"]
    assert anywhere.list("absent") == []
    anywhere.delete("x/2/b")
    anywhere.delete("x/2/b")  # again: what is gone is gone
    assert anywhere.list("x") == ["x/1/a"]


def test_a_folder_that_goes_while_files_are_listed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, original = Storage(f"file://{tmp_path}"), os.scandir
    for path in ("x/a", "x/gone/b", "x/z/c"):
        store.write_bytes(path, b"")

    def scandir(folder: str | Path) -> Any:
        if Path(folder).name == "gone":
            store.delete("x/gone/b")
            (tmp_path / "x/gone").rmdir()
        return original(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert store.list("x") == ["x/a", "x/z/c"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(_: object) -> Any:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match="the disk is broken"):
        Storage(f"file://{tmp_path}").list("x")


def test_a_truncated_parquet_file_is_named_in_the_error(anywhere: Storage) -> None:
    anywhere.write_table("t.parquet", pa.table({"a": list(range(1000))}))
    assert anywhere.read_table("t.parquet").num_rows == 1000
    anywhere.write_bytes("t.parquet", anywhere.read_bytes("t.parquet")[:-20])
    with pytest.raises(BadInput, match=r"t\.parquet is not a readable Parquet file"):
        anywhere.read_table("t.parquet")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    files = LocalFiles(tmp_path)
    files.write("value", b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"components.storage.os.{step}", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/value'"):
        files.write("value", b"new")
    assert files.read("value") == b"old"
    assert os.listdir(tmp_path) == ["value"], "what is left would keep the disk full, and nobody would ever find it"


@pytest.mark.parametrize("write", ["write", "create"])
def test_the_folders_of_a_new_file_are_as_durable_as_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    synced: list[int] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        original(descriptor)

    monkeypatch.setattr("components.storage.os.fsync", fsync)
    getattr(LocalFiles(tmp_path / "root"), write)("a/b/value", b"1")
    made = ("root/a/b/value", "root/a/b", "root/a", "root", ".")
    assert {(tmp_path / name).stat().st_ino for name in made} == set(synced)


@pytest.mark.parametrize("root", ["relative/path", "file://relative", "file://relative/path", "file://~/store"])
@pytest.mark.parametrize("more", ["", "/"])
def test_a_folder_that_is_not_absolute_is_refused_and_never_taken_for_one_under_the_file_systems_root(
    root: str, more: str
) -> None:
    with pytest.raises(BadInput, match="neither file"):
        Storage(root + more)


@pytest.mark.parametrize("root", ["http://host/x", "s3://"])
def test_a_root_that_is_neither_files_nor_s3_is_refused(root: str) -> None:
    with pytest.raises(BadInput, match="neither file"):
        Storage(root)


@pytest.mark.parametrize("root", ["file:///tmp/c#/store", "file:///tmp/what?/store", "s3://bucket/c#"])
def test_a_root_of_which_a_url_would_lose_a_part_is_refused(root: str) -> None:
    with pytest.raises(BadInput, match="without them"):
        Storage(root)


def test_a_semicolon_belongs_to_the_name_of_a_folder(tmp_path: Path) -> None:
    Storage(f"file://{tmp_path}/a;b").write_bytes("x", b"1")
    assert (tmp_path / "a;b" / "x").read_bytes() == b"1"
