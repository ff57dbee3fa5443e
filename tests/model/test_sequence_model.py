"""Ranker and retriever in a training loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread

import numpy as np
import pytest
import torch

from model.dataset import SequenceDataset
from model.ranker import Ranker, RankerConfig
from model.retriever import Retriever, RetrieverConfig
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
