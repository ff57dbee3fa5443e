"""Bags: lookup with pooling and its fused backward, against torch.nn.EmbeddingBag on dense weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.serving_table import ServingTable
from model.table import EmbeddingTable
from tests.model.table_model import INT64, assert_same_table, int64

torch.set_num_threads(1)

KEYS = torch.tensor([0, -1, INT64.min, INT64.max, 7, 1 << 40, -(1 << 50), 12])


def offsets_of(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int64)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 2, 3, 9]), max_size=7),
    pooling=st.sampled_from(["sum", "mean"]),
    dim=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_forward_and_fused_backward_equal_torch_embedding_bag(
    sizes: list[int], pooling: str, dim: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    members = torch.randint(0, len(KEYS), (sum(sizes),), generator=generator)  # with repeats, within bags and across
    table = EmbeddingTable("item", dim, learning_rate=0.1, initial_accumulator=0.1)
    table.find_or_insert(KEYS[: len(KEYS) // 2])  # the others have no row at first
    start = table.lookup(KEYS).clone()
    bag = torch.nn.EmbeddingBag.from_pretrained(start.clone(), freeze=False, mode=pooling, include_last_offset=True)
    optimizer = torch.optim.Adagrad(bag.parameters(), lr=0.1, initial_accumulator_value=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        out = table(KEYS[members], offsets_of(sizes), pooling)
        expected = bag(members, offsets_of(sizes))
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        grad = torch.randn(out.shape, generator=generator)
        out.backward(grad)
        expected.backward(grad)
        assert bag.weight.grad is not None
        norm = float(bag.weight.grad.double().square().sum())
        assert table.gradient_squared_norm() == pytest.approx(norm, rel=1e-5)
        optimizer.step()
        assert table.step() == len(set(members.tolist()))
    torch.testing.assert_close(table.lookup(KEYS), bag.weight.detach(), rtol=1e-5, atol=1e-6)


def test_an_empty_bag_is_zeros_and_moves_nothing() -> None:
    table = EmbeddingTable("item", 3)
    for pooling in ("sum", "mean"):
        out = table(torch.empty(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), pooling)
        assert torch.equal(out.detach(), torch.zeros(3, 3))
        out.sum().backward()
        assert table.step() == 0
    assert table(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).shape == (0, 3)


def test_bags_and_single_rows_are_one_update_per_id() -> None:
    pooled, plain = EmbeddingTable("item", 2), EmbeddingTable("item", 2)
    (pooled(torch.tensor([1, 2, 1]), torch.tensor([0, 2, 3])) * torch.tensor([[2.0], [3.0]])).sum().backward()
    (pooled(torch.tensor([2, 3])) * 5).sum().backward()
    pooled.step()
    grads = np.repeat(np.array([[2], [2], [3], [5], [5]], np.float32), 2, axis=1)
    plain.apply_gradients(int64(1, 2, 1, 2, 3), grads)
    assert_same_table(pooled, plain)


def test_reusing_the_buffers_of_a_forward_does_not_redirect_its_gradients() -> None:
    table = EmbeddingTable("item", 1, optimizer="sgd", learning_rate=1.0)
    start = table.lookup(int64(1, 2, 3)).clone()
    ids, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3])
    table(ids, offsets).backward(torch.tensor([[1.0], [10.0]]))
    ids.fill_(9)
    offsets[1] = 3
    table.step()
    torch.testing.assert_close(start - table.lookup(int64(1, 2, 3)), torch.tensor([[1.0], [10.0], [10.0]]))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([], "at least one"),
        ([1, 3], "offsets"),  # does not begin at 0
        ([0, 2], "offsets"),  # does not end at 3
        ([0, 4], "offsets"),
        ([0, 2, 1, 3], "offsets"),
        ([0, -1, 3], "offsets"),
        ([0, 2**62, 3], "offsets"),
    ],
)
def test_offsets_that_do_not_cut_the_ids_into_bags_are_refused(offsets: list[int], message: str) -> None:
    table = EmbeddingTable("item", 2)
    with pytest.raises(ValueError, match=message):
        table(torch.tensor([1, 2, 3]), torch.tensor(offsets, dtype=torch.int64))
    assert table.gradient_squared_norm() == 0.0 and table.step() == 0


def test_offsets_and_pooling_of_a_wrong_kind_are_refused() -> None:
    table = EmbeddingTable("item", 2)
    ids = torch.tensor([1, 2, 3])
    with pytest.raises(TypeError, match="offsets must be int64, got int32"):
        table(ids, torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(TypeError, match="offsets must be an int64 tensor"):
        table(ids, [0, 3])
    with pytest.raises(ValueError, match='pooling must be "sum" or "mean", got \'max\''):
        table(ids, torch.tensor([0, 3]), "max")
    for unpooled in (table, ServingTable("item", 2).eval()):
        with pytest.raises(ValueError, match='pooling="mean" needs offsets'):
            unpooled(ids, pooling="mean")


def test_evaluation_pools_without_waiting_for_gradients() -> None:
    table = EmbeddingTable("item", 2)
    table.eval()
    out = table(torch.tensor([1, 2]), torch.tensor([0, 2]), "mean")
    torch.testing.assert_close(out[0], table.lookup(int64(1, 2)).mean(0))
    assert not out.requires_grad and len(table) == 0
    table.train()
    assert table.step() == 0
