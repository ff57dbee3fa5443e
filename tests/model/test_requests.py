"""Requests as training examples: what the production network learns from is what it serves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from components.errors import BadInput
from model.dataset import SequenceDataset
from model.ranker import Ranker, RankerConfig
from model.requests import RequestDataset
from model.retriever import Retriever, RetrieverConfig
from model.trainer import Trainer
from tests.model.make import SECOND, START, catalogue, shown_alone, table, user

SMALL = {
    "variant": "production", "dim": 8, "head_dim": 4, "window": 7, "init_scale": 0.3, "batch_tokens": 200,
    "context": "user,page", "epochs": 2,
}  # fmt: skip


def users(count: int = 12) -> list:
    return [user(i, 12, 9, new_from=i % 5) for i in range(count)]


def test_every_new_interaction_is_a_target_of_exactly_one_request() -> None:
    people = users()
    rows = RequestDataset(SequenceDataset(table(people)), reach=14)
    found = [(e.user_id, place) for e in rows.users(range(len(rows))) for place in range(e.new_from, len(e))]
    expected = [(e.user_id, place) for e in people for place in range(e.new_from, len(e))]
    assert sorted(found) == expected and rows.targets() == len(expected)
    for events in rows.users(range(len(rows))):
        assert len(set(events.timestamp[events.new_from :].tolist())) == 1


def test_requests_without_a_positive_are_left_out_where_only_positives_are_learned() -> None:
    people = SequenceDataset(table(users()))
    model = Retriever(RetrieverConfig(**SMALL, positive_actions="click"), catalogue())
    rows, some = RequestDataset(people, 14), model.examples(people)
    assert 0 < len(some) < len(rows)
    assert len(model.tokens(some.users(range(len(some)))).targets) == len(
        model.tokens(rows.users(range(len(rows)))).targets
    )
    loss, count = model.loss(model.tokens([]))
    assert count == 0 and loss.item() == 0.0


def test_batches_of_requests_stay_within_the_token_budget() -> None:
    model = Ranker(RankerConfig(**SMALL, heads="click"), catalogue())
    rows = model.examples(SequenceDataset(table(users())))
    for batch in rows.shuffled(200, 0, 0) + rows.in_event_order(200):
        size = len(model.tokens(rows.users(batch)))
        assert size - 2 * len(batch) <= 200 or len(batch) == 1, "context tokens come on top"


def test_requests_for_more_items_than_stochastic_length_keeps_stay_within_the_token_budget() -> None:
    model = Ranker(
        RankerConfig(**(SMALL | {"context": "", "batch_tokens": 100, "epochs": 1}), heads="click", max_interactions=40,
                     stochastic_alpha=1.2), catalogue()
    )  # fmt: skip
    time = START + np.minimum(np.arange(60), 40) * 600 * SECOND  # the last twenty are shown at once
    people = [
        dataclasses.replace(shown_alone(user(i, 60, 1, new_from=40)), timestamp=time, known_at=time, page=0 * time)
        for i in range(20)
    ]
    data = SequenceDataset(table(people))
    read: list[int] = []
    Trainer(model).fit(data, on_step=lambda step: read.append(step.tokens))
    assert np.mean(read) > 50 and max(read) <= 100


def test_generative_sampling_emits_each_request_of_n_with_probability_1_over_n() -> None:
    rows = RequestDataset(SequenceDataset(table([user(i, 4 + 20 * (i % 2), 9) for i in range(60)])), reach=14)
    per_user = np.bincount(rows.owner)
    drawn = np.mean([np.bincount(rows.owner[rows.emitted(0, e)], minlength=60) for e in range(300)], axis=0)
    assert drawn.mean() == pytest.approx(1.0, abs=0.03), "about one per user and pass, however long the history"
    assert per_user.max() > 8 and abs(drawn[per_user > 8].mean() - 1) < 0.05
    batches = rows.shuffled(200, 0, 5, sampled=True)
    assert sorted(np.concatenate(batches)) == np.flatnonzero(rows.emitted(0, 5)).tolist()


def test_the_served_score_is_the_prediction_of_evaluation() -> None:
    model = Ranker(RankerConfig(**SMALL, heads="click,watch", bias_slots="item"), catalogue())
    trainer = Trainer(model)
    trainer.fit(SequenceDataset(table(users())))
    people = [user(i, 25, 3, items=60) for i in range(3)]
    outputs = trainer.predict(SequenceDataset(table(people)))
    assert len(outputs["user_id"]) == 75
    for events in people:
        own = outputs["user_id"] == events.user_id
        for place in (0, 7, 24):
            row = np.flatnonzero(own & (outputs["interaction"] == place))[0]
            moment, page = int(events.timestamp[place]), int(events.page[place])
            got = model.score(events, events.item_id[place : place + 1], moment, page)
            np.testing.assert_allclose(got[0], outputs["probability"][row], atol=1e-6)
            assert outputs["label"][row, 0] == float(events.actions[place] & 1)


def test_requests_of_one_moment_on_two_pages_have_each_its_own_page() -> None:
    """As a log in whole seconds has them; the page's context token stands for one page."""
    model = Ranker(RankerConfig(**SMALL, heads="click"), catalogue())
    trainer = Trainer(model)
    trainer.fit(SequenceDataset(table(users())))
    events = user(1, 25, 3)
    events.timestamp[:] = events.known_at[:] = events.timestamp // (1200 * SECOND) * (1200 * SECOND)
    moments = set(zip(events.timestamp.tolist(), events.page.tolist(), strict=True))
    assert len(moments) > len(np.unique(events.timestamp))
    outputs = trainer.predict(SequenceDataset(table([events])))
    for place, probability in zip(outputs["interaction"], outputs["probability"], strict=True):
        moment, page = int(events.timestamp[place]), int(events.page[place])
        got = model.score(events, events.item_id[place : place + 1], moment, page)
        np.testing.assert_allclose(got[0], probability, atol=1e-6)


