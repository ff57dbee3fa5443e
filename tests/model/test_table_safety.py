"""What can be put into a table by mistake, and what then happens: a message, and the table as it was."""

import copy
import os
import pickle
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from model.table import EmbeddingTable, Events
from model.table_arrays import MAX_TIME_US
from model.table_delta import TableDelta
from tests.model.table_model import EXTREME, INT64, assert_same_table, column, id_of_hash, int64

torch.set_num_threads(1)

DAY_US = 86_400_000_000


def trained(**settings: object) -> EmbeddingTable:
    table = EmbeddingTable("item", 2, **settings)  # type: ignore[arg-type]
    table.apply_gradients(int64(1, 2), np.ones((2, 2), np.float32), now_us=5)
    return table


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20, -1e16])
@pytest.mark.parametrize("way", ["arrays", "backward", "bag"])
def test_gradients_that_are_not_finite_are_refused_and_counted(bad: float, way: str) -> None:
    table, before = trained(), trained()
    with pytest.raises(ValueError, match=r"not finite or too large at row \d+, column \d; nothing was changed"):
        if way == "arrays":
            grads = np.ones((3, 2), np.float32)
            grads[2, 1] = bad
            table.apply_gradients(int64(1, 9, 2), grads)
        else:
            offsets = torch.tensor([0, 2, 3]) if way == "bag" else None
            out = table(torch.tensor([1, 9, 2]), offsets)
            out.backward(torch.full_like(out, bad))
            table.step()
    assert_same_table(table, before)
    assert table.stats()["refused_batches"] == 1
    table.discard()
    assert table.step() == 0


def test_a_sum_of_gradients_that_overflows_is_refused() -> None:
    table, before = trained(), trained()
    for threads in (1, 2):
        table.threads = threads
        with pytest.raises(ValueError, match="the sum of the gradients of id 2 is not finite or too large"):
            ids = np.concatenate([np.arange(3, 3000), [2] * 12])
            table.apply_gradients(ids, np.full((len(ids), 2), 1e14, np.float32))
    assert_same_table(table, before)
    assert table.stats()["refused_batches"] == 2
    assert table.apply_gradients(int64(1, *[2] * 9), np.full((10, 2), 1e14, np.float32)) == 2
    assert np.isfinite(column(table.export_all(), "state")).all()


def test_a_refused_step_can_be_repaired_and_repeated() -> None:
    table = EmbeddingTable("item", 2)
    out = table(torch.tensor([3]))
    out.backward(torch.full_like(out, float("nan")))
    with pytest.raises(ValueError, match="nothing was changed"):
        table.step()
    table.zero_grad()
    assert len(table) == 0
    table(torch.tensor([3])).sum().backward()
    assert table.step() == 1


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf"), 1e7])
def test_learning_rates_out_of_range_are_refused(lr: float) -> None:
    table, before = trained(), trained()
    with pytest.raises(ValueError, match="lr must be between 0 and 1e6"):
        table.apply_gradients(int64(1), np.ones((1, 2), np.float32), lr=lr)
    assert_same_table(table, before)


@pytest.mark.parametrize("us", [-1, MAX_TIME_US + 1, INT64.max])
def test_times_that_are_no_microseconds_of_our_days_are_refused(us: int) -> None:
    """Nanoseconds, say: the clock would stand in the year 2106, and every other row would expire."""
    table, before = trained(ttl_us=DAY_US, ttl_on_access=True), trained(ttl_us=DAY_US, ttl_on_access=True)
    one = np.ones((1, 2), np.float32)
    with pytest.raises(ValueError, match="now_us must be microseconds"):
        table.apply_gradients(int64(1), one, now_us=us)
    with pytest.raises(ValueError, match="last_update_us must be microseconds"):
        table.upsert(int64(1), one, last_update_us=int64(us))
    with pytest.raises(ValueError, match="times of events must be microseconds"):
        table(torch.tensor([1]), events=Events(np.ones(1, np.uint32), int64(us)))
    table(torch.tensor([1]))
    with pytest.raises(ValueError, match="now_us must be microseconds"):
        table.step(now_us=us)
    assert_same_table(table, before)


def test_the_newest_time_that_is_kept_comes_back() -> None:
    table = EmbeddingTable("item", 1)
    table.upsert(int64(1), np.zeros((1, 1), np.float32), last_update_us=int64(MAX_TIME_US))
    assert column(table.export_all(), "last_update_us").tolist() == [MAX_TIME_US]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.float64, torch.bool])
