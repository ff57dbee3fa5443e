"""The join and the sequences once more: slow, plain Python, event by event. Tests hold the Spark jobs against it.

Rows are dicts with the columns of `components.schemas`, all times int64 us. The reference sees the whole log and
all earlier outcomes; the Spark join must come to the same although it reads only the files it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from components.schemas import ACTIONS, action_bit
from components.windows import Window
from spark_jobs.join import Rules

Row = dict[str, Any]
Key = tuple[Any, ...]


@dataclass
class Outcome:
    """What the join of one window decided."""

    window: Window
    interactions: list[Row] = field(default_factory=list)
    quarantined: dict[tuple[str, Key], str] = field(default_factory=dict)  # (kind, key) -> reason
    attributed: set[Key] = field(default_factory=set)  # action keys
    pending: set[Key] = field(default_factory=set)  # action keys, those ahead of the window included
    duplicates: int = 0


def join(impressions: list[Row], actions: list[Row], earlier: list[Outcome], rules: Rules) -> Outcome:
    """The outcome of `rules.window`, given the log so far and the outcomes of the windows joined before."""
    outcome = Outcome(rules.window)
    shown = {impression_key(row): row for done in earlier for row in done.interactions}
    bad = {key for done in earlier for key in done.quarantined}
    taken = {key for done in earlier for key in done.attributed}
    here: dict[Key, Row] = {}
    waiting: dict[Key, Row] = {}
    for key, copies in _groups(impressions, impression_key, lambda t: t < rules.window.end_us):
        first = min(copies, key=_arrival)
        if key in shown or ("impression", key) in bad:
            continue
        fate = _impression_fate(first["timestamp"], [done.window for done in earlier], rules)
        if fate == "waiting":
            waiting[key] = first
        elif fate == "too_late":
            outcome.quarantined["impression", key] = fate
            outcome.duplicates += len(copies) - 1
        else:
            here[key] = _interaction(first, fate == "late")
            outcome.duplicates += len(copies) - 1
    reach = rules.window.end_us + rules.attribution_us
    for key, copies in _groups(actions, action_key, lambda t: rules.history_start_us <= t < reach):
        if key in taken or ("action", key) in bad:
            continue
        first = min(copies, key=lambda row: (row["timestamp"], row["received_at"], row["value"] or 0.0))
        fate = _action_fate(first, shown, here, waiting, rules)
        if fate == "pending":
            outcome.pending.add(key)
            continue
        outcome.duplicates += len(copies) - 1
        if fate == "attributed":
            outcome.attributed.add(key)
            _attach(here[impression_key(first)], first)
        else:
            outcome.quarantined["action", key] = fate
    outcome.interactions = sorted(here.values(), key=order)
    for row in outcome.interactions:
        row["events"].sort()
    return outcome


def sequences(interactions: list[Row], is_new: Callable[[Row], bool], context: int) -> list[Row]:
    """Rows as of `spark_jobs.sequences.SEQUENCES`, ordered by user and time, with the page as auxiliary slot 0."""
    rows = []
    for user in sorted({row["user_id"] for row in interactions}):
        whole = sorted((row for row in interactions if row["user_id"] == user), key=order)
        by_known = sorted(whole, key=lambda row: (row["known_at"], order(row)))
        changes = {order(row) for i, row in enumerate(by_known) if i == 0 or row["page"] != by_known[i - 1]["page"]}
        start = 0
        while start < len(whole):
            end = start
            while end < len(whole) and is_new(whole[end]):
                end += 1
            if end > start:
                rows.append(_sequence(user, whole, max(0, start - context), start, end, changes))
            start = end + 1
    return rows


def order(row: Row) -> Key:
    return row["timestamp"], row["request_id"], row["position"], row["item_id"]


def impression_key(row: Row) -> Key:
    return row["request_id"], row["item_id"]


def action_key(row: Row) -> Key:
    return row["request_id"], row["user_id"], row["item_id"], row["action"]


def _groups(
    rows: list[Row], key: Callable[[Row], Key], visible: Callable[[int], bool]
) -> Iterable[tuple[Key, list[Row]]]:
    seen = [row for row in rows if visible(row["timestamp"])]
    for wanted in sorted({key(row) for row in seen}):
        yield wanted, [row for row in seen if key(row) == wanted]


def _arrival(row: Row) -> Key:
    return row["received_at"], row["timestamp"], row["user_id"], row["position"], row["page"]


def _impression_fate(time: int, joined: list[Window], rules: Rules) -> str:
    if time >= rules.window.start_us:
        return "new"
    if not any(window.start_us <= time < window.end_us for window in joined):
        return "waiting"
    return "late" if time >= rules.oldest_us else "too_late"


def _action_fate(
    action: Row, before: dict[Key, Row], here: dict[Key, Row], waiting: dict[Key, Row], rules: Rules
) -> str:
    if action["action"] not in ACTIONS:
        return "unknown_action"
    key = impression_key(action)
    held = waiting.get(key)
    if held and held["user_id"] == action["user_id"] and _in_time(action, held, rules):
        return "pending"
    found = before.get(key) or here.get(key)
    if found is None or found["user_id"] != action["user_id"]:
        return "no_impression" if action["timestamp"] < rules.settled_us else "pending"
    delay = action["timestamp"] - found["timestamp"]
    if delay < 0:
        return "before_impression"
    if delay > rules.attribution_us:
        return "outside_attribution_window"
    return "late_action" if key in before else "attributed"


def _in_time(action: Row, impression: Row, rules: Rules) -> bool:
    return bool(0 <= action["timestamp"] - impression["timestamp"] <= rules.attribution_us)


def _interaction(impression: Row, late: bool) -> Row:
    known_at = max(impression["timestamp"], impression["received_at"])
    row = {name: value for name, value in impression.items() if name != "received_at"}
    return row | {"known_at": known_at, "late": late, "actions": 0, "watch_s": 0.0, "events": []}


def _attach(interaction: Row, action: Row) -> None:
    mask = action_bit(action["action"])
    value = action["value"] or 0.0
    interaction["actions"] |= mask
    known_at = max(action["timestamp"], action["received_at"], interaction["known_at"])
    interaction["events"].append((known_at, mask, value))
    if action["action"] == "watch":
        interaction["watch_s"] = max(interaction["watch_s"], value)


def _sequence(user: int, whole: list[Row], begin: int, start: int, end: int, changes: set[Key]) -> Row:
    part = whole[begin:end]
    row: Row = {"user_id": user, "new_from": start - begin}
    for name in ("request_id", "item_id", "timestamp", "known_at", "position", "page", "actions", "watch_s"):
        row[name] = [event[name] for event in part]
    for name, missing in (("score", None), ("version", -1), ("delta", -1)):
        row[name] = [missing if event[name] is None else event[name] for event in part]
    events = sorted((known, i, mask, value) for i, event in enumerate(part) for known, mask, value in event["events"])
    for place, name in enumerate(("action_known_at", "action_of", "action_mask", "action_value")):
        row[name] = [event[place] for event in events]
    changed = [event for event in part if order(event) in changes]
    row["aux_slot"] = [0 for _ in changed]
    row["aux_value"] = [event["page"] for event in changed]
    row["aux_known_at"] = [event["known_at"] for event in changed]
    return row
