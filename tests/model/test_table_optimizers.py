"""The optimisers inside model.table.EmbeddingTable, against torch.optim and against written-out formulas."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.table import OPTIMIZERS, EmbeddingTable
from tests.model.table_model import (
    INT64,
    assert_same_table,
    column,
    id_of_hash,
    initial_state,
    initial_weights,
    int64,
    update,
)

torch.set_num_threads(1)

DIM = 5


def rates(steps: int) -> list[float]:
    return [0.1 / (1 + step) ** 0.5 for step in range(steps)]


TORCH: dict[str, tuple[dict, Callable[[list], torch.optim.Optimizer]]] = {
    "sgd": ({}, lambda p: torch.optim.SGD(p, lr=1.0)),
    "adagrad": (
        {"initial_accumulator": 0.1},
        lambda p: torch.optim.Adagrad(p, lr=1.0, initial_accumulator_value=0.1, eps=1e-10),
    ),
    "adam": (
        {"betas": (0.8, 0.99), "epsilon": 1e-6},
        lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.8, 0.99), eps=1e-6),
    ),
}


@pytest.mark.parametrize("optimizer", TORCH)
def test_training_equals_a_dense_embedding_with_torch_optim(optimizer: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(INT64.min, INT64.max, (20,), generator=generator)
    arguments, make = TORCH[optimizer]
    table = EmbeddingTable("item", DIM, optimizer, **arguments)
    dense = torch.nn.Embedding.from_pretrained(table.lookup(keys).clone(), freeze=False)
    reference = make(list(dense.parameters()))
    target = torch.randn(DIM, generator=generator)
    for lr in rates(25):
        reference.zero_grad()
        reference.param_groups[0]["lr"] = lr
        # Every row is in every step: torch's Adam moves rows without a gradient too. Some come twice.
        batch = [torch.randperm(20, generator=generator), torch.randint(0, 20, (4, 3), generator=generator)]
        for lookup, ids in ((table, [keys[b] for b in batch]), (dense, batch)):
            sum(((lookup(i) @ target).sigmoid() - 0.3).square().sum() for i in ids).backward()
        expected = float(dense.weight.grad.double().square().sum())
        assert table.gradient_squared_norm() == pytest.approx(expected, rel=1e-5)
        reference.step()
        table.step(lr=lr)
    torch.testing.assert_close(table.lookup(keys), dense.weight.detach(), rtol=2e-5, atol=2e-6)


def test_adam_equals_torch_sparse_adam_on_rows_of_every_step_and_moves_no_other() -> None:
    table = EmbeddingTable("item", DIM, "adam")
    dense = torch.nn.Embedding.from_pretrained(table.lookup(torch.arange(4)).clone(), freeze=False, sparse=True)
    reference = torch.optim.SparseAdam(list(dense.parameters()), lr=0.05)
    for step in range(10):
        ids = torch.tensor([0, 1, 1, 2])
        for lookup in (table, dense):
            (lookup(ids) * (step + 1)).square().sum().backward()
        reference.step()
        table.step(lr=0.05)
        reference.zero_grad()
    torch.testing.assert_close(table.lookup(torch.arange(4)), dense.weight.detach(), rtol=2e-5, atol=2e-6)


def ftrl_reference(
    grads: np.ndarray, rate: list[float], w: np.ndarray, l1: float, l2: float, beta: float
) -> np.ndarray:
    """McMahan et al. 2013, algorithm 1, in float64: all sigmas so far add up to 1 / eta, at a changing rate, too."""
    w = w.astype(np.float64)
    for j in range(len(w)):
        z, n, before = 0.0, 0.1, 0.0
        for g, lr in zip(grads[:, j].astype(np.float64), rate, strict=True):
            n += g * g
            inverse = (beta + np.sqrt(n)) / lr
            z, before = z + g - (inverse - before) * w[j], inverse
            w[j] = 0.0 if abs(z) <= l1 else -(z - np.sign(z) * l1) / (inverse + l2)
    return w


@pytest.mark.parametrize(("l1", "l2", "beta"), [(0.0, 0.0, 1.0), (0.5, 0.0, 1.0), (0.3, 0.7, 0.5)])
def test_ftrl_follows_the_paper(l1: float, l2: float, beta: float) -> None:
    table = EmbeddingTable("item", 64, "ftrl", initial_accumulator=0.1, l1=l1, l2=l2, ftrl_beta=beta)
    start = table.lookup(int64(3)).numpy()[0].copy()
    grads = np.random.default_rng(4).normal(scale=0.3, size=(12, 64)).astype(np.float32)
    for g, lr in zip(grads, rates(12), strict=True):
        table.apply_gradients(int64(3), g[None], lr=lr)
    expected = ftrl_reference(grads, rates(12), start, l1, l2, beta)
    weights = table.lookup(int64(3)).numpy()[0]
    np.testing.assert_allclose(weights, expected, rtol=3e-4, atol=2e-6)
    zeros = int((weights == 0).sum())
    assert zeros == int((expected == 0).sum())
    assert (zeros > 0) == (l1 > 0)  # what l1 is for


def test_ftrl_without_regularisation_descends_at_a_rate_of_its_own_per_weight_whatever_the_schedule() -> None:
    """As the paper says of it. A rate that falls must not shrink the weights, nor one that rises again blow them up."""
    table = EmbeddingTable("item", 1, "ftrl", init_scale=0.5)
    w, n = float(table.lookup(int64(5))), 0.0
    for lr in [*np.linspace(0.5, 0.05, 200), *[0.5] * 20]:
        gradient = np.float32(2 * (w - 1.0))
        table.apply_gradients(int64(5), np.full((1, 1), gradient), lr=lr)
        n += float(gradient) ** 2
        w -= lr * float(gradient) / (1 + n**0.5)
        assert float(table.lookup(int64(5))) == pytest.approx(w, rel=1e-4)
    assert w == pytest.approx(1.0, abs=1e-3)


def test_rowwise_adagrad_keeps_one_sum_of_the_mean_squares() -> None:
    table = EmbeddingTable("item", 4, "rowwise_adagrad", initial_accumulator=1.0, epsilon=0.5)
    assert table.state_dim == 1
    start = table.lookup(int64(1)).numpy()[0].copy()
    table.apply_gradients(int64(1), np.array([[2, 4, 0, 2]], np.float32), lr=3.0)
    delta = table.export_all()
    assert column(delta, "state").tolist() == [[7.0]]  # 1 + (4 + 16 + 0 + 4) / 4
    steps = np.array([2, 4, 0, 2]) * 3.0 / (np.sqrt(7.0) + 0.5)
    np.testing.assert_allclose(delta.weights[0], start - steps, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    optimizer=st.sampled_from(OPTIMIZERS),
    dim=st.integers(1, 70),
    steps=st.lists(st.sampled_from([0.0, 1e-3, 0.05, 1.0]), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
)
def test_each_row_is_its_formula_to_the_bit_at_any_width(
    optimizer: str, dim: int, steps: list[float], seed: int, scale: float
) -> None:
    """The widths go through every vector length of the compiled loops and their remainders."""
    accumulator = 0.25 if optimizer == "ftrl" else 0.0
    random = np.random.default_rng(seed)
    table = EmbeddingTable("item", dim, optimizer, initial_accumulator=accumulator)
    keys = random.integers(INT64.min, INT64.max, 3, dtype=np.int64)
    weights = [initial_weights(0, "item", int(key), dim, 0.05) for key in keys]
    states = [initial_state(optimizer, dim, accumulator) for _ in keys]
    for step, lr in enumerate(steps):
        rows = [0, 1, 2] if step % 2 else [0, 2]  # rows take different numbers of steps
        grads = (random.normal(size=(len(rows), dim)) * scale).astype(np.float32)
        assert table.apply_gradients(keys[rows], grads, lr=lr) == len(rows)
        for row, g in zip(rows, grads, strict=True):
            if lr > 0 or optimizer != "ftrl":
                update(optimizer, weights[row], states[row], g, lr)
    order = np.argsort(keys) if len(steps) > 1 else [i for i in np.argsort(keys) if i != 1]
    delta = table.export_all()
    assert delta.weights.tobytes() == np.array([weights[i] for i in order]).tobytes()
    assert column(delta, "state").tobytes() == np.array([states[i] for i in order]).tobytes()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_evicted_and_reinserted_id_starts_afresh(optimizer: str) -> None:
    table, fresh = (EmbeddingTable("item", DIM, optimizer, initial_accumulator=0.5) for _ in range(2))
    grad = np.full((1, DIM), 0.5, np.float32)
    for _ in range(3):
        table.apply_gradients(int64(8), grad, now_us=5)
    table.erase(int64(8))
    assert torch.equal(table.lookup(int64(8)), fresh.lookup(int64(8)))
    table.apply_gradients(int64(8), grad)
    fresh.apply_gradients(int64(8), grad)
    assert_same_table(table, fresh)  # weights, state, time and count


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shards", [1, 64])
def test_threads_and_shards_do_not_change_a_bit(optimizer: str, shards: int) -> None:
    one = EmbeddingTable("item", DIM, optimizer, shards=16, threads=1)
    many = EmbeddingTable("item", DIM, optimizer, shards=shards, threads=4)
    random = np.random.default_rng(7)
    for _ in range(4):
        ids = random.zipf(1.2, 6000).astype(np.int64)
        grads = random.normal(size=(len(ids), DIM)).astype(np.float32)
        assert one.apply_gradients(ids, grads) == many.apply_gradients(ids, grads)
        assert torch.equal(one.lookup(ids), many.lookup(ids))
    assert_same_table(one, many)


def test_a_batch_whose_ids_all_belong_to_one_thread_is_what_one_thread_makes_of_it() -> None:
    """As a process sees them that has few of a table's virtual buckets: the ids of all other shards are elsewhere."""
    one, many = (EmbeddingTable("item", DIM, shards=16, threads=threads) for threads in (1, 4))
    random = np.random.default_rng(7)
    ids = np.array([id_of_hash(7 << 60 | low) for low in random.integers(0, 1 << 60, 8000).tolist()])
    ids = np.concatenate([ids, ids[:1000]])
    grads = random.normal(size=(len(ids), DIM)).astype(np.float32)
    assert one.apply_gradients(ids, grads) == many.apply_gradients(ids, grads) == 8000
    assert_same_table(one, many)


def test_the_learning_rate_of_a_step_is_its_own() -> None:
    table = EmbeddingTable("item", 1, "sgd", learning_rate=0.5)
    start = float(table.lookup(int64(1)))
    one = np.ones((1, 1), np.float32)
    table.apply_gradients(int64(1), one, lr=0.25)
    table.apply_gradients(int64(1), one)
    table.learning_rate = 2.0
    table.apply_gradients(int64(1), one)
    table.apply_gradients(int64(1), one, lr=0.0)
    assert float(table.lookup(int64(1))) == pytest.approx(start - 2.75)
    assert column(table.export_all(), "counts").tolist() == [4]
