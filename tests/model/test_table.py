"""model.table.EmbeddingTable: rows, gradients, validation and the paper's figures."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.serving_table import ServingTable
from model.table import EmbeddingTable
from tests.model.table_model import EXTREME, INT64, assert_same_table, column, initial_weights, int64

torch.set_num_threads(1)


def test_a_new_row_is_the_documented_function_of_seed_slot_and_id() -> None:
    table = EmbeddingTable("item", 5, seed=2**64 - 3, init_scale=0.125)
    ids = int64(*EXTREME)
    before = table(torch.from_numpy(ids)).detach().numpy()
    rows = table.find_or_insert(ids).numpy()
    for row, there, key in zip(before, rows, EXTREME, strict=True):
        expected = initial_weights(2**64 - 3, "item", key, 5, 0.125)
        np.testing.assert_array_equal(row, expected)
        np.testing.assert_array_equal(there, expected)


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
    ids = int64(*EXTREME)
    table = EmbeddingTable("item", 1, optimizer="sgd")
    values = np.arange(len(ids), dtype=np.float32)[:, None]
    assert table.upsert(ids, values) == len(ids)
    np.testing.assert_array_equal(table.lookup(ids).numpy(), values)
    np.testing.assert_array_equal(table.export_all().keys, np.sort(ids))


def test_a_forward_inserts_nothing_and_serves_what_the_first_gradient_starts_from() -> None:
    table = EmbeddingTable("item", 3, optimizer="sgd", learning_rate=1.0)
    ids = torch.tensor([[3, 4], [-3, 3]])
    table.eval()
    served = table(ids)
    assert not served.requires_grad
    assert torch.equal(table.lookup(ids, missing="zeros"), torch.zeros(2, 2, 3))
    table.train()
    with torch.no_grad():
        assert not table(ids).requires_grad
    trained = table(ids)
    assert torch.equal(trained.detach(), served)
    assert len(table) == 0
    trained[0, 1].sum().backward()
    assert table.step() == 3  # the gradient of the others is zero, and a gradient
    assert torch.equal(table.lookup(ids)[0, 1], served[0, 1] - 1)
    assert torch.equal(table.lookup(ids)[1], served[1])


def test_empty_batches_are_fine() -> None:
    table = EmbeddingTable("item", 3)
    empty = torch.empty(0, 7, dtype=torch.int64)
    out = table(empty)
    assert out.shape == (0, 7, 3)
    out.sum().backward()
    assert table.step() == 0
    assert table.upsert(int64(), np.empty((0, 3), np.float32)) == table.erase(int64()) == len(table) == 0
    assert table.lookup(empty).shape == (0, 7, 3)
    assert table.export_all().weights.shape == column(table.export_delta(0), "state").shape == (0, 3)


def test_pending_gradients_of_several_forwards_are_one_update_per_id() -> None:
    split, joined = EmbeddingTable("item", 2), EmbeddingTable("item", 2)
    (split(torch.tensor([1, 2])) * 2).sum().backward()
    (split(torch.tensor([2, 3, 2])) * 3).sum().backward()
    assert split.step(now_us=9) == 3
    grads = np.repeat(np.array([[2], [2], [3], [3], [3]], np.float32), 2, axis=1)
    joined.apply_gradients(int64(1, 2, 2, 3, 2), grads, now_us=9)
    assert_same_table(split, joined)
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


@pytest.mark.parametrize("kind", [EmbeddingTable, ServingTable])
def test_a_slot_is_named_by_a_text(kind: Any) -> None:
    with pytest.raises(TypeError, match="slot must be a text, got 200"):
        kind(200, 2)


@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 2, 4])])
def test_what_a_forward_gave_may_be_changed_in_place(offsets: torch.Tensor | None) -> None:
    """As that of nn.Embedding: rows += positions, a dropout in place."""
    inplace, other = EmbeddingTable("item", 2), EmbeddingTable("item", 2)
    ids = torch.tensor([1, 2, 3, 1])
    rows = inplace(ids, offsets)
    rows *= 3
    rows[0] = 0
    rows.square().sum().backward()
    (other(ids, offsets) * 3)[1:].square().sum().backward()
    assert inplace.gradient_squared_norm() > 0
    assert inplace.step() == other.step() == 3
    assert_same_table(inplace, other)


def test_the_paper_table_1_collisions_do_not_happen_here() -> None:
    for ids, hashed_rows in ((162_541, 149_970), (59_047, 57_361)):
        hashed = {int(hashlib.md5(str(i).encode()).hexdigest(), 16) % 10**6 for i in range(ids)}
        assert len(hashed) == hashed_rows  # what the paper's baseline keeps of them
        table = EmbeddingTable("user", 1, optimizer="sgd")
        table(torch.arange(ids)).sum().backward()
        assert table.step() == ids
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
    memory = table.stats()["row_bytes"]
    table.upsert(keys[::2], weights[::2])
    assert table.stats()["row_bytes"] == memory  # rows of erased ids are used again


@pytest.mark.parametrize(("optimizer", "dim", "floats"), [("adagrad", 4, 8), ("adam", 4, 13), ("sgd", 57, 57)])
def test_bookkeeping_takes_at_most_32_bytes_per_row_of_any_width(optimizer: str, dim: int, floats: int) -> None:
    table = EmbeddingTable("item", dim, optimizer)
    keys = np.arange(1_000_000, dtype=np.int64)
    for part in np.array_split(keys, 50):
        table.upsert(part, np.zeros((len(part), dim), np.float32))
    stats = table.stats()
    assert 20 <= stats["overhead_bytes"] / len(keys) <= 32
    assert 1 <= stats["row_bytes"] / (len(keys) * floats * 4) <= 1.1


def test_a_missing_extension_says_how_to_build_it() -> None:
    code = "import sys; sys.modules['model._native.freshet_table'] = None; import model.table"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "ImportError" in result.stderr and "run `make build`" in result.stderr
