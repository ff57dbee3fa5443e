"""Sync: the server follows the parameter logs, whatever happens to them, and what others write."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.parameters import bridge
from components.parameters import log as parameter_log
from components.parameters.compaction import compact
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.rollout.state import Release
from components.schemas import ACTION_EVENTS
from components.serve import engine, loaded
from components.serve.config import ServeConfig
from components.serve.eventfiles import EventFiles
from components.serve.history import History
from components.serve.server import Server
from components.storage import Storage
from model.retriever import Retriever
from model.serving_table import PRECISIONS, served_weights
from model.trainer import Trainer
from tests.components.serving import (
    ITEM_IDS,
    Live,
    build,
    clicks,
    items_of,
    publish,
    release,
    sessions,
    train_delta,
    wait_for,
)


def assert_equal_to_the_bit(served: Any, trained: Any) -> None:
    for slot, table in trained.tables().items():
        ours, theirs = served.tables[slot], table.export_all()
        assert len(ours) == len(theirs.keys) > 0
        expected = served_weights(theirs.weights, ours.precision)
        assert ours.lookup(theirs.keys, missing="zeros").numpy().tobytes() == expected.numpy().tobytes()
    for name, value in trained.state_dict().items():
        assert served.model.state_dict()[name].numpy().tobytes() == value.numpy().tobytes()


def damage(storage: Storage, n: int, version: int = 1) -> tuple[str, bytes]:
    """Flip one byte of the rows of a ranker delta; returns path and content of the sound file."""
    path = LogReader(storage, "ranker", version).manifest(n).files["tables"].path
    content = storage.read_bytes(path)
    storage.write_bytes(path, content[:-1] + bytes([content[-1] ^ 1]))
    return path, content


@pytest.mark.parametrize("precision", PRECISIONS)
def test_after_a_sync_the_parameters_are_the_trainers_in_the_declared_precision_to_the_bit(
    toy_root: Path, precision: str
) -> None:
    with Live(toy_root, table_precision=precision) as live:
        live.events(**clicks(500, items_of(2)[:5], request_id=1))
        before = {item["item_id"]: item["score"] for item in live.rank(500, ITEM_IDS)["items"]}
        age = live.status()["tracks"]["champion"]["ranker"]["served_event_age_s"]
        for n in (1, 2):
            for name in ("ranker", "retriever"):
                trained = train_delta(live.storage, name)
                live.wait_for_delta(n, name)
                with live.server.engine._loaded[name, 1].reading() as served:
                    assert_equal_to_the_bit(served, trained)
        answer = live.rank(500, ITEM_IDS)
        assert answer["delta"] == 2
        assert {item["item_id"]: item["score"] for item in answer["items"]} != before
        assert live.status()["tracks"]["champion"]["ranker"]["served_event_age_s"] < min(age, 60)
        assert live.metric('freshet_delta_number{model="ranker",track="champion",version="1"}') == 2
        assert live.metric('freshet_apply_seconds_count{model="ranker"}') == 2


def test_requests_share_the_vectors_of_items_until_parameters_or_catalogue_change(
    toy_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, original = list[int](), Retriever.item_vectors

    def note(self: Retriever, ids: np.ndarray, events: None = None) -> torch.Tensor:
        made.append(len(ids))
        return original(self, ids, events)

    monkeypatch.setattr(Retriever, "item_vectors", note)
    with Live(toy_root) as live:

        def best() -> list[int]:
            """Requests of several users, and what the parameters of now say beside it."""
            made.clear()
            for user in range(3):
                live.recommend(user, exclude=ITEM_IDS[user : user + 2])
            live.recommend(NEWCOMER, k=5)
            requested = made[:]
            with live.server.engine.assign(NEWCOMER).retriever.reading() as served:
                assert isinstance(served.model, Retriever)
                anew = served.model.item_vectors(np.array(ITEM_IDS))
                assert torch.equal(served.item_vectors(np.array(ITEM_IDS)), anew)
            return requested

        assert max(best()) <= len(ITEM_IDS) and best() == []
        train_delta(live.storage, "retriever")
        live.wait_for_delta(1, "retriever")
        assert best() != [] and best() == []
        live.server.engine.set_catalogue()
        assert best() != []


def test_erased_rows_are_erased_in_the_server_too(toy_root: Path) -> None:
    storage = Storage(f"file://{toy_root}")
    with Live(toy_root) as live:
        reader = LogReader(storage, "ranker", 1)
        model = build("ranker")
        trainer = Trainer(model)
        bridge.load_into(trainer, reader.load(with_state=True))
        since = bridge.close_epochs(trainer)
        assert model.tables()["item_bias"].erase(np.array(ITEM_IDS[:5], np.int64)) == 5
        LogWriter(storage, "ranker", 1).publish_delta(
            1, bridge.export_changes(trainer, since, 1), windows=[], event_range=None, metrics={}
        )
        live.wait_for_delta(1)
        known = {item["item_id"]: item["known"] for item in live.rank(1, ITEM_IDS)["items"]}
        assert [known[item] for item in ITEM_IDS[:6]] == [False] * 5 + [True]


def test_a_weight_of_which_scores_could_overflow_is_refused(toy_root: Path) -> None:
    """Overflow would make every score of a request NaN, not only that of its own item."""
    storage = Storage(f"file://{toy_root}")
    trainer = Trainer(build("ranker"))
    bridge.load_into(trainer, LogReader(storage, "ranker", 1).load(with_state=True))
    since, table = bridge.close_epochs(trainer), trainer.model.tables()["item_bias"]
    with Live(toy_root) as live:
        before = live.rank(NEWCOMER, ITEM_IDS)["items"]
        table.upsert(np.array(ITEM_IDS[:1], np.int64), np.full((1, table.dim), 1e16, np.float32))
        LogWriter(storage, "ranker", 1).publish_delta(
            1, bridge.export_changes(trainer, since, 1), windows=[], event_range=None, metrics={}
        )
        wait_for(lambda: "slot item_bias has weights" in live.status()["errors"].get("ranker 1", ""))
        assert live.rank(NEWCOMER, ITEM_IDS)["items"] == before


def test_no_request_fails_or_sees_half_a_delta_while_deltas_arrive(toy_root: Path) -> None:
    with Live(toy_root, threads=2) as live:
        by_delta: dict[int, set[tuple[float, ...]]] = {}
        failures: list[Exception] = []
        stop = threading.Event()

        def ask() -> None:
            try:
                while not stop.is_set():
                    answer = live.rank(1, ITEM_IDS[:10])
                    scores = {item["item_id"]: item["score"] for item in answer["items"]}
                    by_delta.setdefault(answer["delta"], set()).add(tuple(scores[i] for i in ITEM_IDS[:10]))
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for n in (1, 2, 3):
            train_delta(live.storage, "ranker")
            live.wait_for_delta(n)
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert by_delta.keys() >= {0, 3}
    assert all(len(scores) == 1 for scores in by_delta.values())  # one set of parameters per delta number
    assert len(set.union(*by_delta.values())) == len(by_delta)


NEWCOMER = 987_654
"""Has no history, whose age would change the scores between two looks."""


def test_a_damaged_delta_is_reported_and_the_old_parameters_keep_serving_until_it_is_repaired(
    toy_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "RETRY_S", 0.1)
    with Live(toy_root, sync_interval_s=0.05) as live:
        train_delta(live.storage, "ranker")
        live.wait_for_delta(1)
        scores = live.rank(NEWCOMER, ITEM_IDS)["items"]
        live.server.engine._lock.acquire()  # no sync until the damage is done
        train_delta(live.storage, "ranker")
        trained = train_delta(live.storage, "ranker")
        path, sound = damage(live.storage, 2)
        live.server.engine._lock.release()
        wait_for(lambda: live.status()["errors"])
        status = live.status()
        assert path in status["errors"]["ranker 1"] and status["ready"]
        assert path in status["tracks"]["champion"]["ranker"]["error"]
        assert live.metric('freshet_parameter_log_corrupt{model="ranker",version="1"}') == 1
        assert live.metric("freshet_sync_errors_total") >= 1
        answer = live.rank(NEWCOMER, ITEM_IDS)
        assert answer["delta"] == 1 and answer["items"] == scores
        live.storage.write_bytes(path, sound)
        live.wait_for_delta(3)
        wait_for(lambda: not live.status()["errors"])
        assert live.metric('freshet_resyncs_total{model="ranker"}') == 1
        assert live.metric('freshet_parameter_log_corrupt{model="ranker",version="1"}') == 0
        with live.server.engine._loaded["ranker", 1].reading() as served:
            assert_equal_to_the_bit(served, trained)


def test_a_snapshot_beyond_the_damage_heals_the_server(toy_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "RETRY_S", 0.1)
    storage = Storage(f"file://{toy_root}")
    for _ in range(2):
        train_delta(storage, "ranker")
    compact(storage, "ranker", 1)
    damage(storage, 1)
    with Live(toy_root) as live:
        assert live.rank(1, [ITEM_IDS[0]])["delta"] == 2
        assert live.status()["errors"] == {}


def test_a_server_that_starts_on_a_damaged_log_serves_the_last_sound_point(toy_root: Path) -> None:
    storage = Storage(f"file://{toy_root}")
    for _ in range(3):
        train_delta(storage, "ranker")
    damage(storage, 2)
    with Live(toy_root) as live:
        assert live.rank(1, [ITEM_IDS[0]])["delta"] == 1
        assert "ranker 1" in live.status()["errors"] and live.status()["ready"]


def test_a_log_is_reported_damaged_as_long_as_it_is_damaged_and_followed(
    toy_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "RETRY_S", 0.1)
    one, two = Release(ranker=1, retriever=1), Release(ranker=2, retriever=1)
    corrupt = 'freshet_parameter_log_corrupt{model="ranker",version="2"}'
    with Live(toy_root, sync_interval_s=0.05) as live:
        model = build("ranker")
        publish(live.storage, "ranker", 2, model, Trainer(model))
        path, sound = damage(live.storage, 0, version=2)
        release(live.storage, stage="shadow", champion=one, challenger=two)
        wait_for(lambda: live.status()["errors"])
        assert live.metric(corrupt) == 1
        live.storage.write_bytes(path, sound)
        wait_for(lambda: "challenger" in live.status()["tracks"])
        assert live.metric(corrupt) == 0
        with live.server.engine._lock:  # no sync until the damage is done
            train_delta(live.storage, "ranker", version=2)
            damage(live.storage, 1, version=2)
        wait_for(lambda: live.metric(corrupt) == 1)
        release(live.storage, stage="rolled_back", champion=one)
        wait_for(lambda: corrupt not in live.server.metrics.text().decode())


def test_a_deleted_log_of_the_challenger_keeps_the_server_from_nothing(
    toy_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "RETRY_S", 0.1)
    one, two = Release(ranker=1, retriever=1), Release(ranker=2, retriever=1)
    with Live(toy_root, sync_interval_s=0.05) as live:
        model = build("ranker")
        publish(live.storage, "ranker", 2, model, Trainer(model))
        release(live.storage, stage="shadow", champion=one, challenger=two)
        wait_for(lambda: "challenger" in live.status()["tracks"])
        with live.server.engine._lock:
            train_delta(live.storage, "ranker", version=2)
            damage(live.storage, 1, version=2)
        wait_for(lambda: "checksum" in str(live.status()["errors"]))
        for path in live.storage.list("parameters/ranker/2"):
            live.storage.delete(path)
        wait_for(lambda: "checksum" not in str(live.status()["errors"]))
        train_delta(live.storage, "ranker")
        live.wait_for_delta(1)
        release(live.storage, stage="rolled_back", champion=one)
        wait_for(lambda: live.status()["stage"] == "rolled_back")


def test_a_gap_in_the_log_stops_the_sync_and_is_reported(toy_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "LISTING_S", 0.1)
    with Live(toy_root) as live:
        with live.server.engine._lock:
            for _ in range(2):
                train_delta(live.storage, "ranker")
            live.storage.delete(parameter_log.manifest_path("ranker", 1, "delta", 1))
        wait_for(lambda: "gap" in live.status()["errors"].get("ranker 1", ""))
        assert live.rank(1, [ITEM_IDS[0]])["delta"] == 0


def test_events_that_others_write_reach_the_histories(toy_root: Path) -> None:
    with Live(toy_root, history_refresh_s=0.1) as live:
        impressions, actions = sessions(range(900, 901), 1_760_000_000_000_000)
        live.storage.write_table("events/impressions/dt=2025-10-09/hour=08/batch.parquet", impressions)
        live.storage.write_table("events/actions/dt=2025-10-09/hour=08/batch.parquet", actions)
        wait_for(lambda: len(live.server.history.snapshot(900)[1].action_of) == actions.num_rows)


def test_history_days_bound_what_is_read_at_start(toy_root: Path) -> None:
    storage = Storage(f"file://{toy_root}")
    for day, user in (("2025-10-01", 1), ("2025-10-09", 2)):
        impressions, _ = sessions(range(user, user + 1), 1_760_000_000_000_000)
        storage.write_table(f"events/impressions/dt={day}/hour=08/batch.parquet", impressions)
    server = Server(ServeConfig(root=f"file://{toy_root}", history_days=3))
    server.files.refresh("none")
    assert [len(server.history.snapshot(user)[1]) > 0 for user in (1, 2)] == [False, True]


def test_event_files_beyond_the_horizon_are_forgotten_and_none_is_read_twice(tmp_path: Path) -> None:
    storage, history = Storage(f"file://{tmp_path}"), History(8, 8, 1)
    files, read = EventFiles(storage, history, days=1), []
    original = storage.read_table
    storage.read_table = lambda path: read.append(path) or original(path)  # type: ignore[method-assign, func-returns-value]
    paths = [f"events/actions/dt=2026-03-{day:02}/hour=00/server-other-1.parquet" for day in range(1, 10)]
    for path in paths:
        storage.write_table(path, ACTION_EVENTS.empty_table())
        files.refresh("server-own-")
    assert read == paths and files._seen == set(paths[-2:])
