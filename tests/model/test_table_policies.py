"""Who gets a row, who loses it: admission, expiry, the bound on rows, and what the table says of it."""

import numpy as np
import pytest
import torch

from model.table import EmbeddingTable
from tests.model.table_model import assert_same_table, column, int64

torch.set_num_threads(1)

SECOND = 1_000_000
HOUR = 3600 * SECOND


def update(table: EmbeddingTable, *keys: int, at: int = 0) -> int:
    return table.apply_gradients(int64(*keys), np.ones((len(keys), table.dim), np.float32), now_us=at)


def keys_of(table: EmbeddingTable) -> list[int]:
    return table.export_all().keys.tolist()


# Admission


def test_an_id_gets_its_row_at_exactly_the_threshold() -> None:
    table = EmbeddingTable("item", 2, "sgd", learning_rate=1.0, admission_threshold=3)
    start = table.lookup(int64(5)).clone()
    assert update(table, 5) == 0 and update(table, 5) == 0
    assert torch.equal(table.lookup(int64(5)), start)  # their gradients are dropped, and counted
    assert table.stats()["refused_admission"] == 2 and table.stats()["candidates"] == 1
    assert update(table, 5) == 1
    torch.testing.assert_close(table.lookup(int64(5)), start - 1)
    assert table.stats()["candidates"] == 0
    assert column(table.export_all(), "counts").tolist() == [3]


def test_occurrences_within_a_batch_count_and_their_whole_gradient_is_used() -> None:
    table = EmbeddingTable("item", 1, "sgd", learning_rate=1.0, admission_threshold=3)
    start = float(table.lookup(int64(5)))
    assert update(table, 5, 6, 5, 7, 5) == 1
    assert float(table.lookup(int64(5))) == pytest.approx(start - 3)
    assert keys_of(table) == [5] and table.stats()["candidates"] == 2


def test_a_candidate_takes_a_few_bytes_instead_of_a_row() -> None:
    table = EmbeddingTable("item", 64, admission_threshold=2)
    keys = np.arange(100_000, dtype=np.int64)
    for part in np.array_split(keys, 10):
        table.apply_gradients(part, np.ones((len(part), 64), np.float32))
    stats = table.stats()
    assert stats["candidates"] == len(keys) and stats["rows"] == stats["row_bytes"] == 0
    assert stats["overhead_bytes"] / len(keys) < 40


def test_counting_is_exact_for_every_id_of_a_long_stream() -> None:
    table = EmbeddingTable("item", 1, admission_threshold=6)
    ids = np.random.default_rng(1).zipf(1.3, 20_000).astype(np.int64) * -7919
    for part in np.array_split(ids, 37):
        table.apply_gradients(part, np.ones((len(part), 1), np.float32))
    unique, counts = np.unique(ids, return_counts=True)
    assert keys_of(table) == sorted(unique[counts >= 6].tolist())
    delta = table.export_all()
    words = dict(zip(delta.candidate_keys.tolist(), (delta.candidates & 0xFFFF).tolist(), strict=True))
    assert words == {key: n for key, n in zip(unique.tolist(), counts.tolist(), strict=True) if n < 6}


def test_an_erased_id_is_counted_from_the_beginning() -> None:
    table = EmbeddingTable("item", 1, admission_threshold=2)
    update(table, 1)
    update(table, 2, 2)
    table.erase(int64(1, 2))
    assert table.stats()["candidates"] == 0
    assert update(table, 1) == update(table, 2) == 0
    assert update(table, 1) == update(table, 2) == 1


def test_find_or_insert_and_upsert_need_no_admission() -> None:
    table = EmbeddingTable("item", 1, admission_threshold=100)
    update(table, 1)
    table.find_or_insert(int64(1, 2))
    table.upsert(int64(3), np.zeros((1, 1), np.float32))
    assert keys_of(table) == [1, 2, 3] and table.stats()["candidates"] == 0


