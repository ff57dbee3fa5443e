"""The rollout step over real files: what it observes, what it records, and that it survives crashes and races."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from components.config import cli
from components.errors import AlreadyExists, BadInput, CorruptLog, FreshetError
from components.parameters.log import manifest_path
from components.rollout import follow, record
from components.rollout import run as rollout
from components.rollout.assignment import BUCKETS, bucket, serves_challenger
from components.rollout.config import RolloutConfig
from components.rollout.follow import RolloutStopped
from components.rollout.observe import arm_counts, newest_version, observe
from components.rollout.policy import Policy
from components.rollout.state import Release, RolloutState
from components.storage import LocalFiles, Storage
from tests.components.rollout_store import counts, log_shadow, log_traffic, publish, status_server

RULES: dict[str, Any] = {
    "shares": "3000",
    "min_samples": 200,
    "shadow_samples": 50,
    "min_bake_s": 0,
    "settle_s": 0,
    "max_quality_drop": 0.2,
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    store = Storage(f"file://{tmp_path}")
    publish(store, 1)
    publish(store, 2, auc=0.72)
    return store


def go(storage: Storage, action: str = "advance", **settings: Any) -> rollout.RolloutResult:
    settings = {"server_url": "none", "tracking_uri": "none", **RULES, **settings}
    return rollout.run(RolloutConfig(root=storage.root, action=action, **settings))


def first_champion(storage: Storage) -> None:
    go(storage, "start", ranker=1, retriever=1)
    assert go(storage).stage == "promoted"


def canary(storage: Storage, **settings: Any) -> RolloutState:
    """A rollout of version 2 that has come to its canary step."""
    first_champion(storage)
    go(storage, "start", ranker=2, retriever=2, **settings)
    assert go(storage).stage == "shadow"
    log_shadow(storage, datetime.now(UTC), 2, requests=60)
    assert go(storage).stage == "canary"
    return record.current(storage)


def test_logged_traffic_leads_a_release_to_champion(storage: Storage) -> None:
    state = canary(storage)
    assert go(storage).waiting_for == "0 of 200 impressions in the smaller arm"
    log_traffic(storage, state, datetime.now(UTC), range(300), {"champion": 0.5, "challenger": 0.6})
    done = go(storage)
    assert (done.stage, done.champion, done.share) == ("promoted", Release(ranker=2, retriever=2), 0)
    stages = [entry.stage for entry in record.history(storage)]
    assert stages == ["gate", "promoted", "gate", "shadow", "canary", "promoted"]
    assert [entry.seq for entry in record.history(storage)] == list(range(6))
    assert record.current(storage).evidence["champion"]["impressions"] > 0, "a decision keeps its evidence"


def test_logged_traffic_that_clicks_less_rolls_the_release_back(storage: Storage) -> None:
    state = canary(storage)
    log_traffic(storage, state, datetime.now(UTC), range(300), {"champion": 0.6, "challenger": 0.2})
    done = go(storage)
    assert (done.stage, done.champion) == ("rolled_back", Release(ranker=1, retriever=1))


def test_the_gate_names_a_damaged_manifest_of_the_candidate(storage: Storage) -> None:
    go(storage, "start", ranker=1, retriever=1)
    storage.write_bytes(manifest_path("ranker", 1, "snapshot", 0), b"{")
    with pytest.raises(CorruptLog, match=r"ranker/1/snapshot-0/manifest\.json is truncated"):
        go(storage)


def test_failing_shadow_requests_roll_the_release_back(storage: Storage) -> None:
    first_champion(storage)
    go(storage, "start")
    go(storage)
    log_shadow(storage, datetime.now(UTC), 2, requests=60, failed=30)
    done = go(storage)
    assert done.stage == "rolled_back" and "error rate 0.5" in done.reason


def test_each_event_counts_once_and_only_in_its_period(storage: Storage) -> None:
    state = canary(storage)
    at = datetime.now(UTC)
    log_traffic(storage, state, at, range(100), {"champion": 0.5, "challenger": 1})
    log_traffic(storage, state, at - timedelta(hours=1), range(500, 600), {"champion": 1, "challenger": 1})
    log_traffic(storage, state, at + timedelta(hours=1), range(600, 700), {"champion": 1, "challenger": 1})
    arms, wrong = arm_counts(storage, state, Policy(**RULES), state.stage_since, at + timedelta(seconds=1))
    mine = sum(serves_challenger(user, state.salt, 3000) for user in range(100))
    assert (arms["challenger"].users, arms["champion"].users, wrong) == (mine, 100 - mine, 0)
    assert arms["challenger"].impressions == mine * 10 and arms["challenger"].hits == mine * 10
    other = state.model_copy(update={"salt": "another"})
    assert arm_counts(storage, other, Policy(**RULES), state.stage_since, at + timedelta(seconds=1))[1] > 10


def test_the_servers_counts_are_needed_and_judged(storage: Storage) -> None:
    status = counts(2, RolloutState())
    with status_server(status) as url:
        state = canary(storage, server_url=url)
        log_traffic(storage, state, datetime.now(UTC), range(300), {"champion": 0.5, "challenger": 0.6})
        status.update(tracks={})
        assert "shows no challenger yet" in go(storage, server_url=url).waiting_for
        status.update(counts(7, state))
        assert "another challenger" in go(storage, server_url=url).waiting_for
        status.update(counts(2, state, errors=100))
        done = go(storage, server_url=url)
        assert done.stage == "rolled_back" and "error rate 0.2" in done.reason


def test_a_damaged_event_file_gives_no_verdict_and_stops_neither_a_guardrail_nor_an_abort(storage: Storage) -> None:
    status = counts(2, RolloutState())
    with status_server(status) as url:
        state = canary(storage, server_url=url)
        at = datetime.now(UTC)
        log_traffic(storage, state, at, range(300), {"champion": 0.5, "challenger": 0.6})
        damaged = f"events/actions/dt={at:%Y-%m-%d}/hour={at:%H}/damaged.parquet"
        storage.write_bytes(damaged, b"PAR1 and no more")
        status.update(counts(2, state))
        held = go(storage, server_url=url)
        assert held.stage == "canary" and damaged in held.waiting_for
        paused = go(storage, "pause", server_url=url)
        assert (paused.stage, go(storage, "resume", server_url=url).stage) == ("paused", "canary")
        status.update(counts(2, record.current(storage), errors=100))
        assert go(storage, server_url=url).stage == "rolled_back"


def test_an_abort_does_not_look_at_the_evidence(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be what is broken, and reading all of a long stage takes its time."""
    canary(storage)

    def broken(*_: object) -> Any:
        raise OSError("the event log cannot be read")

    monkeypatch.setattr(rollout, "observe", broken)
    assert go(storage, "abort").stage == "rolled_back"


