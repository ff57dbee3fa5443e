"""Every kind of damage to a parameter log is detected, named, and nothing partial is returned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from components.errors import CorruptLog
from components.parameters.log import manifest_path
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.storage import Storage
from tests.components.parameter_world import TinyTrainer, publish_delta, small_log


def reader_of(root: str) -> LogReader:
    return LogReader(Storage(root), "ranker", 1)


def files_of(root: str) -> list[str]:
    return Storage(root).list("parameters/ranker/1")


def test_truncation_of_any_file_is_detected_and_named(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    small_log(root, deltas=2)
    assert len(files_of(root)) == 12
    for path in files_of(root):
        whole = (tmp_path / path).read_bytes()
        for size in (0, len(whole) // 2, len(whole) - 1):
            (tmp_path / path).write_bytes(whole[:size])
            with pytest.raises(CorruptLog, match=path) as caught:
                reader_of(root).load(with_state=True)
            assert "restore the file" in str(caught.value)
        (tmp_path / path).write_bytes(whole)
    assert reader_of(root).load(with_state=True).n == 2


def test_a_flipped_bit_in_any_data_file_is_detected_and_named(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    small_log(root, deltas=2)
    for path in files_of(root):
        if path.endswith(".safetensors"):
            whole = (tmp_path / path).read_bytes()
            (tmp_path / path).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            with pytest.raises(CorruptLog, match=path):
                reader_of(root).load(with_state=True)
            (tmp_path / path).write_bytes(whole)


def test_a_manifest_changed_after_publication_breaks_the_chain(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    small_log(root)
    path = tmp_path / manifest_path("ranker", 1, "delta", 1)
    path.write_text(path.read_text().replace("0.51", "0.99"))
    with pytest.raises(CorruptLog, match=r"delta-2/manifest\.json does not follow the manifest before it"):
        reader_of(root).load()
    with pytest.raises(CorruptLog, match="delta-2"):
        reader_of(root).delta(2)


def test_a_gap_is_detected(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    small_log(root)
    (tmp_path / manifest_path("ranker", 1, "delta", 2)).unlink()
    for attempt in (lambda: reader_of(root).load(), lambda: reader_of(root).delta(2), lambda: reader_of(root).delta(3)):
        with pytest.raises(CorruptLog, match="gap"):
            attempt()
    assert reader_of(root).load(as_of=1).n == 1


def test_a_missing_data_file_or_snapshot_is_detected(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    small_log(root, deltas=1)
    state = next(path for path in files_of(root) if path.endswith("-state.safetensors"))
    (tmp_path / state).unlink()
    assert reader_of(root).load().n == 1  # a server does not need it
    with pytest.raises(CorruptLog, match=f"{state} is missing"):
        reader_of(root).load(with_state=True)
    (tmp_path / manifest_path("ranker", 1, "snapshot", 0)).unlink()
    with pytest.raises(CorruptLog, match=r"snapshot-0/manifest\.json is missing"):
        reader_of(root).load()


def test_files_of_another_version_or_model_are_refused(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    small_log(root)
    for other, version in (("ranker", 2), ("retriever", 1)):
        for path in files_of(root):
            copy = tmp_path / path.replace("ranker/1", f"{other}/{version}")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((tmp_path / path).read_bytes())
        with pytest.raises(CorruptLog, match="belongs to ranker/1"):
            LogReader(Storage(root), other, version).load()


def test_a_delta_with_other_dense_parameters_is_refused(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    small_log(root, deltas=0)
    trainer = TinyTrainer()
    trainer.dense = {"w": np.zeros((3, 2), np.float32), "steps": np.array(0, np.int64)}
    publish_delta(LogWriter(Storage(root), "ranker", 1), trainer, 1)
    with pytest.raises(CorruptLog, match="differ in name or shape: w"):
        reader_of(root).load()
