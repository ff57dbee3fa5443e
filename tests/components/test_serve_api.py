"""The HTTP API: recommendations, and what the server tells about itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from components.serve.api import EventsRecorded, Problem
from components.serve.recommender import arrange, best_first, explore
from tests.components.serving import (
    CATEGORIES,
    ITEM_IDS,
    Live,
    category,
    clicks,
    item_rows,
    items_of,
    now_us,
    wait_for,
)

NEW_USER = 10_000


def test_recommendations_are_complete_and_in_order(live: Live) -> None:
    answer = live.recommend(NEW_USER, k=10)
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert [item["position"] for item in answer["items"]] == list(range(10))
    assert len({item["item_id"] for item in answer["items"]}) == 10
    assert (answer["version"], answer["retriever_version"], answer["delta"]) == (1, 1, 0)
    assert answer["track"] == "champion" and answer["user_id"] == NEW_USER
    assert 0 < answer["request_id"] < 2**53
    assert abs(answer["timestamp_us"] - now_us()) < 5_000_000


def test_five_clicks_on_a_category_change_the_recommendations_at_once(live: Live) -> None:
    changed = 0
    for wanted in range(1, CATEGORIES + 1):
        user = 20_000 + wanted
        before = [category(item["item_id"]) for item in live.recommend(user)["items"]]
        recorded = live.events(**clicks(user, items_of(wanted)[:5], request_id=user))
        assert recorded == {"accepted": 10, "rejected": [], "unmatched_actions": 0}
        after = [category(item["item_id"]) for item in live.recommend(user)["items"]]
        assert after.count(wanted) >= 8
        changed += before.count(wanted) < 8
    assert changed >= CATEGORIES - 1  # without a history at most one category can have had most of the ten


def test_rank_gives_every_head_and_flags_what_it_never_learned(live: Live) -> None:
    answer = live.rank(NEW_USER, [ITEM_IDS[3], 999_999, ITEM_IDS[0], ITEM_IDS[3]])
    assert sorted(item["item_id"] for item in answer["items"]) == sorted([ITEM_IDS[0], ITEM_IDS[3], 999_999])
    assert {item["item_id"]: item["known"] for item in answer["items"]}[999_999] is False
    assert all(item["known"] for item in answer["items"] if item["item_id"] != 999_999)
    first = answer["items"][0]
    assert first["scores"].keys() == {"click", "like"}
    assert first["score"] == pytest.approx(first["scores"]["click"] + 2 * first["scores"]["like"], rel=1e-6)


def test_a_score_does_not_depend_on_the_other_candidates(live: Live) -> None:
    live.events(**clicks(30_000, items_of(2)[:5], request_id=1))
    together = {item["item_id"]: item["score"] for item in live.rank(30_000, ITEM_IDS)["items"]}
    for item in ITEM_IDS[::7]:
        alone = live.rank(30_000, [item])["items"][0]["score"]
        assert alone == pytest.approx(together[item], rel=1e-5)


def test_excluded_items_are_not_recommended(live: Live) -> None:
    excluded = [item["item_id"] for item in live.recommend(NEW_USER, k=20)["items"]]
    assert not set(excluded) & {item["item_id"] for item in live.recommend(NEW_USER, k=20, exclude=excluded)["items"]}


def test_fewer_items_come_back_when_fewer_are_available(live: Live) -> None:
    assert len(live.recommend(NEW_USER, k=100)["items"]) == len(ITEM_IDS)


def test_exploration_is_a_function_of_the_request_and_keeps_its_share() -> None:
    allowed = np.arange(100, 200)
    assert [x.tolist() for x in explore(5, 20, allowed, 0.3)] == [x.tolist() for x in explore(5, 20, allowed, 0.3)]
    share = np.mean([len(explore(i, 20, allowed, 0.1)[0]) / 20 for i in range(2000)])
    assert share == pytest.approx(0.1, abs=0.01)
    slots, items = explore(7, 20, allowed[:3], 1.0)
    assert len(slots) == 3 and len(set(items.tolist())) == 3
    assert [len(x) for x in explore(7, 20, allowed[:0], 1.0)] == [0, 0]


def test_equal_scores_are_ordered_by_id() -> None:
    assert best_first(np.array([30, 10, 20]), np.array([0.5, 0.5, 0.9], np.float32)) == [2, 1, 0]


def test_explored_items_take_their_slots_and_nothing_comes_twice() -> None:
    ids = np.array([10, 20, 30, 40])
    scores = np.array([0.4, 0.3, 0.2, 0.1], np.float32)
    order = arrange(ids, scores, 3, np.array([1]), np.array([10]))
    assert [(int(ids[i]), explored) for i, explored in order] == [(20, False), (10, True), (30, False)]


def test_explored_items_are_flagged(toy_root: Path) -> None:
    with Live(toy_root, exploration=1.0) as live:
        items = live.recommend(1, k=10)["items"]
        assert len(items) == 10 and all(item["explored"] for item in items)


def test_items_are_recommended_only_while_available(toy_root: Path) -> None:
    now = now_us()
    with Live(toy_root, history_refresh_s=0.1) as live:
        storage, hour = live.storage, 3_600_000_000
        storage.write_table("items/u1.parquet", item_rows(items_of(1), available_until=now - 1))
        storage.write_table("items/u2.parquet", item_rows(items_of(2), available_from=now + hour))
        storage.write_table(
            "items/u3.parquet", item_rows(items_of(3), available_from=now - 1, available_until=now + hour)
        )
        (toy_root / "items/u4.parquet").write_bytes(b"PAR1 truncated")
        wanted = set(items_of(3) + items_of(4))
        wait_for(lambda: {item["item_id"] for item in live.recommend(1, k=60)["items"]} == wanted)


def test_metrics_tell_what_is_served(live: Live) -> None:
    live.recommend(1)
    text = live.client.get("/metrics").text
    for sample in (
        'freshet_delta_number{model="ranker",track="champion",version="1"} 0.0',
        'freshet_served_event_age_seconds{model="retriever",track="champion",version="1"}',
        'freshet_requests_total{route="/v1/recommend",status="200",track="champion"}',
        'freshet_request_seconds_bucket{le="0.04",route="/v1/recommend"}',
        "freshet_journal_bytes",
    ):
        assert sample in text


def test_metrics_tell_how_late_events_come(live: Live) -> None:
    """Later than a join allows, they reach no training; later than it looks back, not even the quarantine."""
    buckets = ('{kind="impression",le="86400.0"}', '{kind="impression",le="604800.0"}', '{kind="impression",le="+Inf"}')
    before = [live.metric(f"freshet_event_delay_seconds_bucket{bucket}") for bucket in buckets]
    now, day = now_us(), 86_400_000_000
    rows = [{"request_id": n, "user_id": 77, "item_id": 1001, "timestamp_us": now - n * day} for n in (2, 8, 9)]
    live.events(impressions=rows)
    after = [live.metric(f"freshet_event_delay_seconds_bucket{bucket}") for bucket in buckets]
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 1, 3]


def test_status_tells_what_is_served(live: Live) -> None:
    live.recommend(1)
    status = live.status()
    assert status["ready"] and status["stage"] == "promoted" and status["items"] == len(ITEM_IDS)
    champion = status["tracks"]["champion"]
    assert (champion["version"], champion["retriever_version"], champion["ranker"]["delta"]) == (1, 1, 0)
    assert champion["requests"] > 0 and champion["errors"] == 0 and champion["p99_ms"] > 0
    assert champion["ranker"]["rows"] > 50 and champion["ranker"]["served_event_age_s"] > 0


def test_status_tells_how_many_of_the_items_a_version_knows(toy_root: Path) -> None:
    """A catalogue whose ids are not those of the log is served by initial embeddings: it must not look well."""
    with Live(toy_root) as live:
        champion = live.status()["tracks"]["champion"]
        assert champion["ranker"]["unknown_items"] is None
        live.recommend(1, k=20)
        assert live.status()["tracks"]["champion"]["retriever"]["unknown_items"] < 0.5
        storage = live.storage
    for path in storage.list("items"):
        (toy_root / path).unlink()
    storage.write_table("items/hashed.parquet", item_rows([item + (1 << 40) for item in ITEM_IDS]))
    with Live(toy_root) as live:
        live.recommend(77, k=20)
        champion = live.status()["tracks"]["champion"]
        assert champion["ranker"]["unknown_items"] > 0.9 and champion["retriever"]["unknown_items"] == 1


def test_the_docs_page_needs_nothing_from_outside(live: Live) -> None:
    page = live.client.get("/docs").text
    assert "https://" not in page.replace("https://fastapi", "")
    script = page.split('<script src="')[1].split('"')[0]
    assert live.client.get(script).status_code == 200


def test_every_field_of_the_api_is_described(live: Live) -> None:
    spec = live.client.get("/openapi.json").json()
    ours = {
        n: s for n, s in spec["components"]["schemas"].items() if n not in ("ValidationError", "HTTPValidationError")
    }
    bare = [f"{n}.{f}" for n, s in ours.items() for f, field in s["properties"].items() if "description" not in field]
    assert bare == []
    routes = [operation for path in spec["paths"].values() for operation in path.values()]
    assert all(r["summary"] and r["description"] and r["tags"] for r in routes)
    assert spec["components"]["schemas"]["EventsBody"]["properties"]["actions"]["items"]["$ref"].endswith("ActionIn")


def test_the_api_declares_both_bodies_of_refused_events(live: Live) -> None:
    responses = live.client.get("/openapi.json").json()["paths"]["/v1/events"]["post"]["responses"]
    declared = responses["422"]["content"]["application/json"]["schema"]["anyOf"]
    assert [body["$ref"].rpartition("/")[2] for body in declared] == ["EventsRecorded", "Problem"]
    rows_refused = live.client.post("/v1/events", json={"actions": [0]})
    body_refused = live.client.post("/v1/events", json={"actions": 0})
    assert rows_refused.status_code == body_refused.status_code == 422
    assert EventsRecorded.model_validate(rows_refused.json()).rejected
    assert Problem.model_validate(body_refused.json()).error
