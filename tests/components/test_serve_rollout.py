"""Rollout: the server follows the record; users keep their track, and the challenger harms nobody in shadow."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from components.rollout.assignment import bucket
from components.rollout.state import Release
from components.serve import recommender
from components.serve.config import ServeConfig
from components.serve.engine import Track
from components.serve.server import Server
from components.serve.shadow import sampled
from components.storage import Storage
from model.trainer import Trainer
from tests.components.serving import (
    ITEM_IDS,
    Live,
    build,
    publish,
    read_log,
    release,
    train_delta,
    wait_for,
)

ONE, TWO = Release(ranker=1, retriever=1), Release(ranker=2, retriever=2)


def second_version(storage: Storage) -> None:
    """Ranker 2 and retriever 2: fresh, untrained, so that their scores are others."""
    for name in ("ranker", "retriever"):
        model = build(name)
        publish(storage, name, 2, model, Trainer(model))


def test_users_stay_on_their_track_while_the_share_grows(toy_root: Path) -> None:
    storage = Storage(f"file://{toy_root}")
    second_version(storage)
    users = range(200)
    tracks: dict[int, dict[int, str]] = {}
    with Live(toy_root) as live:
        for share in (0, 2000, 6000, 10_000):
            stage = {"stage": "canary", "champion": ONE, "challenger": TWO, "share": share, "salt": "s"}
            state = release(storage, **stage)
            wait_for(lambda seq=state.seq: live.seq() == seq)
            answers = {user: live.rank(user, [ITEM_IDS[0]]) for user in users}
            tracks[share] = {user: answer["track"] for user, answer in answers.items()}
            assert all((a["track"] == "challenger") == (a["version"] == 2) for a in answers.values())
            assert all((t == "challenger") == (bucket(u, "s") < share) for u, t in tracks[share].items())
        counts = live.status()["tracks"]["challenger"]
    challengers = [{u for u, t in tracks[s].items() if t == "challenger"} for s in sorted(tracks)]
    assert challengers[0] == set() and challengers[-1] == set(users)
    assert all(small < large for small, large in pairwise(challengers))
    assert counts["requests"] == sum(map(len, challengers)) and counts["errors"] == 0


def test_promotion_and_rollback_change_a_pointer_and_keep_both_loaded(toy_root: Path) -> None:
    storage = Storage(f"file://{toy_root}")
    second_version(storage)
    with Live(toy_root) as live:
        release(storage, stage="promoted", champion=TWO, previous=ONE)
        wait_for(lambda: live.rank(1, [ITEM_IDS[0]])["version"] == 2)
        kept = live.server.engine._loaded["ranker", 1]
        train_delta(storage, "ranker")  # the old champion keeps learning
        wait_for(lambda: kept.n == 1)
        release(storage, stage="rolled_back", champion=ONE)
        wait_for(lambda: live.rank(1, [ITEM_IDS[0]])["version"] == 1)
        assert live.server.engine._loaded["ranker", 1] is kept
        wait_for(lambda: ("ranker", 2) not in live.server.engine._loaded)


def test_a_champion_that_cannot_be_loaded_leaves_the_old_one_serving(toy_root: Path) -> None:
    with Live(toy_root) as live:
        release(live.storage, stage="promoted", champion=Release(ranker=9, retriever=9))
        wait_for(lambda: live.status()["errors"])
        assert "components.publish" in live.status()["errors"]["ranker 9"]
        assert live.rank(1, [ITEM_IDS[0]])["version"] == 1 and live.status()["ready"]


def test_a_ranker_that_the_score_weights_do_not_know_does_not_serve(toy_root: Path) -> None:
    with Live(toy_root, score_weights="rating=1") as live:
        answers = [live.client.get("/readyz"), live.client.post("/v1/rank", json={"user_id": 1, "candidates": [1]})]
    for answer in answers:
        assert answer.status_code == 503 and "--score-weights=click=1" in answer.json()["error"]


def test_a_server_that_cannot_read_the_record_says_so_and_not_that_it_is_starting(toy_root: Path) -> None:
    (toy_root / "serving" / "rollout" / "00000000.json").write_text("{")
    server = Server(ServeConfig(root=f"file://{toy_root}", sync_interval_s=0.01))
    server.start()
    wait_for(lambda: server.engine.errors, 30)
    reason = server.engine.why_not_ready()
    server.stop()
    assert reason is not None and "restore it from a backup" in reason


def test_a_challenger_that_cannot_be_loaded_costs_its_users_nothing(toy_root: Path) -> None:
    with Live(toy_root) as live:
        state = {"champion": ONE, "challenger": Release(ranker=9, retriever=9), "share": 10_000}
        release(live.storage, stage="canary", **state)
        wait_for(lambda: live.status()["errors"])
        assert live.rank(1, [ITEM_IDS[0]])["track"] == "champion"
        assert live.metric("freshet_challenger_fallbacks_total") == 1


def test_a_store_that_is_away_changes_nothing_that_serves(toy_root: Path) -> None:
    """An empty mount point looks like a store in which nothing has been released."""
    with Live(toy_root) as live:
        away = (toy_root / "serving" / "rollout").rename(toy_root / "away")
        wait_for(lambda: "sync" in live.status()["errors"], 10)
        assert "bring the store back" in live.status()["errors"]["sync"]
        assert live.rank(1, [ITEM_IDS[0]])["version"] == 1 and live.client.get("/readyz").status_code == 200
        away.rename(toy_root / "serving" / "rollout")
        wait_for(lambda: not live.status()["errors"], 10)


def shadow_rows(live: Live, requests: int) -> list[dict[str, Any]]:
    def arrived() -> bool:
        live.server.journal.flush()
        return len({r["request_id"] for r in read_log(live.storage, "serving/shadow")}) >= requests

    wait_for(arrived)
    return read_log(live.storage, "serving/shadow")


def test_in_shadow_the_challenger_scores_what_the_champion_showed(toy_root: Path) -> None:
    storage = Storage(f"file://{toy_root}")
    second_version(storage)
    with Live(toy_root) as live:
        state = release(storage, stage="shadow", champion=ONE, challenger=TWO, shadow_share=1.0)
        wait_for(lambda: live.seq() == state.seq)
        recommended, ranked = live.recommend(1, k=7), live.rank(1, ITEM_IDS[:5])
        rows = shadow_rows(live, 2)
        counts = live.status()["tracks"]["challenger"]["shadow"]
    assert recommended["track"] == ranked["track"] == "champion"
    for answer in (recommended, ranked):
        logged = {r["item_id"]: r for r in rows if r["request_id"] == answer["request_id"]}
        assert {i: r["champion_score"] for i, r in logged.items()} == pytest.approx(
            {item["item_id"]: item["score"] for item in answer["items"]}
        )
        assert all(r["version"] == 2 and r["delta"] == 0 and r["error"] is None for r in logged.values())
        assert all(r["score"] != r["champion_score"] for r in logged.values())
    assert counts["requests"] == 2 and counts["errors"] == 0


def test_the_shadow_log_names_the_delta_that_scored(toy_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(f"file://{toy_root}")
    second_version(storage)
    score = recommender.score

    def then_a_delta_goes_live(track: Track, *request: Any) -> recommender.Scores:
        scores = score(track, *request)
        if track.name == "challenger":
            train_delta(storage, "ranker", 2)
            wait_for(lambda: track.ranker.n == 1, 30)
        return scores

    with Live(toy_root) as live:
        state = release(storage, stage="shadow", champion=ONE, challenger=TWO, shadow_share=1.0)
        wait_for(lambda: live.seq() == state.seq, 10)
        monkeypatch.setattr(recommender, "score", then_a_delta_goes_live)
        live.rank(1, ITEM_IDS[:2])
        assert {r["delta"] for r in shadow_rows(live, 1)} == {0}


def test_errors_of_the_challenger_in_shadow_are_counted_and_harm_nobody(toy_root: Path) -> None:
    storage = Storage(f"file://{toy_root}")
    second_version(storage)
    with Live(toy_root) as live:
        state = release(storage, stage="shadow", champion=ONE, challenger=TWO, shadow_share=1.0)
        wait_for(lambda: live.seq() == state.seq)
        with live.server.engine._loaded["ranker", 2].reading() as served:
            served.model.score = None  # type: ignore[method-assign,assignment]
        answers = [live.rank(user, ITEM_IDS[:5]) for user in range(3)]
        rows = shadow_rows(live, 3)
        assert all(len(answer["items"]) == 5 for answer in answers)
        assert len(rows) == 3 and all("TypeError" in r["error"] and r["item_id"] is None for r in rows)
        assert live.metric('freshet_shadow_requests_total{outcome="failed"}') == 3
        assert live.status()["tracks"]["challenger"]["shadow"]["errors"] == 3


def test_a_stage_counts_its_own_requests_and_none_from_before(toy_root: Path) -> None:
    """A release may have served, or failed, long before: that says nothing about the stage that it is in now."""
    storage = Storage(f"file://{toy_root}")
    second_version(storage)
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    canary = {"stage": "canary", "champion": ONE, "challenger": TWO, "share": 10_000, "salt": "s"}
    with Live(toy_root) as live:

        def counted() -> tuple[int, int]:
            counts = live.status()["tracks"]["challenger"]
            return counts["requests"], counts["errors"]

        def enter(since: datetime) -> None:
            state = release(storage, **canary, stage_since=since)
            wait_for(lambda: live.seq() == state.seq)

        enter(begun)
        for user in range(3):
            live.rank(user, ITEM_IDS[:2])
        enter(begun)  # another entry of the same stage, as after a look
        assert counted() == (3, 0)
        late = live.server.engine.assign(1)
        enter(begun + timedelta(hours=1))
        assert counted() == (0, 0) and live.status()["tracks"]["challenger"]["p99_ms"] is None
        live.rank(1, ITEM_IDS[:2])
        live.server.tally.add(late.since, late.release, "serving", 60.0, failed=True)  # assigned before, fails now
        assert counted() == (1, 0)
        assert datetime.fromisoformat(live.status()["stage_since"]) == begun + timedelta(hours=1)


def test_only_the_given_share_of_requests_is_shadowed() -> None:
    assert sum(sampled(i * 7919, 0.2) for i in range(5000)) / 5000 == pytest.approx(0.2, abs=0.02)
    assert not any(sampled(i, 0.0) for i in range(100)) and all(sampled(i, 1.0) for i in range(100))
