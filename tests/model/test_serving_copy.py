"""model.serving_table: a model whose embedding tables were replaced by their serving copies."""

import numpy as np
import pytest
import torch

from model import serving_table
from model.serving_table import PRECISIONS, ServingTable, served_weights, serving_copy
from model.table import EmbeddingTable

torch.set_num_threads(1)

DIM = 5
INT64 = np.iinfo(np.int64)
EXTREME = np.array([0, -1, 1, INT64.min, INT64.max, INT64.min + 1, 2**62, -(2**62)], dtype=np.int64)


def trained(rows: int = 200) -> EmbeddingTable:
    """A trainer's table after updates and erasures."""
    made = EmbeddingTable("item", DIM, seed=5, init_scale=0.2)
    keys = np.concatenate([EXTREME, np.arange(10, 10 + rows)])
    made.upsert(keys, np.random.default_rng(0).normal(size=(len(keys), DIM)).astype(np.float32))
    made.apply_gradients(keys[::2], np.ones((len(keys[::2]), DIM), np.float32), lr=0.1)
    made.erase(keys[1::5])
    return made


def copy_of(made: EmbeddingTable, precision: str) -> ServingTable:
    return serving_copy(torch.nn.ModuleDict({"table": made}), precision)[made.slot].eval()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_served_parameters_are_the_trainers_after_the_declared_rounding(precision: str) -> None:
    made = trained()
    served = copy_of(made, precision)
    ids = np.concatenate([EXTREME, np.arange(-50, 400)])  # rows, erased rows, and ids never seen
    assert len(served) == len(made)
    assert torch.equal(served.lookup(ids), served_weights(made.lookup(ids), precision))
    epoch = made.advance_epoch()
    made.apply_gradients(np.arange(300), np.full((300, DIM), -2, np.float32), lr=0.3)
    made.erase(np.arange(100, 120))
    served.apply_delta(made.export_delta(epoch))
    assert len(served) == len(made)
    assert torch.equal(served.lookup(ids), served_weights(made.lookup(ids), precision))


def test_a_copy_that_is_filled_in_parts_has_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained()
    monkeypatch.setattr(serving_table, "FILL_ROWS", 7)
    served = copy_of(made, "fp32")
    assert len(served) == len(made) > 2 * 7
    assert torch.equal(
        served.lookup(made.export_all().keys, missing="zeros"), torch.from_numpy(made.export_all().weights)
    )


class Model(torch.nn.Module):
    def __init__(self, item: EmbeddingTable, user: EmbeddingTable) -> None:
        super().__init__()
        self.tables = torch.nn.ModuleDict({"item": item, "user": user})
        self.again = item  # one table in two places
        self.head = torch.nn.Linear(DIM, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.tables["item"](ids) + self.tables["user"](ids) + self.again(ids)
        return rows


def test_a_model_answers_the_same_with_its_serving_copy() -> None:
    model = Model(trained(), EmbeddingTable("user", DIM, seed=3)).eval()
    ids = torch.arange(-20, 300)
    before = model(ids)
    copies = serving_copy(model, "fp32")
    assert sorted(copies) == ["item", "user"]
    assert not any(isinstance(module, EmbeddingTable) for module in model.modules())
    assert model.again is model.tables["item"] is copies["item"]
    assert torch.equal(model(ids), before)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.train()(ids)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_a_model_that_pools_answers_the_same_with_its_serving_copy(pooling: str) -> None:
    model = torch.nn.ModuleDict({"item": trained()}).eval()
    ids, offsets = torch.tensor([11, 12, 13, 999]), torch.tensor([0, 2, 2, 4])
    before = model["item"](ids, offsets, pooling)
    serving_copy(model)
    assert torch.equal(model["item"](ids, offsets, pooling), before)


def test_an_empty_serving_copy_has_the_settings_and_no_rows() -> None:
    made = trained()
    model = Model(made, EmbeddingTable("user", DIM, seed=3)).eval()
    copies = serving_copy(model, "fp16", fill=False)
    assert len(copies["item"]) == 0 and copies["item"].precision == "fp16"
    fresh = EmbeddingTable("item", DIM, seed=5, init_scale=0.2)
    ids = torch.arange(10)
    assert torch.equal(copies["item"].lookup(ids), served_weights(fresh.lookup(ids), "fp16"))


def test_a_copy_that_cannot_be_made_leaves_the_model_as_it_was() -> None:
    too_large = EmbeddingTable("user", DIM)
    too_large.upsert(np.array([1]), np.full((1, DIM), 1e6, np.float32))
    model = Model(trained(), too_large)
    with pytest.raises(ValueError, match="fp16"):
        serving_copy(model, "fp16")
    assert model.tables["user"] is too_large
    with pytest.raises(ValueError, match="two tables of one slot"):
        serving_copy(Model(trained(), trained()))
    with pytest.raises(ValueError, match="itself"):
        serving_copy(trained())
