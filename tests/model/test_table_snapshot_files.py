"""The files of a snapshot: a process that dies at any step, a damaged disk, and a disk that is full."""

import errno
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.errors import AlreadyExists, BadInput, CorruptLog, FreshetError
from model import table_files, table_snapshot
from model._native import freshet_table
from model.table import EmbeddingTable
from model.table_files import COLUMNS, SnapshotManifest, SnapshotWriter
from model.table_snapshot import load_snapshot, save_snapshot
from tests.model.table_model import assert_same_table, int64

torch.set_num_threads(1)


def example() -> EmbeddingTable:
    """Something in every column."""
    table = EmbeddingTable("item", 3, admission_threshold=2)
    ids = int64(*range(40), *range(20))
    table.apply_gradients(ids, np.ones((60, 3), np.float32), now_us=10**15)
    table.erase(int64(3, 4, 30))
    return table


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "snapshot"
    save_snapshot(example(), folder)
    return folder


# A crash


def die_at(step: int, table: EmbeddingTable, folder: Path) -> None:
    """Saves in this process, which dies before the step-th line that it runs; files not yet synced lose their ends."""
    synced: set[int] = set()
    steps = 0
    seen: Counter[tuple[str, int]] = Counter()
    files = {table_files.__file__, table_snapshot.__file__}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal steps
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            seen[frame.f_code.co_filename, frame.f_lineno] += 1
            steps += seen[frame.f_code.co_filename, frame.f_lineno] <= 3  # of a loop, three rounds
            if steps > step:
                lose_power()
        return trace

    def lose_power() -> None:
        sys.settrace(None)
        for path in folder.parent.rglob("*"):
            if path.is_file() and path.stat().st_ino not in synced:
                os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    table_files.os.fsync = lambda at: synced.add(os.fstat(at).st_ino)  # type: ignore[assignment,arg-type]
    sys.settrace(trace)
    save_snapshot(table, folder)
    sys.settrace(None)


def in_child(step: int, table: EmbeddingTable, folder: Path) -> bool:
    """Whether a child process, which dies at that step, got to the end."""
    child = os.fork()
    if child == 0:
        try:
            die_at(step, table, folder)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def test_a_process_killed_at_any_step_leaves_a_whole_snapshot_or_none(tmp_path: Path) -> None:
    table = example()
    whole = 0
    for step in range(10_000):
        folder = tmp_path / "parent" / "snapshot"
        ended = in_child(step, table, folder)
        if folder.exists():
            assert_same_table(load_snapshot(folder), table)
            whole += 1
        else:
            assert not ended and whole == 0
            if step % 20 == 0:  # the next attempt succeeds, and clears away what the dead one left
                save_snapshot(table, folder)
                assert_same_table(load_snapshot(folder), table)
                assert os.listdir(folder.parent) == ["snapshot"]
        shutil.rmtree(folder.parent, ignore_errors=True)
        if ended:
            break
    assert step > 100 and whole > 1


def test_the_folder_of_a_writer_at_work_is_left_alone(tmp_path: Path) -> None:
    with SnapshotWriter(tmp_path / "a[1]") as first:
        save_snapshot(example(), tmp_path / "a[1]")
        assert first.temporary.is_dir()
        with pytest.raises(AlreadyExists, match=r"was taken meanwhile .* choose another folder"):
            first.publish(SnapshotManifest({}, 1, 0, {}, {}, ()))
    abandoned = tmp_path / ".a[2].0123.tmp"
    abandoned.mkdir()
    save_snapshot(example(), tmp_path / "a[2]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a[1]", "a[2]"]


