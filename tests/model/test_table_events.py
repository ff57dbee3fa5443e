"""What an id in a batch stands for: an event admits it and keeps its row, a negative does neither."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.table import EmbeddingTable, Events
from tests.model.table_model import column, int64

SECOND = 1_000_000
HOUR = 3600 * SECOND


def learn(table: EmbeddingTable, ids: list[int], times_us: list[int], now_us: int = 0) -> int:
    """One step with gradient 1 for each id; a time below 0 makes it a negative."""
    out = table(torch.tensor(ids), events=Events.at(torch.tensor(times_us)))
    out.sum().backward()
    return table.step(now_us=now_us)


def seen(table: EmbeddingTable) -> dict[int, int]:
    rows = table.export_all()
    return dict(zip(rows.keys.tolist(), (column(rows, "last_update_us") // SECOND).tolist(), strict=True))


def counts(table: EmbeddingTable) -> dict[int, int]:
    rows = table.export_all()
    return dict(zip(rows.keys.tolist(), column(rows, "counts").tolist(), strict=True))


def test_the_buffers_of_events_may_be_used_again_before_the_step() -> None:
    table = EmbeddingTable("item", 1)
    events = Events(np.ones(2, np.uint32), np.full(2, 7 * SECOND))
    table(torch.tensor([1, 2]), events=events).sum().backward()
    events.counts[:], events.newest_us[:] = 0, -1
    table.step()
    assert seen(table) == {1: 7, 2: 7} and counts(table) == {1: 1, 2: 1}


def test_each_row_has_the_time_of_its_own_newest_event() -> None:
    table = EmbeddingTable("item", 1)
    learn(table, [1, 2, 1, 3], [50 * SECOND, 10 * SECOND, 70 * SECOND, 0], now_us=99 * SECOND)
    assert seen(table) == {1: 70, 2: 10, 3: 0}
    learn(table, [2, 1], [20 * SECOND, 5 * SECOND])
    assert seen(table) == {1: 70, 2: 20, 3: 0}


def test_a_negative_updates_a_row_but_neither_counts_nor_keeps_it() -> None:
    table = EmbeddingTable("item", 1, ttl_us=10 * SECOND, sweep_steps=1)
    learn(table, [1], [5 * SECOND])
    before = table.lookup(int64(1)).item()
    assert learn(table, [1], [-1], now_us=14 * SECOND) == 1
    assert table.lookup(int64(1)).item() < before
    assert (seen(table), counts(table)) == ({1: 5}, {1: 1})
    learn(table, [2], [16 * SECOND])
    assert seen(table) == {2: 16}


@pytest.mark.parametrize("policy", [{"admission_threshold": 2}, {"admission_probability": 1e-9}, {"ttl_us": HOUR}])
def test_where_rows_are_admitted_or_expire_a_negative_makes_none(policy: dict[str, int]) -> None:
    table = EmbeddingTable("item", 1, **policy)  # type: ignore[arg-type]
    for _ in range(5):
        assert learn(table, [1], [-1], now_us=SECOND) == 0
    assert len(table) == table.stats()["candidates"] == 0
    assert table.stats()["refused_admission"] == 5


def test_where_every_id_has_its_row_a_negative_makes_one_as_old_as_the_step() -> None:
    table = EmbeddingTable("item", 1)
    assert learn(table, [1], [-1], now_us=9 * SECOND) == 1
    assert (seen(table), counts(table)) == ({1: 9}, {1: 0})


def test_one_position_may_stand_for_several_events() -> None:
    table = EmbeddingTable("item", 1, admission_threshold=3)
    events = Events.of_items(3, torch.tensor([2, 0, 2, 2, 0]), torch.tensor([7, 5, 9, -1, -1]) * SECOND)
    assert events.counts.tolist() == [1, 0, 2]
    for expected in ([], [12]):
        table(torch.tensor([10, 11, 12]), events=events).sum().backward()
        table.step()
        assert table.export_all().keys.tolist() == expected
    assert seen(table) == {12: 9} and counts(table) == {12: 4}


def test_the_clock_is_the_newest_event_of_any_id() -> None:
    table = EmbeddingTable("item", 1, ttl_us=10 * SECOND)
    learn(table, [1, 2], [SECOND, 30 * SECOND])
    assert table.expire_stale() == 1 and seen(table) == {2: 30}


def test_expiring_the_stale_does_not_wait_for_the_sweep() -> None:
    table = EmbeddingTable("item", 1, ttl_us=10 * SECOND, admission_threshold=2)
    learn(table, list(range(500)) * 2, [SECOND] * 1000)
    learn(table, [-1, -1, -2], [8 * HOUR] * 3)
    assert len(table) > 490  # one step of a thousand
    assert table.expire_stale() + table.stats()["expired"] >= 500
    assert seen(table) == {-1: 8 * 3600} and table.stats()["candidates"] == 1
    assert table.expire_stale() == 0
    assert EmbeddingTable("item", 1).expire_stale() == 0


def test_a_candidate_of_unknown_time_stays_and_so_does_one_from_later_than_the_clock() -> None:
    table = EmbeddingTable("item", 1, ttl_us=HOUR, admission_threshold=3, sweep_steps=1)
    learn(table, [1], [0])
    trained = EmbeddingTable("item", 1, ttl_us=HOUR, admission_threshold=3)
    learn(trained, [2], [9 * HOUR])
    table.apply_delta(trained.export_all())  # rows and candidates come without the other table's clock
    learn(table, [3], [5 * HOUR])
    assert table.stats()["candidates"] == 3
    learn(table, [3], [30 * HOUR])
    assert table.export_all().candidate_keys.tolist() == [1, 3]


def test_events_that_do_not_fit_are_refused() -> None:
    table = EmbeddingTable("item", 1)
    with pytest.raises(ValueError, match="events are of 1 ids, but 2 are looked up"):
        table(torch.tensor([1, 2]), events=Events.none(1))
    with pytest.raises(TypeError, match="events need uint32 counts and int64 times"):
        table(torch.tensor([1]), events=Events(np.ones(1, np.int64), int64(5)))
    assert table.step() == 0 and len(table) == 0


def test_what_a_step_has_read_does_not_expire_in_it() -> None:
    table = EmbeddingTable("item", 1, ttl_us=10 * SECOND, ttl_on_access=True, sweep_steps=1)
    learn(table, [1, 2], [5 * SECOND] * 2)
    table(torch.tensor([1]), events=Events.at(torch.tensor([16 * SECOND])))  # without a gradient
    learn(table, [3], [16 * SECOND], now_us=16 * SECOND)
    assert seen(table) == {1: 16, 3: 16}


@pytest.mark.parametrize("events", [0, 1])
def test_a_read_keeps_a_row_only_where_it_stands_for_an_event(events: int) -> None:
    table = EmbeddingTable("item", 1, ttl_us=10 * SECOND, ttl_on_access=True, sweep_steps=1)
    learn(table, [1], [5 * SECOND])
    table(torch.tensor([1]), events=Events(np.full(1, events, np.uint32), int64(16 * SECOND)))  # without a gradient
    learn(table, [3], [16 * SECOND], now_us=16 * SECOND)
    assert seen(table) == ({1: 16, 3: 16} if events else {3: 16})