def test_probabilistic_admission_admits_its_share_of_occurrences() -> None:
    table = EmbeddingTable("item", 1, admission_probability=0.2)
    admitted = update(table, *range(5000))
    assert 0.17 < admitted / 5000 < 0.23
    assert table.stats()["candidates"] == 0 and table.stats()["refused_admission"] == 5000 - admitted
    rest = sorted(set(range(5000)) - set(keys_of(table)))
    assert 0.17 < update(table, *rest) / len(rest) < 0.23  # the next occurrence draws anew
    twice = EmbeddingTable("item", 1, admission_probability=0.2)
    assert 0.32 < update(twice, *range(5000), *range(5000)) / 5000 < 0.40  # 1 - 0.8 ** 2


def test_probabilistic_admission_is_a_function_of_seed_slot_id_and_update() -> None:
    def admitted(slot: str = "item", seed: int = 0, skip: int = 0) -> list[int]:
        table = EmbeddingTable(slot, 1, admission_probability=0.5, seed=seed)
        for _ in range(skip):
            update(table)
        update(table, *range(200))
        return keys_of(table)

    assert admitted() == admitted()
    assert len({tuple(admitted(*a)) for a in (("item",), ("user",), ("item", 1), ("item", 0, 1))}) == 4


# Expiry


def test_rows_expire_after_their_time_to_live_in_event_time() -> None:
    table = EmbeddingTable("item", 1, ttl_us=10 * SECOND, sweep_steps=1)
    update(table, 1, at=5 * SECOND)
    update(table, 2, at=12 * SECOND)
    update(table, 3, at=15 * SECOND)
    assert keys_of(table) == [1, 2, 3]  # exactly the time to live is not yet too old
    update(table, 3, at=16 * SECOND)
    assert keys_of(table) == [2, 3]
    update(table, 4, at=3 * SECOND)  # a late event does not turn back the clock
    assert keys_of(table) == [2, 3]
    assert table.stats()["expired"] == 2
    assert table.export_delta(0).tombstones.tolist() == [1, 4]


def test_rows_of_unknown_time_never_expire() -> None:
    table = EmbeddingTable("item", 1, ttl_us=SECOND, sweep_steps=1)
    table.find_or_insert(int64(1))
    update(table, 2, at=50 * SECOND)
    assert table.expire(100 * SECOND) == 1
    assert keys_of(table) == [1]


@pytest.mark.parametrize("on_access", [False, True])
def test_reading_keeps_a_row_alive_where_the_slot_says_so(on_access: bool) -> None:
    table = EmbeddingTable("item", 1, ttl_us=10 * SECOND, ttl_on_access=on_access, sweep_steps=1)
    update(table, 1, 2, at=SECOND)
    table(torch.tensor([1]))  # no gradient comes
    table.step(now_us=9 * SECOND)
    update(table, 3, at=15 * SECOND)
    assert keys_of(table) == ([1, 3] if on_access else [3])
    table.eval()
    table(torch.tensor([1]))  # evaluation is not a training forward
    table.step(now_us=16 * SECOND)
    update(table, 3, at=25 * SECOND)
    assert keys_of(table) == [3]


def test_the_sweep_looks_at_every_row_once_in_its_steps() -> None:
    table = EmbeddingTable("item", 1, ttl_us=SECOND, sweep_steps=50)
    update(table, *range(2000), at=SECOND)
    left = [2000]
    for _ in range(51):
        update(table, -1, at=100 * SECOND)
        left.append(len(table) - 1)
    assert left[-1] == 0
    gone = -np.diff(left)
    assert gone.max() < 200  # no update pays for all of it


def test_expiry_stops_at_the_floor_and_takes_the_stalest() -> None:
    table = EmbeddingTable("item", 1, min_rows=2)
    for key in (4, 1, 3, 2):
        update(table, key, at=key * SECOND)
    assert table.expire(100 * SECOND) == 2
    assert keys_of(table) == [3, 4]
    assert table.expire(100 * SECOND) == 0