def test_event_files_without_optional_columns_are_no_traffic_of_a_rollout(storage: Storage) -> None:
    state = canary(storage)
    at = datetime.now(UTC)
    log_traffic(storage, state, at, range(300), {"champion": 0.5, "challenger": 0.6})
    folder = f"events/impressions/dt={at:%Y-%m-%d}/hour={at:%H}"
    table = storage.read_table(storage.list(folder)[0])
    storage.write_table(f"{folder}/foreign.parquet", table.drop_columns(["version", "delta", "track", "score"]))
    assert go(storage).stage == "promoted"


def test_counts_of_another_stage_decide_nothing(storage: Storage) -> None:
    """Until the server follows the stage, its counts are of requests from before: too good or too bad."""
    status = counts(2, RolloutState())
    with status_server(status) as url:
        state = canary(storage, server_url=url)
        log_traffic(storage, state, datetime.now(UTC), range(300), {"champion": 0.5, "challenger": 0.6})
        before = state.model_copy(update={"stage_since": state.stage_since - timedelta(microseconds=1)})
        for errors in (0, 500):
            status.update(counts(2, before, errors=errors))
            held = go(storage, server_url=url)
            assert (held.stage, held.changed) == ("canary", False)
            assert "counts are of another one" in held.waiting_for
        status.update(counts(2, state))
        assert go(storage, server_url=url).stage == "promoted"


def test_a_silent_server_holds_the_rollout_where_it_is(storage: Storage) -> None:
    state = canary(storage)
    log_traffic(storage, state, datetime.now(UTC), range(300), {"champion": 0.5, "challenger": 0.6})
    held = go(storage, server_url="http://127.0.0.1:9")
    assert (held.stage, held.changed) == ("canary", False) and "127.0.0.1:9" in held.waiting_for


def test_start_without_versions_takes_the_newest_published_ones(storage: Storage) -> None:
    assert newest_version(storage, "ranker") == 2
    assert go(storage, "start").subject == Release(ranker=2, retriever=2)
    with pytest.raises(BadInput, match="ranker version 9"):
        go(storage, "start", ranker=9)


def test_orders_that_do_not_fit_say_what_does(storage: Storage) -> None:
    with pytest.raises(BadInput, match="start one"):
        go(storage, "approve")
    go(storage, "start", ranker=2, retriever=2)
    with pytest.raises(BadInput, match=r"not of ranker 1 \+ retriever 1;"):
        go(storage, ranker=1, retriever=1)


