"""Wrong input: refused with a clear message and the right status; bad events are kept in quarantine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.components.serving import (
    Live,
    now_us,
    read_log,
)


def post(live: Live, path: str, body: Any) -> httpx.Response:
    return live.client.post(path, json=body)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/recommend", {"user_id": "abc"}, 422, "user_id: Input should be a valid integer"),
        ("/v1/recommend", {"user_id": "12"}, 422, "user_id"),
        ("/v1/recommend", {"user_id": 1.5}, 422, "got 1.5"),
        ("/v1/recommend", {"user_id": True}, 422, "user_id"),
        ("/v1/recommend", {"user_id": 2**63}, 422, "less than or equal to 9223372036854775807"),
        ("/v1/recommend", {}, 422, "user_id: Field required"),
        ("/v1/recommend", {"user_id": 1, "k": 0}, 422, "greater than or equal to 1"),
        ("/v1/recommend", {"user_id": 1, "k": 201}, 422, "less than or equal to 200"),
        ("/v1/recommend", {"user_id": 1, "K": 10}, 422, "K: Extra inputs are not permitted"),
        ("/v1/recommend", [], 422, "body"),
        ("/v1/rank", {"user_id": 1, "candidates": []}, 422, "candidates: List should have at least 1 item"),
        ("/v1/rank", {"user_id": 1}, 422, "candidates: Field required"),
        ("/v1/rank", {"user_id": 1, "candidates": [1, "x", None]}, 422, "candidates.1"),
        ("/v1/rank", {"user_id": 1, "candidates": list(range(10_001))}, 413, "at most 10000 candidates"),
        ("/v1/rank", {"user_id": 1, "candidates": list(range(10**6))}, 413, "at most 10000 candidates"),
        ("/v1/events", {"impressions": 5}, 422, "impressions"),
        ("/v1/events", {"impressions": [0] * 10_001}, 422, "impressions: List should have at most 10000 items"),
        ("/v1/events", {"actions": [0] * 10_001}, 422, "actions: List should have at most 10000 items"),
        ("/v1/events", {"clicks": []}, 422, "clicks: Extra inputs"),
        ("/v1/nowhere", {}, 404, "Not Found; /docs shows"),
        ("/livez", {}, 405, "Method Not Allowed; /docs shows"),
    ],
)
def test_wrong_input_is_refused_with_a_clear_message(
    live: Live, path: str, body: Any, status: int, message: str
) -> None:
    response = post(live, path, body)
    assert response.status_code == status
    assert message in response.json()["error"]
    assert len(response.text) < 3000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"user_id": 1', "malformed JSON at character"),
        (b"", "body: Field required"),
        (b"user_id=1", "malformed JSON at character 0"),
        (b'{"user_id": ' + b"9" * 5000 + b"}", "malformed JSON: Exceeds the limit"),
        (b'{"user_id": "\xff"}', "malformed JSON: 'utf-8' codec can't decode"),
    ],
)
def test_what_is_not_json_is_refused(live: Live, content: bytes, message: str) -> None:
    response = live.client.post("/v1/recommend", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422 and message in response.json()["error"]


def test_json_that_is_not_declared_as_such_is_refused_with_the_header_that_it_lacks(live: Live) -> None:
    """What `curl -d` sends."""
    header = {"content-type": "application/x-www-form-urlencoded"}
    response = live.client.post("/v1/recommend", content=b'{"user_id": 1}', headers=header)
    assert response.status_code == 422 and "Content-Type: application/json" in response.json()["error"]


def test_a_body_without_declared_length_is_limited_too(live: Live) -> None:
    chunks = (b"1," * 100_000 for _ in range(20))
    response = live.client.post("/v1/rank", content=chunks, headers={"content-type": "application/json"})
    assert response.status_code == 413 and "at most 10000 candidates" in response.json()["error"]


def event(**more: Any) -> dict[str, Any]:
    return {"request_id": 5, "user_id": 1, "item_id": 7, "timestamp_us": now_us()} | more


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("impression", event(user_id="u1"), "user_id: Input should be a valid integer"),
        ("impression", event(item_id=1.5), "item_id"),
        ("impression", event(timestamp_us=now_us() + 3_600_000_000), "in the future"),
        ("impression", event(timestamp_us=1_750_000_000), "microseconds since 1970"),
        ("impression", event(position=-1), "position"),
        ("impression", event(position=2**31), "position"),
        ("impression", event(verison=1), "verison: Extra inputs"),
        ("impression", event(track="third"), "track"),
        ("impression", "text", "valid dictionary"),
        ("action", event(), "action: Field required"),
        ("action", event(action="clik"), "unknown action 'clik'; known actions are click, like"),
        ("action", event(action="watch"), "watch needs a value in seconds"),
        ("action", event(action="watch", value=-1), "value"),
        ("action", event(action="click", timestamp_us=now_us() + 3_600_000_000), "in the future"),
    ],
)
def test_a_bad_event_is_refused_with_a_reason_and_kept_in_quarantine(
    live: Live, kind: str, row: Any, reason: str
) -> None:
    good = event(request_id=6)
    impressions, actions = ([row, good], []) if kind == "impression" else ([good], [row])
    answer = live.events(impressions=impressions, actions=actions)
    assert answer["accepted"] == 1
    (rejected,) = answer["rejected"]
    assert (rejected["kind"], rejected["index"]) == (kind, 0) and reason in rejected["reason"]
    live.server.journal.flush()
    kept = [r for r in read_log(live.storage, "quarantine/serve") if r["reason"] == rejected["reason"]]
    assert any(json.loads(r["row"]) == row and r["kind"] == kind for r in kept)


def test_events_that_are_all_bad_are_an_error(live: Live) -> None:
    response = post(live, "/v1/events", {"actions": [event(action="clik")]})
    assert response.status_code == 422
    assert response.json()["accepted"] == 0 and "known actions are" in response.json()["rejected"][0]["reason"]


def test_events_slightly_ahead_of_the_clock_are_taken(live: Live) -> None:
    assert live.events(impressions=[event(timestamp_us=now_us() + 2_000_000)])["accepted"] == 1


def test_actions_without_impression_are_recorded_and_counted(live: Live) -> None:
    before = live.metric("freshet_unmatched_actions_total")
    answer = live.events(actions=[event(request_id=123_456, action="like")])
    assert answer == {"accepted": 1, "rejected": [], "unmatched_actions": 1}
    assert live.metric("freshet_unmatched_actions_total") == before + 1
    later = live.events(impressions=[event(request_id=99)], actions=[event(request_id=99, action="like")])
    assert later["unmatched_actions"] == 0


def test_without_a_champion_the_server_says_what_to_do(tmp_path: Path) -> None:
    with Live(tmp_path / "empty") as live:
        assert live.client.get("/livez").status_code == 200
        for response in (live.client.get("/readyz"), post(live, "/v1/recommend", {"user_id": 1})):
            assert response.status_code == 503 and "no champion" in response.json()["error"]
        assert live.events(impressions=[event()])["accepted"] == 1  # events are taken all the same
