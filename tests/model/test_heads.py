"""Outputs of several tasks from one vector."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from components.errors import BadInput
from model.dataset import SequenceDataset
from model.heads import Mmoe, make_head, shared_bottom
from model.ranker import Ranker
from model.settings import RankerConfig
from model.trainer import Trainer
from tests.model.make import START, catalogue, table, user

SMALL = {"heads": "click,watch", "dim": 8, "head_dim": 4, "window": 9, "epochs": 2, "batch_tokens": 128}


def test_each_task_mixes_the_same_experts_with_a_gate_of_its_own() -> None:
    torch.manual_seed(0)
    head = Mmoe(dim=6, hidden=5, experts=3, outputs=2)
    x = torch.randn(4, 6)
    gates = head.gates(x)
    assert gates.shape == (4, 2, 3)
    torch.testing.assert_close(gates.sum(2), torch.ones(4, 2))
    assert not torch.allclose(gates[:, 0], gates[:, 1])
    experts = [torch.nn.functional.silu(head.expert(x)[:, e * 5 : e * 5 + 5]) for e in range(3)]
    for task in range(2):
        mixed = torch.stack([gates[:, task, e, None] * experts[e] for e in range(3)]).sum(0)
        torch.testing.assert_close(head(x)[:, task], mixed @ head.tower[task] + head.bias[task])


def test_the_shared_bottom_is_linear_or_has_one_hidden_layer() -> None:
    assert isinstance(shared_bottom(4, 0, 2), nn.Linear)
    assert shared_bottom(4, 7, 2)(torch.randn(3, 4)).shape == (3, 2)
    assert isinstance(make_head(RankerConfig(task_head="mmoe"), 3), Mmoe)


@pytest.mark.parametrize(
    "head", [{"task_head": "mmoe", "head_hidden": 6, "experts": 2}, {"head_hidden": 6}, {"regression": "watch"}]
)
def test_a_ranker_with_any_head_trains_and_scores(head: dict) -> None:
    model = Ranker(RankerConfig(**(SMALL | head)), catalogue())
    trainer = Trainer(model)
    data = SequenceDataset(table([user(i, 12, 9) for i in range(20)]))
    losses: list[float] = []
    trainer.fit(data, epochs=8, on_step=lambda step: losses.append(step.loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    scores = model.score(user(1, 12, 9), np.array([1, 2, 3]), START + 10**13)
    assert scores.shape == (3, 2) and ((scores > 0) & (scores < 1)).all()


def test_watch_time_is_learned_and_served_in_seconds() -> None:
    """Half of the items are watched for 60 s, the others not at all."""

    def watched(u):  # type: ignore[no-untyped-def]
        u.watch_s = np.where(u.item_id % 2 == 0, 60.0, 0.0).astype(np.float32)
        return u

    settings = SMALL | {"regression": "watch", "regression_weight": 1.0, "epochs": 25, "dense_lr": 0.02}
    model = Ranker(RankerConfig(**settings, table_lr=0.3, dropout=0.0, input_dropout=0.0, init_scale=0.2), catalogue())
    trainer = Trainer(model)
    trainer.fit(SequenceDataset(table([watched(user(i, 12, 9)) for i in range(40)])))
    seconds = model.watch_seconds(user(1, 12, 9), np.array([2, 4, 6, 1, 3, 5]), START + 10**13)
    assert (seconds[:3] > 30).all() and (seconds[3:] < 10).all() and seconds.min() >= 0
    metrics = trainer.evaluate(SequenceDataset(table([watched(user(i, 12, 9)) for i in range(5)])))
    assert metrics["rmse_log_watch"] < 1.0


def test_a_value_that_is_not_predicted_is_refused() -> None:
    with pytest.raises(BadInput, match="regression=watch"):
        Ranker(RankerConfig(**SMALL), catalogue()).watch_seconds(user(1, 3), np.array([1]), START)
    with pytest.raises(BadInput, match="unknown regression"):
        Ranker(RankerConfig(**SMALL, regression="smiles"), catalogue())


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_predictions_are_calibrated_whatever_share_of_the_negatives_is_trained_on(rate: float) -> None:
    data = SequenceDataset(table([user(i, 20, 9) for i in range(150)]))
    settings = SMALL | {"heads": "click", "negative_rate": rate, "epochs": 4, "dense_lr": 0.005, "batch_tokens": 512}
    trainer = Trainer(Ranker(RankerConfig(**settings, slots="page", bias_slots="page"), catalogue()))
    seen = trainer.fit(data)["targets"] / 4
    assert (seen < 0.6 * data.targets()) if rate < 1 else (seen == data.targets())
    metrics = trainer.evaluate(data)
    assert 0.85 < metrics["calibration_click"] < 1.15, "uncorrected it would promise more than twice as much"


def test_seconds_are_unbiased_with_a_share_of_the_negatives() -> None:
    data = SequenceDataset(table([user(i, 20, 9) for i in range(150)]))
    settings = SMALL | {"heads": "click", "negative_rate": 0.2, "epochs": 16, "dense_lr": 0.01, "batch_tokens": 512}
    watch = {"regression": "watch", "regression_weight": 1.0}
    trainer = Trainer(Ranker(RankerConfig(**settings, **watch, slots="page", bias_slots="page"), catalogue()))
    trainer.fit(data)
    predicted, true = trainer.predict(data)["value"].mean(), np.log1p(data.column("watch_s")).mean()
    assert predicted == pytest.approx(true, rel=0.12), "clicked impressions are watched twice as long as the average"


@pytest.mark.parametrize("differs", ["user", "item", "moment"])
def test_each_impression_is_drawn_by_itself(differs: str) -> None:
    """Also one that differs from others in its user, its item or its moment alone."""
    shown = user(1, 200, 9).take(np.arange(200), 0)
    shown.actions[:] = 0
    if differs != "item":
        shown.item_id[:] = 7
    if differs != "moment":
        for name in ("timestamp", "known_at"):
            getattr(shown, name)[:] = START
    people = [shown]
    if differs == "user":
        people = [dataclasses.replace(shown.take(np.arange(1), 0), user_id=i) for i in range(200)]
    model = Ranker(RankerConfig(**SMALL, negative_rate=0.2), catalogue())
    assert 20 <= model.loss(model.tokens(people))[1] <= 60


def test_seconds_are_learned_from_the_drawn_impressions_alone() -> None:
    settings = SMALL | {"negative_rate": 0.3, "regression": "watch", "dropout": 0.0, "input_dropout": 0.0}
    model = Ranker(RankerConfig(**settings), catalogue())
    tokens = model.tokens([user(i, 20, 9) for i in range(5)])
    before, drawn = model.loss(tokens)[0], model._drawn(tokens)
    tokens.watch[~drawn] += 50.0
    assert torch.equal(model.loss(tokens)[0], before)
    tokens.watch[drawn] += 50.0
    assert not torch.equal(model.loss(tokens)[0], before)


def test_seconds_that_are_not_known_count_nothing_in_the_measure() -> None:
    model = Ranker(RankerConfig(**SMALL, regression="watch"), catalogue())
    outputs = {
        "label": np.zeros((4, 2), np.float32), "probability": np.full((4, 2), 0.5, np.float32),
        "value": np.full((4, 1), 2.0, np.float32), "seconds": np.array([0, -5, np.nan, np.inf], np.float32),
    }  # fmt: skip
    assert model.summarise(outputs)["rmse_log_watch"] == pytest.approx(2.0)
