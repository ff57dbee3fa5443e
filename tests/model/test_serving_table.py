"""model.serving_table: what is served of the trainer's rows, in each precision, and beside a writer."""

import copy
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from model.serving_table import PRECISIONS, ServingTable, served_weights

torch.set_num_threads(1)

DIM = 5
INT64 = np.iinfo(np.int64)
EXTREME = np.array([0, -1, 1, INT64.min, INT64.max, INT64.min + 1, 2**62, -(2**62)], dtype=np.int64)

# Few enough ids that programs meet them again, extremes among them, and enough to make the table grow.
KEYS = st.one_of(st.sampled_from(EXTREME.tolist()), st.integers(-300, 300))
BATCH = st.tuples(st.lists(KEYS, max_size=300), st.lists(KEYS, max_size=100), st.integers(0, 2**32 - 1))
WEIGHTS = npst.arrays(
    np.float32,
    st.tuples(st.integers(0, 6), st.integers(1, 70)),
    elements=st.floats(-65504, 65504, width=32),
)


def int64(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def table(precision: str = "fp32") -> ServingTable:
    return ServingTable("item", DIM, precision).eval()


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=30, deadline=None)
@given(batches=st.lists(BATCH, min_size=1, max_size=6))
def test_it_is_a_dict_of_rounded_rows(precision: str, batches: list[tuple[list[int], list[int], int]]) -> None:
    served = table(precision)
    expected: dict[int, np.ndarray] = {}
    for keys, tombstones, seed in batches:
        weights = np.random.default_rng(seed).normal(size=(len(keys), DIM)).astype(np.float32)
        rounded = served_weights(weights, precision).numpy()
        new = set(keys) - expected.keys()
        expected.update(zip(keys, rounded, strict=True))
        gone = set(tombstones) & expected.keys()
        assert served.update(int64(keys), weights, int64(tombstones)) == (len(new), len(gone))
        for key in gone:
            del expected[key]
        assert len(served) == len(expected) == served.stats()["rows"]
        asked = int64([*EXTREME.tolist(), *range(-301, 302)])
        zeros = np.zeros(DIM, np.float32)
        wanted = np.stack([expected.get(key, zeros) for key in asked.tolist()])
        assert served.lookup(asked, missing="zeros").numpy().tobytes() == wanted.tobytes()


def test_fp32_is_equal_to_the_bit() -> None:
    weights = np.array([[0.0, -0.0, 1e-45, -3e38, 0.1]], dtype=np.float32)
    served = table("fp32")
    served.update(int64([7]), weights)
    assert served.lookup(int64([7])).numpy().tobytes() == weights.tobytes()


@given(weights=WEIGHTS)
def test_fp16_is_numpys_rounding(weights: np.ndarray) -> None:
    expected = weights.astype(np.float16).astype(np.float32)
    assert served_weights(weights, "fp16").numpy().tobytes() == expected.tobytes()


@given(weights=WEIGHTS, exponent=st.integers(-140, 111))
def test_int8_is_within_half_a_scale_of_its_row(weights: np.ndarray, exponent: int) -> None:
    weights = np.ldexp(weights, exponent)
    exact = weights.astype(np.float64)
    scale = np.maximum(np.abs(exact).max(1, initial=0.0) / 127, 2.0**-126)
    error = np.abs(served_weights(weights, "int8").numpy().astype(np.float64) - exact)
    assert (error <= scale[:, None] / 2 * (1 + 2.0**-14)).all()


def test_the_largest_float_stays_finite_in_int8() -> None:
    weights = np.array([[np.finfo(np.float32).max, -1.0]], dtype=np.float32)
    assert torch.isfinite(served_weights(weights, "int8")).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_and_change_nothing(precision: str, bad: float) -> None:
    served = table(precision)
    served.update(int64([1, 2]), np.ones((2, DIM), np.float32))
    before, stats = served.lookup(int64([1, 2, 3])), served.stats()
    weights = np.full((2, DIM), 2.0, np.float32)
    weights[1, 3] = bad
    with pytest.raises(ValueError, match=r"row 1 \(id 3\).*finite.*nothing was changed"):
        served.update(int64([1, 3]), weights, int64([2]))
    with pytest.raises(ValueError, match="finite"):
        served_weights(weights, precision)
    assert torch.equal(served.lookup(int64([1, 2, 3])), before)
    changed = {"looked_up", "missed"}
    assert {k: v for k, v in served.stats().items() if k not in changed} == {
        k: v for k, v in stats.items() if k not in changed
    }


def test_what_fp16_cannot_hold_is_refused_with_the_way_out() -> None:
    served = table("fp16")
    largest = np.full((1, DIM), 65519.996, np.float32)
    served.update(int64([1]), largest)
    assert (served.lookup(int64([1])) == 65504).all()
    with pytest.raises(ValueError, match=r"too large for fp16.*fp32 or int8"):
        served.update(int64([1]), np.full((1, DIM), -65520, np.float32))
    assert (served.lookup(int64([1])) == 65504).all()
    with pytest.raises(ValueError, match="init_scale"):
        ServingTable("item", DIM, "fp16", init_scale=1e5)