def test_ids_that_are_not_int64_are_refused_everywhere(dtype: torch.dtype) -> None:
    table = trained()
    ids = torch.tensor([1, 0]).to(dtype)
    row = np.zeros((2, 2), np.float32)
    calls = [
        lambda: table(ids),
        lambda: table.lookup(ids),
        lambda: table.find_or_insert(ids),
        lambda: table.apply_gradients(ids, row),
        lambda: table.upsert(ids, row),
        lambda: table.erase(ids.numpy()),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"must be int64, got .*; convert with"):
            call()
    assert len(table) == 2


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64])
def test_floats_that_are_not_float32_are_refused_everywhere(dtype: type) -> None:
    table = trained()
    row: np.ndarray = np.zeros((1, 2), dtype)
    good = np.zeros((1, 2), np.float32)
    for call in (
        lambda: table.apply_gradients(int64(1), row),
        lambda: table.upsert(int64(1), row),
        lambda: table.upsert(int64(1), good, state=row),
    ):
        with pytest.raises(TypeError, match="must be float32, got"):
            call()


@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 1), (2, 3), (2, 2, 1), (3, 2), ()])
def test_rows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    table, before = trained(), trained()
    values = np.zeros(shape, np.float32)
    for call in (
        lambda: table.apply_gradients(int64(1, 2), values),
        lambda: table.upsert(int64(1, 2), values),
        lambda: table.upsert(int64(1, 2), np.zeros((2, 2), np.float32), state=values),
    ):
        with pytest.raises(ValueError, match="must have"):
            call()
    assert_same_table(table, before)


def test_ids_of_any_layout_are_read_as_they_look() -> None:
    table = EmbeddingTable("item", 2)
    grid = torch.arange(24).reshape(2, 3, 4)
    rows = table.find_or_insert(grid)
    assert rows.shape == (2, 3, 4, 2)
    for view in (grid.permute(2, 0, 1), grid[:, ::2, 1:], grid.flip(0), grid[1, 2, 3], grid[:, :0]):
        picked = torch.stack([rows.reshape(-1, 2)[i] for i in view.reshape(-1)]) if view.numel() else rows[:0]
        assert torch.equal(table(view).detach(), picked.reshape(*view.shape, 2))
        assert torch.equal(table.lookup(view), table(view).detach())


def test_0_d_ids_are_one_row() -> None:
    table = EmbeddingTable("item", 3)
    out = table(torch.tensor(7))
    assert out.shape == (3,)
    out.sum().backward()
    assert table.step() == 1
    assert table.lookup(torch.tensor(7)).shape == (3,)


def test_values_of_any_layout_are_read_as_they_look() -> None:
    table = EmbeddingTable("item", 2, optimizer="sgd", learning_rate=1.0)
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    table.upsert(np.arange(8, dtype=np.int64)[::2], values.T)
    np.testing.assert_array_equal(table.lookup(int64(0, 2, 4, 6)).numpy(), values.T)
    table.apply_gradients(int64(6, 0), torch.from_numpy(values).T[::3].flip(0))
    np.testing.assert_array_equal(table.lookup(int64(0, 6)).numpy(), np.zeros((2, 2)))


@pytest.mark.parametrize("key", EXTREME)
def test_every_id_can_come_and_go(key: int) -> None:
    table = EmbeddingTable("item", 2, optimizer="sgd")
    table.upsert(int64(*(k for k in EXTREME if k != key)), np.zeros((len(EXTREME) - 1, 2), np.float32))
    assert table.lookup(int64(key), missing="zeros").count_nonzero() == 0
    assert table.erase(int64(key)) == 0
    assert table.apply_gradients(int64(key, key), np.ones((2, 2), np.float32)) == 1
    assert table.lookup(int64(key), missing="zeros").count_nonzero() == 2
    assert table.erase(int64(key, key)) == 1
    assert len(table) == len(EXTREME) - 1


