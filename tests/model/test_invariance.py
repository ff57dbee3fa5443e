"""A score is a function of the user's history and the candidate: not of the batch, padding, order or a cache."""

from __future__ import annotations

import dataclasses
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention import time_bucket
from model.dataset import SequenceDataset
from model.inputs import Queries, UserEvents
from model.ranker import Ranker, RankerConfig, ScoreCache
from model.retriever import Retriever, RetrieverConfig
from model.trainer import Trainer
from tests.model.make import SECOND, START, catalogue, table, user

LARGEST = 2**63 - 1
NOW = START + 10**13
SMALL = {"dim": 8, "head_dim": 4, "window": 7, "epochs": 1, "init_scale": 0.3, "positions": 8, "context": "user"}
VARIANTS = ["research", "production"]
ids = st.one_of(st.integers(1, 40), st.integers(-LARGEST - 1, LARGEST))
MODELS: dict[tuple[str, str], Ranker | Retriever] = {}


def ranker(variant: str) -> Ranker:
    if ("ranker", variant) not in MODELS:
        MODELS["ranker", variant] = trained(Ranker(RankerConfig(**SMALL, variant=variant, heads="click"), catalogue()))
    model = MODELS["ranker", variant]
    assert isinstance(model, Ranker)
    return model


def retriever(variant: str) -> Retriever:
    if ("retriever", variant) not in MODELS:
        config = RetrieverConfig(**SMALL, variant=variant, positive_actions="click")
        MODELS["retriever", variant] = trained(Retriever(config, catalogue()))
    model = MODELS["retriever", variant]
    assert isinstance(model, Retriever)
    return model


def trained(model):  # type: ignore[no-untyped-def]
    Trainer(model).fit(SequenceDataset(table([user(i, 12, 9) for i in range(10)])))
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(items=st.lists(ids, min_size=1, max_size=12, unique=True), count=st.integers(0, 25), random=st.randoms())
def test_a_score_depends_on_no_other_candidate_and_on_no_cache(
    variant: str, items: list[int], count: int, random: Random
) -> None:
    model, history, cache = ranker(variant), user(1, count, 3), ScoreCache()
    together = model.score(history, np.array(items), NOW, 1)
    order = list(range(len(items)))
    random.shuffle(order)
    np.testing.assert_allclose(model.score(history, np.array(items)[order], NOW, 1), together[order], atol=1e-6)
    for some in (items[:1], items):
        cached = model.score(history, np.array(some), NOW, 1, cache=cache)
        np.testing.assert_allclose(cached, together[: len(some)], atol=1e-6)
        np.testing.assert_allclose(model.score_plain(history, np.array(some), NOW, 1), together[: len(some)], atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=10, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_prediction_depends_on_nobody_else_in_the_batch(variant: str, counts: list[int], seed: int) -> None:
    """Users of very different length are padded to each other in some kernels, and a batch may hold one user."""
    people = [user(i, n, seed) for i, n in enumerate(counts)]
    queries = [Queries.candidates(np.arange(1, 4), NOW, 1) for _ in people]
    for model in (ranker(variant), retriever(variant)):
        with torch.no_grad():
            together = model(model.build(people, queries)).view(len(people), 3, -1)
            for place, person in enumerate(people):
                alone = model(model.build([person], queries[:1]))
                torch.testing.assert_close(alone, together[place], rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(low=st.integers(0, 2**10), high=st.integers(0, 2**10))
def test_ids_up_to_the_largest_survive(variant: str, low: int, high: int) -> None:
    """Ids that a float32, a float64 or an int32 cannot tell apart are different items, users and authors."""
    model = ranker(variant)
    pairs = [(LARGEST - low, LARGEST - low - 1), (2**24 + high, 2**24 + high + 1), (2**53 + high, 2**53 + high + 1)]
    for one, other in pairs:
        scores = np.concatenate([model.score(user(i, 5), np.array([one, other]), NOW).T for i in range(8)])
        assert (scores[:, 0] != scores[:, 1]).any()  # of one history, two may meet in a float32
        seen = dataclasses.replace(user(1, 5), user_id=LARGEST, item_id=np.array([one] * 5))
        swapped = dataclasses.replace(seen, item_id=np.array([other] * 5))
        tokens = model.build([seen], None)
        assert tokens.item[tokens.targets].tolist() == [one] * 5 and set(tokens.user.tolist()) == {LARGEST}
        several = np.arange(1, 21)
        assert not np.array_equal(model.score(seen, several, NOW), model.score(swapped, several, NOW))
    best, _ = retriever(variant).retrieve(user(1, 5), NOW, k=2, allowed=np.array(pairs[0]))
    assert sorted(best.tolist()) == sorted(pairs[0])


def moved(events: UserEvents, gap: int) -> UserEvents:
    """The same events, the last one `gap` seconds before START."""
    shift = START - gap * SECOND - int(max(events.timestamp.max(), events.action_known_at.max(initial=0)))
    times = {name: getattr(events, name) + shift for name in ("timestamp", "known_at", "action_known_at")}
    return dataclasses.replace(events, **times, aux_known_at=events.aux_known_at + shift)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(-2, 2))
def test_every_path_puts_a_gap_into_the_same_time_bucket(bucket: int, offset: int) -> None:
    """Around the boundary of a bucket, training, plain scoring, M-FALCON and a cache must agree on the side."""
    gap = max(int(np.ceil(np.exp(0.301 * bucket))) + offset, 1)
    model, history = ranker("research"), moved(user(1, 6, 3), min(gap, 10**9))
    plain = model.score_plain(history, np.array([3]), START)
    np.testing.assert_allclose(model.score(history, np.array([3]), START), plain, atol=1e-6)
    np.testing.assert_allclose(model.score(history, np.array([3]), START, cache=ScoreCache()), plain, atol=1e-6)
    joined = {name: np.append(getattr(history, name), getattr(history, name)[-1:]) for name in vars(history)
              if name not in ("user_id", "new_from") and not name.startswith(("action_", "aux_"))}  # fmt: skip
    joined |= {"item_id": np.append(history.item_id, 3), "page": np.append(history.page, 0)}
    for name in ("timestamp", "known_at"):
        joined[name] = np.append(getattr(history, name), START)
    shown = UserEvents(**(vars(history) | joined | {"new_from": 6}))
    with torch.no_grad():
        learned = torch.sigmoid(model(model.tokens([shown]))).numpy()
    np.testing.assert_allclose(learned, plain, atol=1e-6)


def test_moving_the_buckets_would_be_noticed() -> None:
    """The bucket test above has power: across a boundary the score changes."""
    model, events = ranker("research"), user(1, 6, 3)
    gaps = [1000, 5000, 50_000]
    assert len(set(time_bucket(torch.tensor(gaps)).tolist())) == 3
    scores = [float(model.score(moved(events, gap), np.array([3]), START)[0, 0]) for gap in gaps]
    assert len({round(s, 7) for s in scores}) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_history_beyond_the_reach_changes_nothing_even_with_context_tokens(variant: str) -> None:
    """The server keeps only the newest events; context tokens stand before whatever is kept."""
    model, long = ranker(variant), user(2, 80, 8)
    short = long.take(np.arange(40, 80), 0)
    items = np.array([1, 2, 3])
    np.testing.assert_allclose(model.score(short, items, NOW), model.score(long, items, NOW), atol=1e-6)
    tokens = model.build([long], [Queries.candidates(items, NOW, 0)])  # nothing is cut here
    with torch.no_grad():
        whole = torch.sigmoid(model(tokens)).numpy()
    np.testing.assert_allclose(model.score(long, items, NOW), whole, atol=1e-6)
