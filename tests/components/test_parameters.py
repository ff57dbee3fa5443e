from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import AlreadyExists, BadInput, CorruptLog
from components.parameters.arrays import Parameters
from components.parameters.compaction import compact, retain
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.storage import LocalFiles, Storage
from tests.components.parameter_world import WINDOW, TinyTrainer, identical, publish_delta, read_all, small_log

CHANGE = st.tuples(st.sampled_from(["write", "erase"]), st.sampled_from(["item", "user"]), st.integers(-3, 3))


@pytest.fixture
def root(tmp_path: Path) -> str:
    return f"file://{tmp_path}"


def reader_of(root: str) -> LogReader:
    return LogReader(Storage(root), "ranker", 1)


def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are listed from now on."""
    listed, original = list[str](), LocalFiles.list

    def note(self: LocalFiles, prefix: str) -> list[str]:
        listed.append(prefix)
        return original(self, prefix)

    monkeypatch.setattr(LocalFiles, "list", note)
    return listed


@settings(max_examples=40, deadline=None)
@given(periods=st.lists(st.lists(CHANGE, max_size=12), min_size=1, max_size=5), compact_at=st.integers(0, 5))
def test_replay_equals_the_trainers_tables_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, periods: list[list[tuple[str, str, int]]], compact_at: int
) -> None:
    storage = Storage(f"file://{tmp_path_factory.mktemp('log')}")
    trainer, writer = TinyTrainer(), LogWriter(storage, "ranker", 1)
    held = []
    for n, changes in enumerate(periods):
        for action, slot, key in changes:
            getattr(trainer, action)(slot, key)
        trainer.step()
        if n == 0:
            writer.publish_snapshot(0, trainer.everything(0), event_range=(0, 1))
        else:
            writer.publish_delta(n, trainer.delta(n), windows=[], event_range=None, metrics={})
        held.append(trainer.everything(n))
        if n == compact_at:
            compact(storage, "ranker", 1)
    for n, expected in enumerate(held):
        assert identical(LogReader(storage, "ranker", 1).load(as_of=n, with_state=True), expected)


def test_a_row_that_is_erased_and_written_again_in_one_period_lives(root: str) -> None:
    small_log(root, deltas=0)
    trainer = TinyTrainer()
    trainer.erase("item", 2)
    trainer.write("item", 2)
    publish_delta(LogWriter(Storage(root), "ranker", 1), trainer, 1)
    weights = reader_of(root).load().tables["item"]
    assert weights.weights[list(weights.keys).index(2)].tolist() == trainer.rows["item"][2][0].tolist()


def test_a_server_reads_no_optimiser_state(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_log(root)
    read: list[str] = []
    original = Storage.read_bytes

    def spy(self: Storage, path: str) -> bytes:
        read.append(path)
        return original(self, path)

    monkeypatch.setattr(Storage, "read_bytes", spy)
    parameters = reader_of(root).load()
    assert parameters.optimizer == {} and parameters.tables["item"].state is None
    assert read and not any(path.endswith("-state.safetensors") for path in read)


def test_an_empty_log_has_no_head_and_says_how_to_publish(root: str) -> None:
    assert reader_of(root).head() == -1
    with pytest.raises(BadInput, match=r"components\.publish --model=ranker --version=1"):
        reader_of(root).load()


def test_time_travel_restores_any_sync_point_and_refuses_others(root: str) -> None:
    held = small_log(root)
    for n, expected in enumerate(held):
        assert identical(reader_of(root).load(as_of=n, with_state=True), expected)
    with pytest.raises(BadInput, match="choose one from 0 to 3"):
        reader_of(root).load(as_of=4)


def test_manifests_tell_windows_event_times_counts_and_metrics(root: str) -> None:
    small_log(root)
    first, last = reader_of(root).manifest(0), reader_of(root).manifest(3)
    assert first.windows == [WINDOW] and first.config == {"dim": 3} and first.consumed_until_us == 10
    assert (last.event_time_min_us, last.event_time_max_us, last.learned_until_us) == (30, 35, 35)
    assert last.rows == {"item": 2, "user": 1} and last.tombstones == {"item": 1, "user": 0}
    assert last.metrics == {"auc_click": 0.53} and last.config == {"dim": 3}


def test_an_empty_window_moves_the_window_on_but_not_the_event_time(root: str) -> None:
    small_log(root, deltas=1)
    delta = TinyTrainer().delta(2)
    window = "20220502T000000Z-20220503T000000Z"
    manifest = LogWriter(Storage(root), "ranker", 1).publish_delta(
        2, delta, windows=[window], event_range=None, metrics={}
    )
    assert manifest.learned_until_us == 15 and manifest.event_time_max_us is None
    assert manifest.consumed_until_us == 1_651_536_000_000_000
    assert reader_of(root).load().n == 2


def test_a_delta_after_a_gap_is_refused(root: str) -> None:
    small_log(root, deltas=1)
    with pytest.raises(BadInput, match="delta 3 would leave a gap: head of ranker 1 is 1"):
        publish_delta(LogWriter(Storage(root), "ranker", 1), TinyTrainer(), 3)


def test_parameters_without_optimiser_state_are_not_published(root: str) -> None:
    small_log(root, deltas=0)
    served = reader_of(root).load()
    with pytest.raises(BadInput, match="no optimiser state of item, user"):
        LogWriter(Storage(root), "ranker", 2).publish_snapshot(0, served)


def test_of_racing_writers_exactly_one_owns_n(root: str) -> None:
    small_log(root, deltas=0)
    outcomes: list[tuple[int, str]] = []
    start = threading.Barrier(4)

    def race(seed: int) -> None:
        trainer = TinyTrainer(seed=seed)
        trainer.write("item", 1)
        start.wait()
        try:
            publish_delta(LogWriter(Storage(root), "ranker", 1), trainer, 1)
            outcomes.append((seed, "won"))
        except AlreadyExists:
            outcomes.append((seed, "lost"))

    threads = [threading.Thread(target=race, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome for _, outcome in outcomes) == ["lost", "lost", "lost", "won"]
    winner = TinyTrainer(seed=next(seed for seed, outcome in outcomes if outcome == "won"))
    winner.write("item", 1)
    assert identical(reader_of(root).delta(1, with_state=True), winner.delta(1))
    assert len(Storage(root).list("parameters/ranker/1/delta-1")) == 4  # the losers cleaned up


def files_of(root: str) -> list[str]:
    return Storage(root).list("parameters/ranker/1")


def test_compaction_keeps_the_bits_and_is_idempotent(root: str) -> None:
    held = small_log(root)
    storage = Storage(root)
    assert compact(storage, "ranker", 1) == 3
    assert reader_of(root).snapshots() == [0, 3]
    before = files_of(root)
    assert compact(storage, "ranker", 1) == 3
    assert files_of(root) == before
    assert identical(reader_of(root).load(with_state=True), held[3])
    folded, last = reader_of(root).find("snapshot", 3), reader_of(root).manifest(3)
    assert folded is not None and folded.manifest.consumed_until_us == last.consumed_until_us
    assert folded.manifest.windows == [WINDOW] and folded.manifest.learned_until_us == 35


def test_a_compaction_tells_all_of_the_history_and_reads_what_follows_the_snapshot_before(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, writer = TinyTrainer(), LogWriter(Storage(root), "ranker", 1)
    writer.publish_snapshot(0, trainer.everything(0), windows=[WINDOW], event_range=(5, 9))
    windows = [f"20220502T{hour:02}0000Z-20220502T{hour + 1:02}0000Z" for hour in range(6)]
    for n, window in enumerate(windows, 1):
        trainer.write("item", n)
        writer.publish_delta(n, trainer.delta(n), windows=[window], event_range=(10 * n, 10 * n + 5), metrics={})
        if n == 4:
            compact(Storage(root), "ranker", 1)
    read: list[str] = []
    original = LocalFiles.read

    def noted(self: LocalFiles, path: str) -> bytes:
        read.append(path)
        return original(self, path)

    monkeypatch.setattr(LocalFiles, "read", noted)
    compact(Storage(root), "ranker", 1)
    newest = reader_of(root).find("snapshot", 6)
    assert newest is not None and newest.manifest.windows == [WINDOW, *windows]
    assert (newest.manifest.event_time_min_us, newest.manifest.event_time_max_us) == (5, 65)
    assert not [path for path in read if "snapshot-0/" in path or "delta-3/" in path], "the past is not read again"


def test_the_log_goes_on_after_compaction_and_retention(root: str) -> None:
    small_log(root)
    storage, writer = Storage(root), LogWriter(Storage(root), "ranker", 1)
    compact(storage, "ranker", 1)
    deleted = retain(storage, "ranker", 1, keep=0)
    assert len(deleted) == 9 and all("/delta-" in path and not path.endswith("manifest.json") for path in deleted)
    assert retain(storage, "ranker", 1, keep=0) == []
    trainer = TinyTrainer(seed=5)
    trainer.write("item", 1000)
    publish_delta(writer, trainer, 4)
    loaded = reader_of(root).load(with_state=True)
    assert loaded.n == 4 and 1000 in loaded.tables["item"].keys
    assert read_all(reader_of(root)) == 4
    with pytest.raises(AlreadyExists):
        publish_delta(writer, trainer, 2)  # its manifest still owns the number
    assert reader_of(root).manifest(2).metrics == {"auc_click": 0.52}


def test_time_travel_into_what_retention_gave_up_is_refused_with_the_points_left(root: str) -> None:
    small_log(root)
    compact(Storage(root), "ranker", 1)
    retain(Storage(root), "ranker", 1, keep=0)
    with pytest.raises(BadInput, match="sync point 2 of ranker 1 was given up by retention; restorable are 0, 3"):
        reader_of(root).load(as_of=2)
    assert reader_of(root).load(as_of=0).n == 0  # the frozen model is kept for ever


def test_retention_keeps_the_sync_points_asked_for(root: str) -> None:
    storage, trainer, writer = Storage(root), TinyTrainer(), LogWriter(Storage(root), "ranker", 1)
    held = [trainer.everything(0)]
    writer.publish_snapshot(0, held[0])
    for n in range(1, 7):
        trainer.write("item", n)
        held.append(publish_delta(writer, trainer, n))
        if n % 2 == 0:
            compact(storage, "ranker", 1)
    retain(storage, "ranker", 1, keep=1)
    assert reader_of(root).snapshots() == [0, 4, 6]
    for n in (4, 5, 6):
        assert identical(reader_of(root).load(as_of=n, with_state=True), held[n])
    with pytest.raises(BadInput, match="given up"):
        reader_of(root).load(as_of=3)


def test_a_load_lists_the_log_once(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_log(root)
    listed = listings(monkeypatch)
    assert reader_of(root).load(as_of=2).n == 2
    assert listed == ["parameters/ranker/1"]


def test_retention_lists_a_long_log_as_often_as_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = listings(monkeypatch)
    times = set()
    for deltas in (3, 9):
        root = f"file://{tmp_path}/{deltas}"
        small_log(root, deltas)
        listed.clear()
        assert retain(Storage(root), "ranker", 1, keep=0) == []
        times.add(len(listed))
    assert len(times) == 1


def test_retention_deletes_nothing_when_the_new_snapshot_cannot_be_read(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    small_log(root)
    compact(Storage(root), "ranker", 1)
    damaged = next((tmp_path / "parameters/ranker/1/snapshot-3").glob("*-state.safetensors"))
    damaged.write_bytes(b"")
    before = files_of(root)
    with pytest.raises(CorruptLog, match="truncated"):
        retain(Storage(root), "ranker", 1, keep=0)
    assert files_of(root) == before


def test_a_reader_that_loses_its_deltas_to_retention_plans_again(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = small_log(root)
    reader = reader_of(root)
    once: list[bool] = []
    original = LogReader._read

    def read(self: LogReader, manifest, with_state: bool) -> Parameters:  # type: ignore[no-untyped-def]
        parameters = original(self, manifest, with_state)
        if not once:
            once.append(True)
            compact(Storage(root), "ranker", 1)
            retain(Storage(root), "ranker", 1, keep=0)
        return parameters

    monkeypatch.setattr(LogReader, "_read", read)
    assert identical(reader.load(with_state=True), held[3])


def test_files_of_dead_attempts_are_swept(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    small_log(root)
    stray = tmp_path / "parameters/ranker/1/delta-2/dead-tables.safetensors"
    pending = tmp_path / "parameters/ranker/1/delta-4/alive-tables.safetensors"
    for path in (stray, pending):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    assert retain(Storage(root), "ranker", 1, keep=100) == ["parameters/ranker/1/delta-2/dead-tables.safetensors"]
    assert pending.exists()  # may belong to a publish in progress