def test_one_of_the_two_versions_is_enough_to_name_a_release(storage: Storage) -> None:
    go(storage, "start", ranker=2, retriever=2)
    for refused in ({"ranker": 1}, {"retriever": 1}, {"ranker": 2, "retriever": 1}):
        with pytest.raises(BadInput, match="the latest rollout is of ranker 2"):
            go(storage, "abort", **refused)
    with pytest.raises(BadInput, match="not of retriever 1;"):
        go(storage, "abort", retriever=1)
    assert go(storage, "pause", retriever=2).subject == Release(ranker=2, retriever=2)
    assert go(storage, "abort", ranker=2).stage == "rolled_back"


def test_of_two_deciders_one_decides(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    go(storage, "start", ranker=2, retriever=2)
    real = rollout.step
    raced: list[bool] = []

    def slow_step(*arguments: Any) -> Any:
        if not raced:  # while this decider thinks, somebody aborts
            raced.append(True)
            go(storage, "abort", by="ana")
        return real(*arguments)

    monkeypatch.setattr(rollout, "step", slow_step)
    after = go(storage)
    assert (after.stage, after.changed) == ("rolled_back", False)
    assert [entry.stage for entry in record.history(storage)] == ["gate", "rolled_back"]


def test_a_decision_that_others_always_forestall_may_be_tried_again(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: object) -> None:
        raise AlreadyExists("serving/rollout/00000000.json")

    monkeypatch.setattr(record, "append", taken)
    with pytest.raises(FreshetError, match="others decided first") as lost:
        go(storage, "start")
    assert lost.value.exit_code == 1


def test_the_record_never_changes_an_entry(storage: Storage) -> None:
    go(storage, "start", ranker=1, retriever=1)
    state = record.current(storage)
    with pytest.raises(AlreadyExists):
        record.append(storage, state.model_copy(update={"reason": "forged"}))
    assert record.current(storage) == state


def test_a_crash_before_the_aliases_is_repaired_by_the_next_step(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    aliases: dict[tuple[str, str], int] = {}

    class Registry:
        up = False

        def __init__(self, uri: str) -> None:
            if not Registry.up:
                raise FreshetError("no MLflow server answers")

        def set_alias(self, model: str, alias: str, version: int) -> None:
            aliases[model, alias] = version

        def delete_alias(self, model: str, alias: str) -> None:
            aliases.pop((model, alias), None)

    monkeypatch.setattr("components.registry.Registry", Registry)
    with pytest.raises(FreshetError, match="no MLflow"):
        go(storage, "start", ranker=1, retriever=1, tracking_uri="http://registry")
    assert record.current(storage).stage == "gate", "the decision stands"
    Registry.up = True
    go(storage, "status", tracking_uri="http://registry")
    assert aliases == {}, "looking changes nothing"
    go(storage, "abort", tracking_uri="http://registry")
    assert aliases == {}
    go(storage, "start", ranker=2, retriever=2, tracking_uri="http://registry")
    assert aliases == {("ranker", "challenger"): 2, ("retriever", "challenger"): 2}
    aliases.clear()
    go(storage, "start", ranker=2, retriever=2, tracking_uri="http://registry")
    assert len(aliases) == 2, "an unchanged state repairs its aliases too"


def test_aliases_end_as_the_record_does_whoever_sets_them_last(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[tuple[str, str], int] = {}
    where: Any = {"tracking_uri": "http://registry"}

    class Registry:
        aborts: ClassVar[list[str]] = []

        def __init__(self, uri: str) -> None:
            if self.aborts:  # while this decider is on its way to the registry, somebody aborts
                go(storage, self.aborts.pop(), **where)

        def set_alias(self, model: str, alias: str, version: int) -> None:
            found[model, alias] = version

        def delete_alias(self, model: str, alias: str) -> None:
            found.pop((model, alias), None)

    monkeypatch.setattr("components.registry.Registry", Registry)
    canary(storage)
    Registry.aborts.append("abort")
    go(storage, "pause", **where)
    assert record.current(storage).stage == "rolled_back"
    assert found == {("ranker", "champion"): 1, ("retriever", "champion"): 1}


def test_waiting_until_promoted_ends_with_the_promotion(storage: Storage) -> None:
    first_champion(storage)

    def come_to(stage: str) -> RolloutState:
        while (state := record.current(storage)).stage != stage:
            assert not task.done(), task.result()
            time.sleep(0.05)
        return state

    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(
            lambda: go(storage, "start", ranker=2, retriever=2, until="promoted", poll_s=0.05, wait_s=60)
        )
        come_to("shadow")
        log_shadow(storage, datetime.now(UTC), 2, requests=60)
        log_traffic(storage, come_to("canary"), datetime.now(UTC), range(300), {"champion": 0.5, "challenger": 0.7})
        assert task.result().stage == "promoted"
    assert go(storage, ranker=2, retriever=2, until="canary").stage == "promoted", "a task run again ends at once"
    assert go(storage, "start", ranker=2, retriever=2, until="gate").champion == Release(ranker=2, retriever=2)


def test_waiting_reads_each_event_file_once_however_often_it_decides(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the server's guardrails, which are judged with them, would wait ever longer in a long stage."""
    log_traffic(storage, canary(storage), datetime.now(UTC), range(9), {"champion": 0.5, "challenger": 0.5})
    polls, read = list[float](), Counter[str]()
    original = LocalFiles.read

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 5:
            go(storage, "abort")

    def noted(self: LocalFiles, path: str) -> bytes:
        read[path] += 1
        return original(self, path)

    monkeypatch.setattr(follow, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    monkeypatch.setattr(LocalFiles, "read", noted)
    with pytest.raises(RolloutStopped):
        go(storage, until="promoted")
    events = [path for path in read if path.startswith("events/")]
    assert len(polls) == 5 and events
    assert max(read[path] for path in events) == 2, "before it begins to wait, and while it waits"


def test_waiting_fails_loudly_when_the_release_is_rejected(storage: Storage) -> None:
    first_champion(storage)
    publish(storage, 3, auc=0.4)
    with pytest.raises(RolloutStopped, match=r"ranker 3 \+ retriever 3 was rejected: ranker.auc_click >= 0.5"):
        go(storage, "start", ranker=3, retriever=3, until="gate")
    where = [f"--root={storage.root}", "--tracking-uri=none", "--server-url=none"]
    again = [*where, "--ranker=3", "--retriever=3", "--until=gate"]
    assert cli(RolloutConfig, rollout.run, again) == 2, "to ask again cannot help: no retry"


def test_waiting_for_a_paused_rollout_says_so_and_gives_up_in_time(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(storage, 4)
    go(storage, "start", ranker=4, retriever=4, gate_limits="ranker.unknown>=1")
    with pytest.raises(BadInput, match="still in stage paused"):
        go(storage, until="gate", poll_s=0.01, wait_s=0.36)
    told = capsys.readouterr().err
    assert told.count("PAUSED, waiting 0.0001 h (--wait-s) at most for a person's decision: --action=resume") == 1
    assert "ranker.unknown" in told


def test_the_command_line_runs_a_step_and_refuses_wrong_settings(
    storage: Storage, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = [f"--root={storage.root}", "--tracking-uri=none", "--server-url=none"]
    command = [sys.executable, "-m", "components.rollout", "--action=start", *where]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["stage"] == "gate"
    for wrong, told in (
        ("--shares=5000,100", "rising bucket counts"),
        ("--gate-limits=auc>0.5", "ranker.auc_click>=0.5"),
        ("--quality-action=stare", "known actions are"),
        ("--alpha=2", "--alpha"),
    ):
        assert cli(RolloutConfig, rollout.run, [*where, wrong]) == 2
        assert told in capsys.readouterr().err


def test_a_status_of_nothing_is_an_answer(tmp_path: Path) -> None:
    empty = go(Storage(f"file://{tmp_path}/new"), "status")
    assert (empty.stage, empty.seq, empty.champion) == ("empty", -1, None)


def test_buckets_are_stable_even_and_only_added() -> None:
    assert bucket(42, "salt") == bucket(42, "salt") != bucket(42, "other salt")
    assert [bucket(user, "0-1-1") for user in (0, 1, -5)] == [4253, 5572, 5595]
    assert [serves_challenger(0, "0-1-1", share) for share in (4253, 4254)] == [False, True]
    users = range(20_000)
    for share in (100, 5000):
        served = sum(serves_challenger(user, "s", share) for user in users)
        assert abs(served / len(users) - share / BUCKETS) < 0.01
    small = {user for user in users if serves_challenger(user, "s", 1000)}
    assert small < {user for user in users if serves_challenger(user, "s", 2500)}


def test_nothing_is_observed_of_stages_that_wait_for_no_evidence(storage: Storage) -> None:
    state = RolloutState(stage="approval", challenger=Release(ranker=2, retriever=2), policy=Policy())
    seen = observe(storage, state, datetime.now(UTC), "http://127.0.0.1:9")
    assert seen.champion.users == 0 and seen.notes == ()