def test_candidates_expire_too_by_the_hour() -> None:
    table = EmbeddingTable("item", 1, ttl_us=HOUR, admission_threshold=2, sweep_steps=1)
    update(table, 1, at=HOUR)
    update(table, 2, 2, at=3 * HOUR)
    assert table.stats()["candidates"] == 1  # hours are not split: it may live up to two longer
    update(table, 2, at=5 * HOUR)
    assert table.stats()["candidates"] == 0 and table.stats()["expired_candidates"] == 1
    assert update(table, 1, at=5 * HOUR) == 0  # counted from the beginning


# The bound on rows


def test_a_full_table_refuses_new_ids_and_counts_them() -> None:
    table = EmbeddingTable("item", 1, max_rows=2)
    assert update(table, 9, 8, 7, 6) == 2
    assert keys_of(table) == [8, 9]  # first come, first served
    assert update(table, 9, 6) == 1
    assert table.stats()["refused_full"] == 3
    table.erase(int64(9))
    assert update(table, 6) == 1
    assert keys_of(table) == [6, 8]


@pytest.mark.parametrize(("when_full", "gone"), [("evict_stalest", 1), ("evict_rarest", 2)])
def test_a_full_table_evicts_the_stalest_or_the_rarest(when_full: str, gone: int) -> None:
    table = EmbeddingTable("item", 1, max_rows=3, when_full=when_full)
    for key, occurrences, at in ((1, 5, 1), (2, 2, 9), (3, 6, 8)):
        update(table, *[key] * occurrences, at=at * SECOND)
    assert update(table, *[4] * 9, at=10 * SECOND) == 1
    assert keys_of(table) == sorted({1, 2, 3, 4} - {gone})
    assert table.stats()["evicted"] == 1
    assert table.export_delta(0).tombstones.tolist() == [gone]


@pytest.mark.parametrize("when_full", ["evict_stalest", "evict_rarest"])
def test_eviction_holds_the_bound_and_keeps_what_is_used(when_full: str) -> None:
    table = EmbeddingTable("item", 1, max_rows=5000, when_full=when_full)
    hot = list(range(500))
    for step in range(1, 60):
        cold = range(10_000 + step * 400, 10_000 + (step + 1) * 400)
        update(table, *hot, *cold, at=step * SECOND)
        assert len(table) <= 5000
    assert set(hot) <= set(keys_of(table))
    stats = table.stats()
    assert stats["evicted"] == stats["inserted"] - stats["rows"] > 0


def test_what_goes_does_not_depend_on_shards_or_threads() -> None:
    tables = [
        EmbeddingTable(
            "item", 1, max_rows=3000, when_full="evict_rarest", ttl_us=9 * SECOND, min_rows=100,
            admission_threshold=2, sweep_steps=7, shards=shards, threads=threads,
        )
        for shards, threads in ((1, 1), (16, 3), (256, 2))
    ]  # fmt: skip
    random = np.random.default_rng(3)
    for step in range(40):
        ids = random.zipf(1.1, 3000).astype(np.int64) % 20_000
        for table in tables:
            update(table, *ids.tolist(), at=step * SECOND)
    for table in tables[1:]:
        assert_same_table(tables[0], table)
        assert table.stats()["evicted"] == tables[0].stats()["evicted"] > 0
        assert table.stats()["expired"] == tables[0].stats()["expired"] > 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"admission_threshold": 0}, "threshold"),
        ({"admission_threshold": 65_536}, "threshold"),
        ({"admission_probability": 0.0}, "probability"),
        ({"admission_probability": 1.5}, "probability"),
        ({"admission_threshold": 2, "admission_probability": 0.5}, "not both"),
        ({"ttl_us": -1}, "ttl_us"),
        ({"ttl_us": 1001 * 86_400_000_000, "admission_threshold": 2}, "at most 1,000 days"),
        ({"sweep_steps": 0}, "sweep_steps"),
        ({"max_rows": -1}, "max_rows"),
        ({"when_full": "panic"}, "when_full"),
        ({"shards": 3}, "power of two"),
        ({"shards": 512}, "power of two"),
    ],
)
def test_policies_out_of_range_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingTable("item", 2, **setting)
