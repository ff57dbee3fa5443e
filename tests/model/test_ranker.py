"""The ranker's scores depend on the user's known history and the candidate, on nothing else."""

from __future__ import annotations

import dataclasses
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from components.errors import BadInput
from model.dataset import SequenceDataset
from model.inputs import EVENT_DTYPES, Queries, UserEvents
from model.ranker import Ranker, RankerConfig
from model.trainer import Trainer
from tests.model.make import SECOND, START, catalogue, table, user

SMALL = RankerConfig(
    heads="click,watch", dim=8, head_dim=4, window=7, epochs=3, batch_tokens=128, init_scale=0.3, dense_lr=0.02,
    bias_slots="item,user,page", slots="item,author,category,page,duration",
)  # fmt: skip
NOW = START + 10**13


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    """A trained ranker: rows in its tables and all its parameters away from their start."""
    model = Ranker(SMALL, catalogue())
    Trainer(model).fit(SequenceDataset(table([user(i, 12, 9) for i in range(30)])))
    return model


def test_the_score_at_serving_equals_the_prediction_in_training(ranker: Ranker) -> None:
    users = [user(i, 25, 3, items=60) for i in range(4)]
    outputs = Trainer(ranker).predict(SequenceDataset(table(users)))
    for events in users:
        own = outputs["user_id"] == events.user_id
        for place in (0, 7, 24):
            row = np.flatnonzero(own & (outputs["interaction"] == place))[0]
            item = events.item_id[place : place + 1]
            got = ranker.score(events, item, int(events.timestamp[place]), int(events.page[place]))
            np.testing.assert_allclose(got[0], outputs["probability"][row], atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12, unique=True), st.integers(0, 100), st.randoms())
def test_a_score_does_not_depend_on_the_other_candidates(items: list[int], seed: int, random: Random) -> None:
    model = TRAINED.setdefault("ranker", Ranker(SMALL, catalogue()))
    history = user(1, 15, seed)
    together = model.score(history, np.array(items), NOW, 1)
    order = list(range(len(items)))
    random.shuffle(order)
    shuffled = model.score(history, np.array(items)[order], NOW, 1)
    np.testing.assert_allclose(shuffled, together[order], atol=1e-6)
    alone = model.score(history, np.array(items[:1]), NOW, 1)
    np.testing.assert_allclose(alone[0], together[0], atol=1e-6)


TRAINED: dict[str, Ranker] = {}


def test_a_prediction_does_not_depend_on_who_else_is_in_the_batch(ranker: Ranker) -> None:
    users = [user(i, n, 5) for i, n in enumerate([3, 40, 1, 17])]
    together = Trainer(ranker).predict(SequenceDataset(table(users)))
    for events in users:
        alone = Trainer(ranker).predict(SequenceDataset(table([events])))
        own = together["user_id"] == events.user_id
        np.testing.assert_allclose(together["probability"][own], alone["probability"], atol=1e-6)


def test_history_beyond_the_reach_of_the_layers_changes_nothing(ranker: Ranker) -> None:
    long = user(2, 80, 8)
    cut = dataclasses.replace(long, item_id=np.where(np.arange(80) < 10, 39, long.item_id))
    ids = np.array([1, 2, 3])
    np.testing.assert_array_equal(ranker.score(long, ids, NOW), ranker.score(cut, ids, NOW))


def test_an_impression_that_became_known_late_looks_back_from_its_own_request() -> None:
    """So it reaches beyond layers * window tokens, and what it sees is not left out."""
    model = Ranker(RankerConfig(heads="click", dim=8, head_dim=4, layers=2, window=1, init_scale=0.5), catalogue())
    torch.manual_seed(1)
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})
    first = user(2, 12, 8).take(np.arange(12), 0)
    none = {name: getattr(first, name)[:0] for name in EVENT_DTYPES if name.startswith(("action_", "aux_"))}
    time = START + np.arange(12) * SECOND
    late = np.where(np.arange(12) == 1, START + 100 * SECOND, time)
    events = dataclasses.replace(first, timestamp=time, known_at=late, **none)
    other = dataclasses.replace(events, item_id=np.where(np.arange(12) == 0, events.item_id % 40 + 1, events.item_id))
    scores = [model.score(u, np.array([7]), NOW) for u in (events, other)]
    assert model.config.reach() == 2 and abs(scores[0] - scores[1]).max() > 1e-3
    model.eval()
    for u, score in zip((events, other), scores, strict=True):
        whole = model(model.build([u], [Queries.candidates(np.array([7]), NOW, 0)]))
        np.testing.assert_allclose(score, torch.sigmoid(whole).detach().numpy(), atol=1e-6)


def test_what_is_not_yet_known_changes_nothing_and_what_is_known_does(ranker: Ranker) -> None:
    history = user(3, 12, 4)
    moment = int(history.timestamp[-1])
    ids = np.array([4, 5])
    before = ranker.score(history, ids, moment)
    future = history.timestamp >= moment
    other = dataclasses.replace(history, item_id=np.where(future, 33, history.item_id))
    np.testing.assert_array_equal(before, ranker.score(other, ids, moment))
    known = dataclasses.replace(history, item_id=np.where(future, history.item_id, 33))
    assert np.abs(before - ranker.score(known, ids, moment)).max() > 1e-5


def test_scoring_inserts_no_row_and_is_repeatable(ranker: Ranker) -> None:
    rows = {slot: len(t) for slot, t in ranker.tables().items()}
    unknown = np.array([10**15, -7])
    first = ranker.score(UserEvents.empty(10**12), unknown, NOW, 99)
    assert np.array_equal(first, ranker.score(UserEvents.empty(10**12), unknown, NOW, 99))
    assert {slot: len(t) for slot, t in ranker.tables().items()} == rows
    assert first.shape == (2, 2) and first.dtype == np.float32 and ((first > 0) & (first < 1)).all()


def test_candidates_in_several_blocks_score_as_in_one(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    history, ids = user(4, 10, 4), np.arange(1, 31)
    whole = ranker.score(history, ids, NOW)
    monkeypatch.setattr("model.falcon.MICROBATCH", 7)
    np.testing.assert_allclose(ranker.score(history, ids, NOW), whole, atol=1e-6)
    monkeypatch.setattr("model.ranker.CANDIDATE_BLOCK", 7)
    np.testing.assert_allclose(ranker.score_plain(history, ids, NOW), whole, atol=1e-6)


def test_no_candidates_are_refused(ranker: Ranker) -> None:
    with pytest.raises(BadInput, match="candidates"):
        ranker.score(user(1, 3), np.zeros(0, dtype=np.int64), NOW)


def test_an_output_that_is_named_twice_is_refused_since_it_would_count_twice() -> None:
    for setting, name in (("heads", "click"), ("regression", "watch"), ("bias_slots", "item")):
        with pytest.raises(ValidationError, match=f"{setting} names {name} twice"):
            RankerConfig.model_validate({setting: f"{name},{name}"})


@pytest.mark.parametrize(
    "setting,message",
    [({"heads": "clik"}, "unknown action"), ({"slots": "itm"}, "unknown slots"), ({"bias_slots": "x"}, "bias slots")],
)
def test_wrong_settings_name_the_known_values(setting: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Ranker(RankerConfig(**setting), catalogue())


def test_equal_seeds_give_equal_models_and_the_callers_random_state_is_kept() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other = Ranker(SMALL, catalogue()), Ranker(SMALL, catalogue())
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    ids = np.array([1, 2])
    assert np.array_equal(one.score(user(1, 5), ids, NOW), other.score(user(1, 5), ids, NOW))
