"""The models in a training loop, and the trainer with a model, of one's own."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.dataset import SequenceDataset
from model.inputs import Tokens, UserEvents
from model.ranker import Ranker, RankerConfig
from model.retriever import Retriever, RetrieverConfig
from model.sequence_model import SequenceModel
from model.settings import ModelConfig
from model.trainer import Trainer
from tests.model.make import START, catalogue, table, user

NOW = START + 10**13
SMALL = {"dim": 8, "head_dim": 4, "window": 16, "init_scale": 0.3}
MEASURES: dict[str, tuple[type[Ranker] | type[Retriever], Callable[..., object]]] = {
    "score": (Ranker, lambda model: model.score(user(1, 9), np.arange(1, 5), NOW)),
    "score_plain": (Ranker, lambda model: model.score_plain(user(1, 9), np.arange(1, 5), NOW)),
    "retrieve": (Retriever, lambda model: model.retrieve(user(1, 9), NOW)),
    "user_vector": (Retriever, lambda model: model.user_vector(user(1, 9), NOW)),
    "evaluate": (Ranker, lambda model: Trainer(model).evaluate(SequenceDataset(table([user(1, 9)])))),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_training_goes_on_after_the_model_was_asked_something(measure: str) -> None:
    kind, ask = MEASURES[measure]
    model = kind((RankerConfig if kind is Ranker else RetrieverConfig)(**SMALL), catalogue())  # type: ignore[arg-type]
    model.input_dropout.eval()  # the caller's choice
    before = [part.training for part in model.modules()]
    ask(model)
    assert [part.training for part in model.modules()] == before
    loss, _ = model.loss(model.tokens([user(1, 9)]))
    loss.backward()
    assert sum(rows.step() for rows in model.tables().values()) > 0


def test_asking_needs_no_gradients_and_draws_no_dropout() -> None:
    model = Retriever(RetrieverConfig(**SMALL, dropout=0.9), catalogue())
    vectors = [model.user_vector(user(1, 9), NOW) for _ in range(2)]
    assert torch.equal(*vectors) and not vectors[0].requires_grad


def test_one_thread_that_is_done_does_not_end_the_inference_of_another() -> None:
    model = Ranker(RankerConfig(**SMALL), catalogue())
    inside, leave = Event(), Event()

    def ask() -> None:
        with model.inference():
            inside.set()
            leave.wait()

    other = Thread(target=ask)
    with model.inference():
        other.start()
        inside.wait()
    assert not any(part.training for part in model.modules())
    leave.set()
    other.join()
    assert all(part.training for part in model.modules())


class Dwell(SequenceModel):
    """How long is an item watched: a model with a head and a loss of its own."""

    def make_head(self, config: ModelConfig, outputs: int) -> nn.Module:
        return nn.Linear(config.dim, outputs)

    def tokens(self, users: list[UserEvents]) -> Tokens:
        return self.build(users, None)

    def loss(self, tokens: Tokens) -> tuple[Tensor, int]:
        return F.mse_loss(self.encode(tokens)[:, 0], torch.log1p(tokens.watch)), len(tokens.targets)

    def evaluate_batch(self, tokens: Tokens) -> dict[str, NDArray]:
        return {"error": self.encode(tokens)[:, 0].numpy() - np.log1p(tokens.watch.numpy())}

    def summarise(self, outputs: dict[str, NDArray]) -> dict[str, float]:
        return {"rmse": float(np.sqrt(np.square(outputs["error"]).mean()))}


def test_the_trainer_trains_a_model_of_ones_own() -> None:
    dataset = SequenceDataset(table([user(i, 12) for i in range(20)]))
    trainer = Trainer(Dwell(ModelConfig(**SMALL, epochs=3, dense_lr=0.02), catalogue(), outputs=1))
    before = trainer.evaluate(dataset)["rmse"]
    trainer.fit(dataset)
    assert trainer.evaluate(dataset)["rmse"] < 0.9 * before