def test_of_a_repeated_id_the_last_upsert_stays() -> None:
    table = EmbeddingTable("item", 1)
    assert table.upsert(int64(1, 2, 1), np.array([[1], [2], [3]], np.float32)) == 2
    assert table.lookup(int64(1, 2)).tolist() == [[3], [2]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_and_state_that_are_not_finite_are_refused(bad: float) -> None:
    table, before = trained(), trained()
    good, wrong = np.ones((2, 2), np.float32), np.array([[1, 1], [1, bad]], np.float32)
    with pytest.raises(ValueError, match="nothing was changed"):
        table.upsert(int64(1, 9), wrong)
    with pytest.raises(ValueError, match="nothing was changed"):
        table.upsert(int64(1, 9), 1e22 * good)
    for state in (wrong, -good):
        with pytest.raises(ValueError, match=r"state of row \d .* nothing was changed"):
            table.upsert(int64(1, 9), good, state=state)
    assert_same_table(table, before)


def test_a_delta_of_another_width_is_refused() -> None:
    table, before = trained(), trained()
    other = EmbeddingTable("item", 3)
    other.find_or_insert(int64(1))
    with pytest.raises(ValueError, match=r"weights must have shape \[1, 2\]"):
        table.apply_delta(other.export_all())
    assert_same_table(table, before)
    wrong = TableDelta(int64(1), np.zeros((1, 2)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weights must be float32, got float64"):
        table.apply_delta(wrong)
    assert_same_table(table, before)


def test_gradients_only_flow_where_the_output_is_used() -> None:
    table = EmbeddingTable("item", 2)
    with torch.no_grad():
        assert not table(torch.tensor([1])).requires_grad
    used, unused = table(torch.tensor([1])), table(torch.tensor([2]))
    assert used.requires_grad and unused.requires_grad
    used.sum().backward()
    assert table.step() == 1 and len(table) == 1
    unused.sum().backward()  # after the step that ended its batch
    assert table.step() == 0 and len(table) == 1
    with pytest.raises(TypeError, match=r"must be int64, got float32"):
        table(torch.ones(1, requires_grad=True))


def test_the_table_lives_inside_modules() -> None:
    """Moving, casting, copying modes and saving a model leave the rows alone: they are not parameters."""
    table = trained()
    model = torch.nn.Sequential(table, torch.nn.Linear(2, 1))
    model.to("cpu").double().float().eval().train().requires_grad_(True).zero_grad()
    assert [name for name, _ in model.named_parameters()] == ["1.weight", "1.bias"]
    assert list(model.state_dict()) == ["1.weight", "1.bias"]
    assert table.lookup(int64(1)).dtype == torch.float32
    model(torch.tensor([1, 5])).sum().backward()
    assert table.step() == 2
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="slot 'item' cannot be copied or pickled; use save_snapshot"):
            duplicate(model)


def test_a_frozen_table_does_not_learn() -> None:
    table, before = trained(), trained()
    assert table.requires_grad_(False) is table
    assert not table(torch.tensor([1, 5])).requires_grad
    assert table.step() == 0 and len(table) == 2
    assert_same_table(table, before)
    table.requires_grad_()(torch.tensor([1, 5])).sum().backward()
    assert table.step() == 2 and len(table) == 3


def test_clipping_factors_that_are_no_factors_are_refused() -> None:
    table = EmbeddingTable("item", 2)
    table(torch.tensor([1])).sum().backward()
    for factor in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="factor must be finite and >= 0"):
            table.scale_gradients(factor)
    assert table.gradient_squared_norm() == 2.0


def test_readers_beside_a_writer_see_whole_rows() -> None:
    """Every row holds one number in all its weights; growth, updates and erasures go on meanwhile."""
    table = EmbeddingTable("item", 16, "sgd", threads=1)
    fixed = np.arange(500, dtype=np.int64)
    table.upsert(fixed, np.ones((500, 16), np.float32))
    done, faults = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            rows = table.lookup(fixed, missing="zeros").numpy()
            if not (rows == rows[:, :1]).all() or (rows == 0).any():
                faults.append(rows)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for step in range(150):
        table.upsert(fixed, np.full((500, 16), step + 1, np.float32))
        passing = np.arange(1000 + step * 200, 1200 + step * 200, dtype=np.int64)
        table.upsert(passing, np.ones((200, 16), np.float32))
        table.erase(passing[::2])
    done.set()
    for reader in readers:
        reader.join()
    assert not faults


def test_a_forked_process_goes_on_with_the_table() -> None:
    """As a data loader's workers do, after the parent has worked with several threads."""
    table = EmbeddingTable("item", 8, threads=2)
    ids = np.arange(20_000, dtype=np.int64)
    grads = np.ones((len(ids), 8), np.float32)
    table.apply_gradients(ids, grads)
    time.sleep(0.05)  # the pool's threads are waiting for work
    child = os.fork()
    if child == 0:
        try:
            table.apply_gradients(ids, grads)
            os._exit(0 if len(table) == len(ids) else 2)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


@pytest.mark.parametrize("state", [[0, 0, 2.0**24 + 2], [1e22, 0, 1], [0, -1, 1]])
def test_state_that_adam_cannot_have_come_to_is_refused(state: list[float]) -> None:
    table = EmbeddingTable("item", 1, "adam")
    with pytest.raises(ValueError, match="optimiser state of row 0 is not finite, too large, or negative"):
        table.upsert(int64(1), np.ones((1, 1), np.float32), np.array([state], np.float32))
    assert len(table) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"min_rows": -1}, "min_rows cannot be -1"),
        ({"shards": -4}, "shards cannot be -4"),
        ({"admission_threshold": 2**32 + 1}, "admission_threshold cannot be 4294967297"),
        ({"ttl_us": 2**63}, "ttl_us cannot be 9223372036854775808"),
        ({"dim": 2.0}, r"dim cannot be 2\.0"),
        ({"learning_rate": -1.0}, "learning_rate must be between 0 and 1e"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"threads": -1}, "threads must be at least 1"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"l2": 0.1}, "adagrad has no l1 and l2; use optimizer='ftrl'"),
        ({"l1": 0.1, "optimizer": "adam"}, "adam has no l1 and l2"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingTable("item", **{"dim": 2, **setting})


def test_ids_made_to_collide_are_told_from_a_lack_of_memory() -> None:
    table = EmbeddingTable("item", 1)
    with pytest.raises(MemoryError, match="agree in the upper bits of their hashes"):
        table.find_or_insert(int64(*(id_of_hash(7 << 40 | i) for i in range(3000))))
    assert len(table) == 0
