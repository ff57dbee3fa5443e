"""The Spark sequences against the reference, and the promises of both, for random interactions of three windows."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from components.manifests import find, read_part
from components.schemas import ACTIONS
from components.sequences.config import SequencesConfig
from components.sequences.run import run
from components.storage import Storage
from components.windows import from_us
from spark_jobs import reference
from spark_jobs.sequences import SEQUENCES
from tests.spark_jobs.log import HOURS, MASTER, Row, at, impression, publish_interactions

CONTEXT = 6
SPLIT = at(40)


def random_interactions(number: int) -> list[list[Row]]:
    """Of three windows; some of the second and third are late, and several users share each request time."""
    chance = random.Random(number)
    windows: list[list[Row]] = [[], [], []]
    for request in range(60):
        minute, user = chance.randrange(180), chance.choice([-5, 1, 2**62])
        late = chance.random() < 0.2
        place = min(2, minute // 60 + late)
        for position in range(chance.randrange(1, 4)):
            row = impression(request, chance.randrange(9), minute, user=user, page=chance.randrange(2))
            windows[place].append(_with_actions(chance, row | {"position": position, "late": late}, late))
    return [
        sorted({reference.impression_key(row): row for row in rows}.values(), key=reference.order) for rows in windows
    ]


def _with_actions(chance: random.Random, row: Row, late: bool) -> Row:
    known = row["timestamp"] + late * at(80) - late * at(0)
    bits = chance.sample(range(len(ACTIONS)), chance.randrange(3))
    events = sorted((row["timestamp"] + chance.randrange(10**9), 1 << bit, chance.randrange(9) / 2) for bit in bits)
    served = chance.random() < 0.5
    extra = {"score": 0.25, "version": 3, "delta": 4} if served else {}
    return row | extra | {"known_at": known, "actions": sum(e[1] for e in events), "watch_s": 1.5, "events": events}


def build(storage: Storage, part: str = "train", **settings: Any) -> list[Row]:
    result = run(SequencesConfig(root=storage.root, spark=MASTER, context_interactions=CONTEXT, **settings))
    manifest = find(storage, result.folder)
    assert manifest is not None
    table = read_part(storage, manifest, part)
    assert table.schema.names == SEQUENCES.names
    assert [_element(field.type) for field in table.schema] == [_element(field.type) for field in SEQUENCES]
    rows = table.to_pylist()
    assert [row["user_id"] for row in rows] == sorted(row["user_id"] for row in rows)
    counts = result.counts
    assert counts[f"{part}_rows"] == len(rows)
    assert counts[f"{part}_interactions"] == sum(len(row["item_id"]) - row["new_from"] for row in rows)
    return [row | {"score": [None if math.isnan(s) else s for s in row["score"]]} for row in rows]


def _element(kind: pa.DataType) -> tuple[bool, pa.DataType]:
    return (True, kind.value_type) if pa.types.is_list(kind) else (False, kind)


def expected(interactions: list[Row], is_new: Callable[[Row], bool]) -> list[Row]:
    return [{name: row[name] for name in SEQUENCES.names} for row in reference.sequences(interactions, is_new, CONTEXT)]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, spark: object
) -> tuple[Storage, list[list[Row]], dict[str, list[Row]]]:
    """Published interactions of three windows and the data sets built from them."""
    storage = Storage(f"file://{tmp_path_factory.mktemp('sequences')}")
    windows = random_interactions(11)
    for window, rows in zip(HOURS, windows, strict=False):
        publish_interactions(storage, window, rows)
    history = {"mode": "history", "split": from_us(SPLIT).isoformat(), "end": HOURS[0].end.isoformat()}
    return (
        storage,
        windows,
        {
            "train": build(storage, "train", **history),
            "eval": build(storage, "eval", **history),
            "first": build(storage, mode="window", window=HOURS[1].key),
            "second": build(storage, mode="window", window=HOURS[2].key),
        },
    )


World = tuple[Storage, list[list[Row]], dict[str, list[Row]]]


def test_spark_sequences_and_reference_agree(world: World) -> None:
    _, (one, two, three), built = world
    assert built["train"] == expected([r for r in one if r["timestamp"] < SPLIT], lambda r: True)
    assert built["eval"] == expected(one, lambda r: r["timestamp"] >= SPLIT)
    assert built["first"] == expected([*one, *two], lambda r: r in two)
    assert built["second"] == expected([*one, *two, *three], lambda r: r in three)


def test_each_interaction_has_loss_once_over_history_and_windows(world: World) -> None:
    _, windows, built = world
    loss = Counter(
        (row["request_id"][i], row["item_id"][i])
        for rows in built.values()
        for row in rows
        for i in range(row["new_from"], len(row["item_id"]))
    )
    assert loss == Counter(reference.impression_key(row) for rows in windows for row in rows)
    assert any(row["late"] for row in windows[1])
    users = Counter(row["user_id"] for row in built["first"])
    assert max(users.values()) > 1, "a late interaction among older ones must get a row of its own"


def test_rows_are_in_one_total_order_with_at_most_n_context_interactions(world: World) -> None:
    for rows in world[2].values():
        for row in rows:
            places = list(zip(row["timestamp"], row["request_id"], row["position"], row["item_id"], strict=True))
            assert places == sorted(set(places))
            assert 0 <= row["new_from"] <= CONTEXT
    assert any(row["new_from"] == CONTEXT for row in world[2]["second"])
    assert all(row["new_from"] == 0 for row in world[2]["train"])


def test_action_and_auxiliary_events_carry_when_they_became_known(world: World) -> None:
    _, windows, built = world
    known = {reference.impression_key(row): row for rows in windows for row in rows}
    for rows in built.values():
        for row in rows:
            keys = list(zip(row["request_id"], row["item_id"], strict=True))
            assert row["known_at"] == [known[key]["known_at"] for key in keys]
            assert set(row["aux_known_at"]) <= set(row["known_at"])
            events = zip(row["action_of"], row["action_known_at"], row["action_mask"], row["action_value"], strict=True)
            found = Counter((keys[of], at_us, mask, value) for of, at_us, mask, value in events)
            assert found == Counter((key, *event) for key in keys for event in known[key]["events"])


def test_to_a_request_the_auxiliary_series_is_the_first_of_each_run_of_what_was_known_then(world: World) -> None:
    """So that the server, which knows no more than that, has the same; Spark has what the reference has, see above."""
    _, windows, _ = world
    for row in reference.sequences([row for rows in windows for row in rows], lambda r: True, 0):
        assert row["aux_slot"] == [0] * len(row["aux_value"])
        series = list(zip(row["aux_known_at"], row["aux_value"], strict=True))
        for now in row["timestamp"]:
            seen = sorted((known, i) for i, known in enumerate(row["known_at"]) if known < now)
            pages = [(i, known, row["page"][i]) for known, i in seen]
            firsts = [p for n, p in enumerate(pages) if n == 0 or p[2] != pages[n - 1][2]]
            assert [entry for entry in series if entry[0] < now] == [first[1:] for first in sorted(firsts)]


def test_a_row_amid_the_history_is_a_stretch_of_the_same_auxiliary_series(world: World) -> None:
    _, (one, two, three), built = world
    whole = {row["user_id"]: row for row in reference.sequences([*one, *two, *three], lambda r: True, 0)}
    for row in built["second"]:
        series = list(zip(whole[row["user_id"]]["aux_known_at"], whole[row["user_id"]]["aux_value"], strict=True))
        part = list(zip(row["aux_known_at"], row["aux_value"], strict=True))
        assert any(series[i : i + len(part)] == part for i in range(len(series) + 1))
