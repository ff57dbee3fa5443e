"""model.table.EmbeddingTable: rows, gradients, validation and the paper's figures."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model.table import OPTIMIZERS, EmbeddingTable, slot_hash

torch.set_num_threads(1)

INT64 = np.iinfo(np.int64)
EXTREME = np.array([0, -1, 1, INT64.min, INT64.max, INT64.min + 1, 2**62, -(2**62)], dtype=np.int64)
MASK = 2**64 - 1


def int64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def assert_same_rows(a: EmbeddingTable, b: EmbeddingTable) -> None:
    x, y = a.export_all(), b.export_all()
    for name in ("keys", "weights", "state", "last_update_us"):
        assert getattr(x, name).tobytes() == getattr(y, name).tobytes(), name


def mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def initial_weights(seed: int, slot: str, key: int, dim: int, scale: float) -> np.ndarray:
    golden = 0x9E3779B97F4A7C15
    table_key = mix64(mix64((seed + golden) & MASK) ^ slot_hash(slot))
    row_key = mix64(table_key ^ mix64(((key & MASK) + golden) & MASK))
    draws = [mix64((row_key + (j + 1) * golden) & MASK) >> 40 for j in range(dim)]
    units = np.array([(2 * k + 1 - 2**24) / 2**24 for k in draws], dtype=np.float32)
    return units * np.float32(scale)


def test_a_new_row_is_the_documented_function_of_seed_slot_and_id() -> None:
    table = EmbeddingTable("item", 5, seed=2**64 - 3, init_scale=0.125)
    rows = table(torch.from_numpy(EXTREME)).detach().numpy()
    for row, key in zip(rows, EXTREME, strict=True):
        np.testing.assert_array_equal(row, initial_weights(2**64 - 3, "item", int(key), 5, 0.125))


def test_initial_weights_are_uniform_and_depend_on_seed_slot_and_id() -> None:
    ids = torch.arange(20_000)
    rows = EmbeddingTable("item", 4).lookup(ids)
    assert rows.abs().max() < 0.05
    assert abs(float(rows.mean())) < 5e-4
    assert float(rows.std()) == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert len(np.unique(rows.numpy(), axis=0)) == len(ids)
    assert not torch.equal(rows, EmbeddingTable("user", 4).lookup(ids))
    assert not torch.equal(rows, EmbeddingTable("item", 4, seed=1).lookup(ids))


def test_extreme_ids_have_rows_of_their_own() -> None:
    table = EmbeddingTable("item", 1, optimizer="sgd")
    values = np.arange(len(EXTREME), dtype=np.float32)[:, None]
    assert table.upsert(EXTREME, values) == len(EXTREME)
    np.testing.assert_array_equal(table.lookup(EXTREME).numpy(), values)
    np.testing.assert_array_equal(table.export_all().keys, np.sort(EXTREME))


def test_evaluation_inserts_nothing_and_serves_what_training_would_start_from() -> None:
    table = EmbeddingTable("item", 3)
    ids = torch.tensor([[3, 4], [-3, 3]])
    table.eval()
    served = table(ids)
    assert len(table) == 0 and not served.requires_grad
    assert torch.equal(table.lookup(ids, missing="zeros"), torch.zeros(2, 2, 3))
    table.train()
    with torch.no_grad():
        table(ids)
    assert len(table) == 0
    trained = table(ids)
    assert len(table) == 3
    assert torch.equal(trained.detach(), served)


def test_empty_batches_are_fine() -> None:
    table = EmbeddingTable("item", 3)
    empty = torch.empty(0, 7, dtype=torch.int64)
    out = table(empty)
    assert out.shape == (0, 7, 3)
    out.sum().backward()
    assert table.step() == 0
    assert table.upsert(int64(), np.empty((0, 3), np.float32)) == table.erase(int64()) == len(table) == 0
    assert table.lookup(empty).shape == (0, 7, 3)
    assert table.export_all().weights.shape == table.export_delta(0).state.shape == (0, 3)


def test_training_equals_a_dense_embedding_with_torch_adagrad() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(INT64.min, INT64.max, (20,), generator=generator)
    table = EmbeddingTable("item", 6, learning_rate=0.1, initial_accumulator=0.1)
    dense = torch.nn.Embedding.from_pretrained(table.lookup(keys).clone(), freeze=False)
    optimizer = torch.optim.Adagrad(dense.parameters(), lr=0.1, initial_accumulator_value=0.1)
    target = torch.randn(6, generator=generator)
    for _ in range(25):
        optimizer.zero_grad()
        batch = [torch.randint(0, 20, (4, 5), generator=generator) for _ in range(2)]  # with repeats
        for lookup, ids in ((table, [keys[b] for b in batch]), (dense, batch)):
            loss = sum(((lookup(i) @ target).sigmoid() - 0.3).square().sum() for i in ids)
            loss.backward()
        torch.testing.assert_close(
            table.gradient_squared_norm(), float(dense.weight.grad.double().square().sum()), rtol=1e-5, atol=0
        )
        optimizer.step()
        table.step()
    torch.testing.assert_close(table.lookup(keys), dense.weight.detach(), rtol=1e-5, atol=1e-6)


def _reference_update(optimizer: str, w: np.ndarray, state: dict, g: np.ndarray, lr: float) -> np.ndarray:
    if optimizer == "sgd":
        return w - lr * g
    if optimizer.endswith("adagrad"):
        square = g * g if optimizer == "adagrad" else (g * g).mean()
        state["sum"] = state.get("sum", 0.0) + square
        return w - lr * g / (np.sqrt(state["sum"]) + 1e-10)
    state["t"] = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g * g
    m, v = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
    return w - lr * m / (np.sqrt(v) + 1e-8)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_optimizer_follows_its_equations_row_by_row(optimizer: str) -> None:
    random = np.random.default_rng(1)
    table = EmbeddingTable("item", 4, optimizer=optimizer)
    weights = {k: table.lookup(int64(k)).numpy()[0].astype(np.float64) for k in range(3)}
    states: dict[int, dict] = {k: {} for k in range(3)}
    for step in range(30):
        ids = int64(0, 1) if step % 3 else int64(2)  # rows take different numbers of steps
        grads = random.normal(size=(len(ids), 4)).astype(np.float32)
        table.apply_gradients(ids, grads, lr=0.02)
        for key, g in zip(ids.tolist(), grads.astype(np.float64), strict=True):
            weights[key] = _reference_update(optimizer, weights[key], states[key], g, 0.02)
    for key, expected in weights.items():
        np.testing.assert_allclose(table.lookup(int64(key)).numpy()[0], expected, rtol=2e-5, atol=2e-6)


def test_pending_gradients_of_several_forwards_are_one_update_per_id() -> None:
    split, joined = EmbeddingTable("item", 2), EmbeddingTable("item", 2)
    (split(torch.tensor([1, 2])) * 2).sum().backward()
    (split(torch.tensor([2, 3, 2])) * 3).sum().backward()
    assert split.step(now_us=9) == 3
    grads = np.array([[2, 2], [8, 8], [3, 3]], dtype=np.float32)
    joined.apply_gradients(int64(1, 2, 3), grads, now_us=9)
    assert_same_rows(split, joined)
    assert split.step() == 0  # applied once


def test_gradients_can_be_clipped_dropped_and_discarded() -> None:
    table = EmbeddingTable("item", 2, optimizer="sgd", learning_rate=1.0)
    before = table.lookup(int64(5)).clone()
    table(torch.tensor([5, 5])).sum().backward()
    assert table.gradient_squared_norm() == 8.0  # of the summed gradient [2, 2]
    table.scale_gradients(0.25)
    table.step()
    torch.testing.assert_close(table.lookup(int64(5)), before - 0.5)
    after = table.lookup(int64(5)).clone()
    table(torch.tensor([5])).sum().backward()
    table.zero_grad()
    assert table.step() == 0
    late = table(torch.tensor([5]))
    table.zero_grad()  # before the backward: nothing to drop yet
    late.sum().backward()
    assert table.gradient_squared_norm() == 2.0
    table.discard()
    assert table.step() == 0
    assert torch.equal(table.lookup(int64(5)), after)


def test_reusing_the_id_buffer_does_not_redirect_gradients() -> None:
    table = EmbeddingTable("item", 2)
    ids = torch.tensor([1, 2])
    table(ids).sum().backward()
    ids.fill_(77)
    table.step(now_us=1)
    assert table.export_all().keys.tolist() == [1, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20])
def test_bad_gradients_are_refused_and_the_table_is_unchanged(bad: float) -> None:
    table = EmbeddingTable("item", 2)
    table.apply_gradients(int64(1, 2), np.ones((2, 2), np.float32), now_us=5)
    before = table.export_all()
    grads = np.ones((3, 2), np.float32)
    grads[2, 1] = bad
    with pytest.raises(ValueError, match="row 2, column 1; nothing was changed"):
        table.apply_gradients(int64(1, 9, 2), grads)
    after = table.export_all()
    assert before.keys.tobytes() == after.keys.tobytes() and before.state.tobytes() == after.state.tobytes()
    assert before.weights.tobytes() == after.weights.tobytes()
    table(torch.tensor([1])).mul(float("nan")).sum().backward()
    with pytest.raises(ValueError, match="not finite"):
        table.step()
    table.discard()
    assert table.export_all().weights.tobytes() == before.weights.tobytes()


def test_wrong_types_and_shapes_are_refused_with_advice() -> None:
    table = EmbeddingTable("item", 2)
    ones = np.ones((1, 2), np.float32)
    with pytest.raises(TypeError, match=r"must be int64.*\.long\(\)"):
        table(torch.tensor([1], dtype=torch.int32))
    with pytest.raises(TypeError, match="torch tensor"):
        table([1])
    with pytest.raises(TypeError, match="int64 tensor or array"):
        table.erase([1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be float32"):
        table.upsert(int64(1), ones.astype(np.float64))
    with pytest.raises(ValueError, match=r"shape \[2, 2\]"):
        table.upsert(int64(1, 2), ones)
    with pytest.raises(ValueError, match=r"state must have shape \[1, 2\]"):
        table.upsert(int64(1), ones, state=np.ones((1, 3), np.float32))
    with pytest.raises(ValueError, match="last_update_us"):
        table.upsert(int64(1), ones, last_update_us=int64(1, 2))
    with pytest.raises(ValueError, match=r"grads must have shape \[1, 2\]"):
        table.apply_gradients(int64(1), np.ones(2, np.float32))
    with pytest.raises(ValueError, match="weight is not finite"):
        table.upsert(int64(1), ones * np.nan)
    with pytest.raises(ValueError, match="lr must be"):
        table.apply_gradients(int64(1), ones, lr=-0.1)
    with pytest.raises(ValueError, match="missing must be"):
        table.lookup(int64(1), missing="random")
    assert len(table) == 0


@pytest.mark.parametrize(
    "setting",
    [
        {"optimizer": "lamb"},
        {"dim": 0},
        {"seed": -1},
        {"init_scale": -1.0},
        {"initial_accumulator": float("nan")},
        {"epsilon": 0.0},
        {"betas": (0.9, 1.0)},
    ],
    ids=lambda s: next(iter(s)),
)
def test_settings_out_of_range_are_refused(setting: dict) -> None:
    with pytest.raises(ValueError):
        EmbeddingTable(**{"slot": "item", "dim": 2, **setting})


def test_non_contiguous_input_is_read_as_it_looks() -> None:
    table = EmbeddingTable("item", 2, optimizer="sgd")
    ids = np.arange(10, dtype=np.int64)[::-2]
    weights = np.arange(10, dtype=np.float32).reshape(2, 5).T
    table.upsert(ids, weights)
    np.testing.assert_array_equal(table.lookup(ids.copy()).numpy(), weights)
    grid = torch.arange(6).reshape(2, 3).T
    assert torch.equal(table(grid)[2, 1], table.lookup(torch.tensor(5)))


def test_the_paper_table_1_collisions_do_not_happen_here() -> None:
    for ids, hashed_rows in ((162_541, 149_970), (59_047, 57_361)):
        hashed = {int(hashlib.md5(str(i).encode()).hexdigest(), 16) % 10**6 for i in range(ids)}
        assert len(hashed) == hashed_rows  # what the paper's baseline keeps of them
        table = EmbeddingTable("user", 1, optimizer="sgd")
        table(torch.arange(ids))
        assert len(table) == ids


def test_a_hundred_thousand_rows_keep_their_weights_while_the_table_grows() -> None:
    random = np.random.default_rng(2)
    keys = np.unique(random.integers(INT64.min, INT64.max, 100_000, dtype=np.int64))
    random.shuffle(keys)
    weights = random.normal(size=(len(keys), 2)).astype(np.float32)
    table = EmbeddingTable("item", 2)
    for start in range(0, len(keys), 997):
        table.upsert(keys[start : start + 997], weights[start : start + 997])
    assert len(table) == len(keys) == table.stats()["inserted"]
    np.testing.assert_array_equal(table.lookup(keys).numpy(), weights)
    table.erase(keys[::2])
    np.testing.assert_array_equal(table.lookup(keys[1::2]).numpy(), weights[1::2])
    memory = table.stats()["memory_bytes"]
    table.upsert(keys[::2], weights[::2])
    assert table.stats()["memory_bytes"] == memory  # rows of erased ids are used again


def test_a_missing_extension_says_how_to_build_it() -> None:
    code = "import sys; sys.modules['model._native.freshet_table'] = None; import model.table"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "ImportError" in result.stderr and "run `make build`" in result.stderr
