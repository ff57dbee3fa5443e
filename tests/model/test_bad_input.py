"""What the models do with input that is empty, odd or wrong: a defined result or an error that says what to do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from components.errors import BadInput
from components.schemas import ACTIONS
from components.serve.loaded import LARGEST_WEIGHT
from model.catalogue import ItemCatalogue
from model.dataset import SequenceDataset
from model.inputs import UserEvents
from model.ranker import Ranker, RankerConfig
from model.retriever import Retriever, RetrieverConfig
from model.trainer import Trainer
from tests.model.make import START, catalogue, table, user

NOW = START + 10**13
SMALL = {"dim": 8, "head_dim": 4, "window": 7, "epochs": 1, "init_scale": 0.3}
IDS = np.array([1, 2, 3])
VARIANTS = ["research", "production"]


@pytest.fixture(params=VARIANTS)
def ranker(request: pytest.FixtureRequest) -> Ranker:
    config = RankerConfig(**SMALL, variant=request.param, heads="click,watch", regression="watch", context="user",
                          positions=8)  # fmt: skip
    return Ranker(config, catalogue())


@pytest.fixture(params=VARIANTS)
def retriever(request: pytest.FixtureRequest) -> Retriever:
    return Retriever(RetrieverConfig(**SMALL, variant=request.param, positive_actions="click"), catalogue())


@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_history_and_a_single_event_are_scored(ranker: Ranker, retriever: Retriever, count: int) -> None:
    history = user(7, count) if count else UserEvents.empty(7)
    scores = ranker.score(history, IDS, NOW)
    assert scores.shape == (3, 2) and np.isfinite(scores).all()
    ids, values = retriever.retrieve(history, NOW, k=5)
    assert len(ids) == 5 and np.isfinite(values).all()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_histories_are_trained_on(ranker: Ranker, retriever: Retriever, count: int) -> None:
    people = [user(1, count), user(2, 12), UserEvents.empty(3)]
    for model in (ranker, retriever):
        result = Trainer(model).fit(SequenceDataset(table(people)))
        assert np.isfinite(result["loss"]) and result["targets"] >= 1


def test_a_dataset_without_anything_to_learn_trains_nothing(ranker: Ranker) -> None:
    result = Trainer(ranker).fit(SequenceDataset(table([UserEvents.empty(1)])))
    assert result["steps"] == 0 and np.isnan(result["loss"])


def test_a_history_longer_than_the_limit_is_cut_to_the_newest(ranker: Ranker) -> None:
    long = user(2, 300, 8)
    np.testing.assert_allclose(ranker.score(long.take(np.arange(250, 300), 0), IDS, NOW),
                               ranker.score(long, IDS, NOW), atol=1e-6)  # fmt: skip


def test_the_order_of_the_interactions_in_a_history_does_not_matter(ranker: Ranker) -> None:
    events = user(3, 20, 4)
    order = np.random.default_rng(0).permutation(20)
    place = np.argsort(order)
    per_item = {name: getattr(events, name)[order] for name in vars(events)
                if name not in ("user_id", "new_from") and not name.startswith(("action_", "aux_"))}  # fmt: skip
    mixed = dataclasses.replace(events, **per_item, action_of=place[events.action_of].astype(np.int32))
    np.testing.assert_array_equal(ranker.score(mixed, IDS, NOW), ranker.score(events, IDS, NOW))


def test_interactions_of_one_moment_are_one_request_and_see_nothing_of_each_other() -> None:
    model = Ranker(RankerConfig(**SMALL, heads="click"), catalogue()).eval()
    events = user(3, 8, 4)
    same = np.full(8, START)
    tied = dataclasses.replace(
        events, timestamp=same, known_at=same, action_known_at=np.full_like(events.action_known_at, START)
    )
    other = dataclasses.replace(tied, item_id=np.r_[tied.item_id[:7], 39])
    with torch.no_grad():
        first, second = (model(model.tokens([e])).numpy() for e in (tied, other))
    assert np.array_equal(first[:7], second[:7]) and not np.array_equal(first[7], second[7])


@pytest.mark.parametrize("field", ["actions", "action_mask"])
def test_actions_that_are_not_known_are_refused(field: str) -> None:
    events = user(1, 12)
    strange = dataclasses.replace(events, **{field: getattr(events, field) | (1 << len(ACTIONS))})
    with pytest.raises(BadInput, match=f"{field} has bits of unknown actions.*known actions are click"):
        Ranker(RankerConfig(**SMALL), catalogue()).score(strange, IDS, NOW)


@pytest.mark.parametrize("off", [-12, 12])
@pytest.mark.parametrize("settings", [{}, {"variant": "production"}, {"max_interactions": 6}], ids=str)
def test_action_events_on_interactions_that_are_not_there_are_refused(settings: dict, off: int) -> None:
    events = user(1, 12, 1)
    beyond = dataclasses.replace(events, action_of=events.action_of + np.int32(off))
    for people in ([beyond], [beyond, user(2, 40)]):
        with pytest.raises(BadInput, match="action_of"):
            Trainer(Ranker(RankerConfig(**SMALL, **settings), catalogue())).fit(SequenceDataset(table(people)))


def test_arrays_of_different_length_are_refused() -> None:
    with pytest.raises(BadInput, match="page has 11 entries for 12 interactions"):
        events = user(1, 12)
        Ranker(RankerConfig(**SMALL), catalogue()).tokens([dataclasses.replace(events, page=events.page[:11])])


def test_times_of_one_user_never_become_those_of_another() -> None:
    """One user has a time too few, the other one too many: joined, the columns are of equal length."""
    one, other = user(1, 3), user(2, 2)
    times = np.concatenate([one.timestamp, other.timestamp])
    shifted = [dataclasses.replace(one, timestamp=times[:2]), dataclasses.replace(other, timestamp=times[2:])]
    with pytest.raises(BadInput, match="timestamp has 2 entries for 3 interactions of user 1"):
        Ranker(RankerConfig(**SMALL), catalogue()).tokens(shifted)


def test_a_row_of_the_largest_weights_that_are_served_changes_no_score_but_its_own(ranker: Ranker) -> None:
    ids = np.array([101, 102, 103])  # of none of them has the user a history
    before = ranker.score(user(1, 6, 1), ids, NOW)
    table = ranker.tables()["item"]
    table.upsert(ids[1:2], np.full((1, table.dim), LARGEST_WEIGHT, np.float32))
    after = ranker.score(user(1, 6, 1), ids, NOW)
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert np.isfinite(after).all()


def test_ids_never_seen_are_scored_and_learned(ranker: Ranker) -> None:
    strange = dataclasses.replace(
        user(1, 6, 1), user_id=-(2**63), item_id=np.array([2**63 - 1, -(2**63), -1, 0, 10**15, 7])
    )
    assert np.isfinite(ranker.score(strange, np.array([10**18, 0, -5]), NOW, 10**12)).all()
    trainer = Trainer(ranker)
    trainer.fit(SequenceDataset(table([strange])))
    assert (ranker.tables()["item"].lookup(strange.item_id, missing="zeros") != 0).any(1).all()


@pytest.mark.parametrize("candidates", [np.zeros(0, np.int64), np.ones((2, 2), np.int64)])
def test_no_candidates_are_refused(ranker: Ranker, candidates: np.ndarray) -> None:
    for score in (ranker.score, ranker.score_plain, ranker.watch_seconds):
        with pytest.raises(BadInput, match="no candidates"):
            score(user(1, 3), candidates, NOW)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -5.0])
def test_values_that_are_no_number_of_seconds_do_no_harm(ranker: Ranker, value: float) -> None:
    def odd(events: UserEvents) -> UserEvents:
        watch, score = np.full_like(events.watch_s, value), np.full_like(events.score, value)
        return dataclasses.replace(
            events, watch_s=watch, score=score, action_value=np.full_like(events.action_value, value)
        )

    people = [odd(user(i, 12)) for i in range(4)]
    trainer = Trainer(ranker)
    assert np.isfinite(trainer.fit(SequenceDataset(table(people)))["loss"])
    assert np.isfinite(ranker.score(people[0], IDS, NOW)).all()
    assert np.isfinite(trainer.evaluate(SequenceDataset(table(people)))["ne_click"])


def test_events_of_the_far_past_and_future_are_scored(ranker: Ranker) -> None:
    events = user(1, 12)
    far = dataclasses.replace(events, timestamp=events.timestamp - 10**17, known_at=events.known_at - 10**17)
    assert np.isfinite(ranker.score(far, IDS, 10**17)).all()


@pytest.mark.parametrize("candidates", [np.array([1.5, 2.0]), np.array([2**64 - 1], np.uint64), np.array(["a"])])
def test_candidates_that_are_no_int64_are_refused_and_not_rounded(ranker: Ranker, candidates: np.ndarray) -> None:
    with pytest.raises(BadInput, match="whole numbers of at most 64 bits"):
        ranker.score(user(1, 5), candidates, START)


@pytest.mark.parametrize("ids", [np.array([1.5, 2.0]), np.array([2**64 - 1], np.uint64), np.array(["a"])])
def test_items_that_are_no_int64_are_refused_and_not_rounded(retriever: Retriever, ids: np.ndarray) -> None:
    for choose in (
        lambda: retriever.retrieve(user(1, 5), NOW, allowed=ids),
        lambda: retriever.retrieve(user(1, 5), NOW, exclude=ids),
        lambda: retriever.set_items(ids),
    ):
        with pytest.raises(BadInput, match="whole numbers of at most 64 bits"):
            choose()
    assert len(retriever.retrieve(user(1, 5), NOW, allowed=np.array([]))[0]) == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_catalogue_of_other_ids_or_lengths_is_refused(place: int) -> None:
    columns = [IDS, IDS, IDS, np.ones(len(IDS), np.float32)]
    columns[place] = IDS + 0.5
    with pytest.raises(BadInput, match="whole numbers of at most 64 bits"):
        ItemCatalogue(*columns)
    columns[place] = IDS[:-1]
    with pytest.raises(BadInput, match="an author, a category and a duration each"):
        ItemCatalogue(*columns)


@pytest.mark.parametrize(
    "name, value",
    [
        ("user_id", pa.array([2**62 + 1, None])),
        ("new_from", pa.array([0, None])),
        ("user_id", pa.array([1.0, 2.0])),
        ("item_id", pa.array([[2**62 + 1, 7], [None, 6]])),
        ("item_id", pa.array([[1.5, 7], [1, 6]])),
        ("item_id", pa.array([[2**64 - 1, 7], [1, 6]], pa.list_(pa.uint64()))),
    ],
)
def test_sequences_with_nulls_or_fractions_among_whole_numbers_are_refused(name: str, value: pa.Array) -> None:
    rows = table([user(1, 2), user(2, 2)])
    with pytest.raises(BadInput, match=f"{name} must hold whole numbers of at most 64 bits and no nulls"):
        SequenceDataset(rows.set_column(rows.column_names.index(name), name, value))


def test_a_null_among_float_numbers_is_a_number_that_is_not_known() -> None:
    rows = table([user(1, 2), user(2, 2)])
    watch = pa.array([[1.0, None], [2.0, 3.0]], pa.list_(pa.float32()))
    data = SequenceDataset(rows.set_column(rows.column_names.index("watch_s"), "watch_s", watch))
    np.testing.assert_array_equal(data.column("watch_s"), np.array([1, np.nan, 2, 3], np.float32))


def test_a_first_new_interaction_below_zero_is_refused(ranker: Ranker) -> None:
    with pytest.raises(BadInput, match="new_from is below 0"):
        Trainer(ranker).fit(SequenceDataset(table([user(1, 5, new_from=-1)])))