@pytest.mark.parametrize("writes", [0, 5, 9])
def test_a_full_disk_is_reported_and_leaves_nothing(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = table_files._write_all
    done: list[Any] = []

    def write(file: Any, values: Any) -> None:
        if len(done) == writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(file)
        native(file, values)

    table = example()
    with monkeypatch.context() as patch:
        patch.setattr(table_files, "_write_all", write)
        with pytest.raises(OSError, match="No space left") as failure:
            save_snapshot(table, tmp_path / "snapshot")
    assert not list(tmp_path.iterdir())
    save_snapshot(table, tmp_path / "snapshot")  # the scan is over, though the error still holds its frame
    assert failure.value.errno == errno.ENOSPC


def test_a_folder_that_is_in_use_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(AlreadyExists, match="give every snapshot a folder of its own"):
            save_snapshot(example(), taken)
    assert os.listdir(tmp_path) == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    save_snapshot(example(), tmp_path / "empty")
    assert_same_table(load_snapshot(tmp_path / "empty"), example())


# A damaged snapshot

FILES = ["manifest.json", *(f"{name}.bin" for name in COLUMNS)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "shorter", "longer", "zeros"])
def test_damaged_files_are_refused_by_name(name: str, damage: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / name
    size = path.stat().st_size
    assert size > 0
    if damage == "missing":
        path.unlink()
    elif damage == "zeros":
        path.write_bytes(bytes(size))
    else:
        with path.open("r+b") as file:
            file.truncate({"empty": 0, "shorter": size - 1, "longer": size + 1}[damage])
    with pytest.raises(FreshetError, match=name.replace(".", r"\.")) as error:
        load_snapshot(folder)
    assert str(folder) in str(error.value)
    assert any(advice in str(error.value) for advice in ("restore another one", "name the folder of one"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), at=st.integers(0, 2**20), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_found(name: str, at: int, bit: int, saved: Path) -> None:
    path = saved / name
    good = path.read_bytes()
    bad = bytearray(good)
    bad[at % len(bad)] ^= 1 << bit
    try:
        path.write_bytes(bad)
        with pytest.raises(FreshetError, match=name.replace(".", r"\.")):
            load_snapshot(saved)
    finally:
        path.write_bytes(good)
    assert len(load_snapshot(saved)) == len(example())


def test_folders_without_a_snapshot_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(BadInput, match=r"manifest\.json does not exist.*name the folder of one"):
            load_snapshot(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', '{"snapshot": []}', '{"snapshot": {"format": 1}}', "\xff", "[" * 10**5]
)
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptLog, match=r"manifest\.json is no snapshot manifest"):
        load_snapshot(tmp_path)


def test_a_snapshot_of_a_later_release_is_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "snapshot"
    monkeypatch.setattr(table_files, "FORMAT", 2)
    save_snapshot(example(), folder)
    load_snapshot(folder)
    monkeypatch.undo()
    with pytest.raises(BadInput, match="has format 2, this release reads 1; use the release that wrote it"):
        load_snapshot(folder)


def test_failed_loads_leave_no_file_open(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "counts.bin").unlink()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(CorruptLog):
            load_snapshot(folder)
        load_snapshot(saved)
    assert len(os.listdir("/proc/self/fd")) == before


# The format


def test_a_column_file_is_the_column_and_nothing_else(saved: Path) -> None:
    delta = example().export_all()
    keys = np.fromfile(saved / "keys.bin", "<i8")
    order = np.argsort(keys)
    assert keys[order].tolist() == delta.keys.tolist()
    weights = np.fromfile(saved / "weights.bin", "<f4").reshape(-1, 3)
    assert weights[order].tobytes() == delta.weights.tobytes()
    assert np.fromfile(saved / "last_seen.bin", "<u4").tolist() == [10**9] * len(keys)
    assert sorted(np.fromfile(saved / "candidate_keys.bin", "<i8")) == delta.candidate_keys.tolist()


def test_checksums_are_crc32c_over_bytes_in_any_shape() -> None:
    assert freshet_table.crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4
    assert freshet_table.crc32c(bytes(32)) == 0x8A9136AA
    assert freshet_table.crc32c(b"") == freshet_table.crc32c(np.empty((0, 3))) == 0
    values = np.random.default_rng(0).normal(size=(300, 70)).astype(np.float32)
    raw = values.tobytes()
    assert freshet_table.crc32c(values) == freshet_table.crc32c(raw) == freshet_table.crc32c(memoryview(raw))
    for cut in (0, 1, 8191, 50_000, len(raw)):
        assert freshet_table.crc32c(raw[cut:], freshet_table.crc32c(raw[:cut])) == freshet_table.crc32c(raw)
    with pytest.raises((ValueError, BufferError), match="contiguous"):
        freshet_table.crc32c(values.T)
    with pytest.raises(TypeError):
        freshet_table.crc32c("text")  # type: ignore[arg-type]