def test_the_retriever_serves_the_vector_that_it_learned() -> None:
    model = Retriever(RetrieverConfig(**SMALL, positive_actions="click"), catalogue())
    Trainer(model).fit(SequenceDataset(table(users())))
    events = user(5, 25, 3)
    model.eval()
    rows = model.examples(SequenceDataset(table([events])))
    with torch.no_grad():
        tokens = model.tokens(rows.users(range(len(rows))))
        vectors = model(tokens)
    wanted = np.flatnonzero((events.actions & model.positive) > 0)
    assert tokens.labels.tolist() == events.item_id[wanted].tolist()
    for row, place in enumerate(wanted):
        served = model.user_vector(events, int(events.timestamp[place]), int(events.page[place]))
        assert torch.allclose(served, vectors[row], atol=1e-6)


@pytest.mark.parametrize("sampling", [False, True])
def test_training_on_requests_learns(sampling: bool) -> None:
    model = Ranker(
        RankerConfig(**(SMALL | {"epochs": 12, "dense_lr": 0.01, "table_lr": 0.2}), heads="click",
                     generative_sampling=sampling), catalogue()
    )  # fmt: skip
    losses: list[float] = []
    people = [dataclasses.replace(u, actions=(u.item_id % 4 == 0).astype(np.int32)) for u in users(40)]
    result = Trainer(model).fit(SequenceDataset(table(people)), on_step=lambda s: losses.append(s.loss))
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8]) and result["steps"] == len(losses)


def test_a_whole_user_is_no_input_of_a_network_that_is_relative_to_one_request() -> None:
    model = Ranker(RankerConfig(**SMALL, heads="click"), catalogue())
    with pytest.raises(BadInput, match="one request"):
        model(model.tokens([user(1, 12, 9)]))


def test_requests_need_interactions_in_order_of_time() -> None:
    events = user(1, 12, 9)
    turned = dataclasses.replace(events, timestamp=events.timestamp[::-1].copy())
    with pytest.raises(BadInput, match="order of time"):
        RequestDataset(SequenceDataset(table([turned])), reach=14)