@settings(max_examples=30, deadline=None)
@given(
    bags=st.lists(st.lists(st.integers(0, 120), max_size=80), max_size=12),
    pooling=st.sampled_from(["sum", "mean"]),
    missing=st.sampled_from(["initial", "zeros"]),
)
def test_pooling_adds_each_bags_rows_in_order(bags: list[list[int]], pooling: str, missing: str) -> None:
    served = table()
    served.update(np.arange(100), np.random.default_rng(0).normal(size=(100, DIM)).astype(np.float32))
    ids, offsets = int64([i for bag in bags for i in bag]), np.cumsum([0, *map(len, bags)])
    pooled = served.lookup_pooled(ids, offsets, pooling, missing)
    assert pooled.shape == (len(bags), DIM)
    for bag, row in zip(bags, pooled, strict=True):
        total = np.zeros(DIM, np.float32)
        for weights in served.lookup(int64(bag), missing).numpy():
            total += weights
        if pooling == "mean" and bag:
            total /= np.float32(len(bag))
        assert row.numpy().tobytes() == total.tobytes()


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [1, 3], [0, 4], [0, 2], [], [0, -1, 3]])
def test_offsets_that_do_not_fit_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets"):
        table().lookup_pooled(int64([1, 2, 3]), int64(offsets))


def test_empty_batches_and_any_shape_of_ids() -> None:
    served = table()
    assert served.update(int64([]), np.empty((0, DIM), np.float32)) == (0, 0)
    assert served(torch.empty(0, 7, dtype=torch.int64)).shape == (0, 7, DIM)
    ids = torch.arange(24).view(2, 3, 4)
    assert torch.equal(served(ids).view(24, DIM), served.lookup(ids.view(-1)))
    assert torch.equal(served(ids.mT), served(ids).transpose(1, 2))  # not contiguous
    assert bool(served) and len(served) == 0


def test_wrong_types_and_shapes_are_refused() -> None:
    served, row = table(), np.zeros((1, DIM), np.float32)
    with pytest.raises(TypeError, match="int64"):
        served.lookup(np.zeros(3, np.int32))
    with pytest.raises(TypeError, match="tensor"):
        served(np.zeros(3, np.int64))
    with pytest.raises(TypeError, match="float32"):
        served.update(int64([1]), row.astype(np.float64))
    with pytest.raises(TypeError, match="tombstones must be int64"):
        served.update(int64([1]), row, np.zeros(1, np.int32))
    for wrong in (row[0], row[:, 1:], np.zeros((2, DIM), np.float32)):
        with pytest.raises(ValueError, match="shape"):
            served.update(int64([1]), wrong)
    with pytest.raises(ValueError, match="missing"):
        served.lookup(int64([1]), missing="nan")
    with pytest.raises(ValueError, match="pooling"):
        served.lookup_pooled(int64([1]), int64([0, 1]), "max")
    with pytest.raises(ValueError, match="precision"):
        table("bf16")
    with pytest.raises(ValueError, match="dim"):
        ServingTable("item", 0)
    assert len(served) == 0


def test_it_cannot_be_trained() -> None:
    with pytest.raises(RuntimeError, match="'item' cannot be trained"):
        ServingTable("item", DIM)(torch.tensor([1]))
    served = table()(torch.tensor([1]))
    assert not served.requires_grad


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_a_copy_of_it_is_made_by_feeding_another_one(duplicate: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="'item' cannot be copied or pickled; make another ServingTable"):
        duplicate(torch.nn.Sequential(table()))


def test_stats_count_ids_and_rows() -> None:
    served = table("int8")
    served.update(int64([1, 2, 3]), np.ones((3, DIM), np.float32))
    served.update(int64([3]), np.ones((1, DIM), np.float32), int64([1, 99]))
    served.lookup(int64([1, 2, 2]))
    served.lookup_pooled(int64([2, 98]), int64([0, 2]))
    stats = served.stats()
    assert {k: stats[k] for k in ("rows", "looked_up", "missed", "upserted", "erased")} == {
        "rows": 2, "looked_up": 5, "missed": 2, "upserted": 4, "erased": 1,
    }  # fmt: skip
    assert stats["row_bytes"] > 0 and stats["overhead_bytes"] > 0


@pytest.mark.parametrize(("precision", "bytes_per_row"), [("fp32", 256), ("fp16", 128), ("int8", 68)])
def test_a_large_table_costs_its_rows_and_at_most_32_bytes_for_each(precision: str, bytes_per_row: int) -> None:
    served = ServingTable("item", 64, precision)
    for at in range(0, 200_000, 50_000):
        served.update(np.arange(at, at + 50_000), np.ones((50_000, 64), np.float32))
    stats = served.stats()
    slack = 4 << 20  # the last slab, partly empty
    assert 200_000 * bytes_per_row <= stats["row_bytes"] <= 200_000 * bytes_per_row + slack
    assert stats["overhead_bytes"] <= 32 * 200_000


def test_readers_see_whole_rows_and_every_key_while_a_writer_is_at_work() -> None:
    """Each float of a row is its key plus its version, so that a row of two versions, or of another key, shows."""
    served, steady, rounds = table(), np.arange(1, 401), 300
    coming = np.arange(1000, 1400)
    served.update(steady, _rows(steady, 0))
    done, problems = threading.Event(), []

    def read() -> None:
        random = np.random.default_rng(0)
        while not done.is_set():
            ids = np.concatenate([random.choice(steady, 300), random.choice(coming, 100)])
            rows = served.lookup(ids, missing="zeros").numpy()
            present = rows[:, 0] != 0
            whole = (rows == rows[:, :1]).all(1)
            own = ((rows[:, 0] - ids) % 4096 == 0) | ~present
            if not (whole.all() and own.all() and present[:300].all()):
                problems.append((ids, rows))
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for version in range(1, rounds):
        half = coming[version % 2 :: 2]
        keys = np.concatenate([steady, half])
        served.update(keys, _rows(keys, version), np.setdiff1d(coming, half))
    done.set()
    for reader in readers:
        reader.join()
    assert not problems
    assert torch.equal(served.lookup(steady), torch.from_numpy(_rows(steady, rounds - 1)))


def _rows(keys: np.ndarray, version: int) -> np.ndarray:
    return np.repeat((keys + 4096 * version).astype(np.float32)[:, None], DIM, axis=1)
