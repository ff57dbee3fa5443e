"""A publish, a compaction and a retention that die at any storage operation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.parameters.compaction import compact, retain
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.storage import Storage
from tests.components.parameter_world import TinyTrainer, identical, publish_delta, read_all, small_log


class Died(BaseException):
    """Not an Exception: no handler in the product may swallow it."""


class Mortal:
    """A storage backend that dies right before or right after its k-th change."""

    def __init__(self, inner: Any, dies_at: int, after: bool) -> None:
        self.inner, self.left, self.after = inner, dies_at, after

    def _change(self, name: str, *arguments: Any) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Died
        getattr(self.inner, name)(*arguments)
        if self.left == 0:
            raise Died

    def write(self, path: str, data: bytes) -> None:
        self._change("write", path, data)

    def create(self, path: str, data: bytes) -> None:
        self._change("create", path, data)

    def delete(self, path: str) -> None:
        self._change("delete", path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def mortal_storage(root: str, dies_at: int, after: bool) -> Storage:
    storage = Storage(root)
    storage.backend = Mortal(storage.backend, dies_at, after)
    return storage


def next_change(storage: Storage) -> None:
    trainer = TinyTrainer(seed=9)
    trainer.write("item", 3)
    trainer.erase("item", 1)
    publish_delta(LogWriter(storage, "ranker", 1), trainer, 3)


def fold_and_retain(storage: Storage) -> None:
    compact(storage, "ranker", 1)
    retain(storage, "ranker", 1, keep=0)


def deaths(tmp_path: Path, work: Callable[[Storage], None], check: Callable[[str], None]) -> int:
    """Run `work` dying at each storage change in turn; after each death check, retry, check. Returns the deaths."""
    count = 0
    for after in (False, True):
        for dies_at in range(1, 100):
            folder = tmp_path / f"{after}-{dies_at}"
            shutil.copytree(tmp_path / "before", folder)
            root = f"file://{folder}"
            try:
                work(mortal_storage(root, dies_at, after))
            except Died:
                count += 1
                check(root)
                continue
            break
        else:
            pytest.fail("the work never ends")
    return count


def test_readers_see_all_of_a_delta_or_nothing_wherever_its_publish_dies(tmp_path: Path) -> None:
    held = small_log(f"file://{tmp_path}/before", deltas=2)
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "before", whole)
    next_change(Storage(f"file://{whole}"))
    finished = LogReader(Storage(f"file://{whole}"), "ranker", 1).load(with_state=True)

    def check(root: str) -> None:
        reader = LogReader(Storage(root), "ranker", 1)
        found = reader.load(with_state=True)
        assert identical(found, finished if reader.head() == 3 else held[2])
        if reader.head() == 2:
            next_change(Storage(root))
        assert identical(LogReader(Storage(root), "ranker", 1).load(with_state=True), finished)

    assert deaths(tmp_path, next_change, check) == 8  # three files and the manifest, before and after each


def test_compaction_and_retention_lose_nothing_wherever_they_die(tmp_path: Path) -> None:
    held = small_log(f"file://{tmp_path}/before", deltas=2)

    def check(root: str) -> None:
        assert identical(LogReader(Storage(root), "ranker", 1).load(with_state=True), held[2])
        fold_and_retain(Storage(root))
        reader = LogReader(Storage(root), "ranker", 1)
        assert reader.snapshots() == [0, 2]
        assert identical(reader.load(with_state=True), held[2]) and read_all(reader) == 2
        assert len(Storage(root).list("parameters/ranker/1/delta-1")) == 1

    assert deaths(tmp_path, fold_and_retain, check) == 20


KILLED = """
import os, sys
from components.storage import Storage
from tests.components.test_parameters_crash import next_change

root, dies_at = sys.argv[1], int(sys.argv[2])
calls = 0

def mortal(function):
    def wrapped(*arguments, **keywords):
        global calls
        calls += 1
        if calls == dies_at:
            os._exit(9)
        return function(*arguments, **keywords)
    return wrapped

for name in ("fsync", "link", "replace"):
    setattr(os, name, mortal(getattr(os, name)))
next_change(Storage(root))
print(calls)
"""


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4, 8, 11, 12, 13])
def test_a_killed_process_leaves_a_readable_log_and_a_retry_finishes(tmp_path: Path, dies_at: int) -> None:
    root = f"file://{tmp_path}"
    held = small_log(root, deltas=2)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED, root, str(dies_at)], env=environment, capture_output=True)
    assert done.returncode == 9, done.stderr.decode()
    reader = LogReader(Storage(root), "ranker", 1)
    committed = dies_at == 13  # the manifest is linked; only the folder's fsync is left
    assert reader.head() == (3 if committed else 2)
    if not committed:
        assert identical(reader.load(with_state=True), held[2])
        next_change(Storage(root))
    assert read_all(LogReader(Storage(root), "ranker", 1)) == 3
