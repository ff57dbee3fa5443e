"""The retriever: what it returns, and the losses it is trained with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.errors import BadInput
from model.dataset import SequenceDataset
from model.inputs import ACTION, AUX, IMPRESSION, REQUEST
from model.retriever import Retriever, RetrieverConfig, first_k
from model.table import Events
from model.trainer import Trainer
from tests.model.make import START, catalogue, table, user

SMALL = {"dim": 8, "head_dim": 4, "window": 9, "positive_actions": "click", "init_scale": 0.3, "epochs": 2}
NOW = START + 10**13


def make(**settings: object) -> Retriever:
    return Retriever(RetrieverConfig(**(SMALL | settings)), catalogue())


@pytest.fixture(scope="module")
def trained() -> Retriever:
    model = make()
    Trainer(model).fit(SequenceDataset(table([user(i, 12, 9) for i in range(30)])))
    return model


def test_the_best_items_come_first_and_are_allowed_and_not_excluded(trained: Retriever) -> None:
    history = user(1, 15, 2)
    ids, scores = trained.retrieve(history, NOW, 1, k=40)
    assert sorted(ids.tolist()) == list(range(1, 41)) and (np.diff(scores) <= 0).all()
    allowed, exclude = np.arange(5, 30), ids[:3]
    some, some_scores = trained.retrieve(history, NOW, 1, k=6, allowed=allowed, exclude=exclude)
    expected = [i for i in ids if 5 <= i < 30 and i not in exclude][:6]
    assert some.tolist() == expected and some.dtype == np.int64 and some_scores.dtype == np.float32
    assert set(np.round(some_scores, 5)) <= set(np.round(scores, 5))


def test_an_item_that_is_allowed_twice_comes_once(trained: Retriever) -> None:
    once = trained.retrieve(user(1, 5), NOW, allowed=np.array([3, 8, 9]))
    for ids in ([9, 3, 8, 3], [3, 3, 8, 9]):
        twice = trained.retrieve(user(1, 5), NOW, allowed=np.array(ids))
        assert [part.tolist() for part in once] == [part.tolist() for part in twice]


@given(st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 2.0, np.nan])), st.integers(1, 9))
def test_the_first_k_are_those_of_a_stable_sort(values: list[float], k: int) -> None:
    array = np.array(values, np.float32)
    assert first_k(array, k).tolist() == np.argsort(array, kind="stable")[:k].tolist()


def test_nothing_allowed_gives_nothing(trained: Retriever) -> None:
    ids, scores = trained.retrieve(user(1, 5), NOW, allowed=np.array([3]), exclude=np.array([3]))
    assert len(ids) == len(scores) == 0
    with pytest.raises(BadInput, match="at least 1"):
        trained.retrieve(user(1, 5), NOW, k=0)


def test_the_user_vector_at_serving_is_that_of_training(trained: Retriever) -> None:
    events = user(5, 25, 3)
    trained.eval()
    with torch.no_grad():
        tokens = trained.tokens([events, user(6, 60, 3)])
        vectors = trained(tokens)
    wanted = np.flatnonzero((events.actions & trained.positive) > 0)
    assert tokens.labels[: len(wanted)].tolist() == events.item_id[wanted].tolist()
    for row, place in enumerate(wanted):
        served = trained.user_vector(events, int(events.timestamp[place]), int(events.page[place]))
        assert torch.allclose(served, vectors[row], atol=1e-6)
        assert float(served.norm()) == pytest.approx(1.0, abs=1e-5)


def test_sampled_softmax_over_all_items_is_the_full_softmax() -> None:
    users = [user(i, 12, 4) for i in range(6)]
    full, sampled = make(dropout=0, input_dropout=0), make(dropout=0, input_dropout=0, full_softmax_limit=1)
    one, count = full.loss(full.tokens(users))
    other, _ = sampled.loss(sampled.tokens(users))
    assert count > 10 and one.item() == pytest.approx(other.item(), rel=1e-5)


def test_a_catalogue_as_large_as_the_limit_has_the_full_softmax() -> None:
    users, limit = [user(i, 12, 4) for i in range(6)], len(catalogue())
    losses = [
        model.loss(model.tokens(users))[0].item()
        for model in (
            make(dropout=0, input_dropout=0, full_softmax_limit=at_most, negatives=5)
            for at_most in (limit + 1, limit, limit - 1)
        )
    ]
    assert losses[0] == losses[1] != losses[2]


def test_sampled_softmax_estimates_the_full_one() -> None:
    full, sampled = (make(dropout=0, input_dropout=0, full_softmax_limit=n, negatives=25) for n in (10**6, 1))
    ratios, uncorrected = [], []
    with torch.no_grad():
        for seed in range(60):
            users = [user(i, 12, seed) for i in range(6)]
            tokens = full.tokens(users)
            positive = full(tokens) * full.item_vectors(tokens.labels.numpy())
            logit = float(positive.sum(1).mean()) / full.config.temperature
            totals = [float(m.loss(tokens)[0]) + logit for m in (full, sampled)]  # mean log of the denominator
            ratios.append(totals[1] - totals[0])
            uncorrected.append(totals[1] + np.log(25 / 40) - totals[0])
    # the log of an unbiased estimate is low by about half its variance
    assert -0.3 < np.mean(ratios) < 0.05
    assert np.mean(uncorrected) < -0.45, "without the correction it would be off by log(40 / 25)"


def test_a_positive_outside_the_catalogue_is_still_learned() -> None:
    model = make()
    model.set_items(np.array([1, 2, 3]))
    loss, count = model.loss(model.tokens([user(1, 12, 4)]))
    assert count > 0 and bool(torch.isfinite(loss))


def test_a_positive_outside_the_catalogue_has_a_rank_among_its_items_in_evaluation() -> None:
    model = make()
    model.set_items(np.array([1, 2, 3]))
    model.eval()
    with torch.no_grad():
        tokens = model.tokens([user(1, 12, 4)])
        ranks = model.evaluate_batch(tokens)["rank"]
        vectors, wanted = model(tokens), np.unique(tokens.labels.numpy())
        items = np.union1d(wanted, [1, 2, 3])
        scores = vectors @ model.item_vectors(items).T
    assert not np.isin(wanted, [1, 2, 3]).all()
    own = scores[torch.arange(len(ranks)), torch.from_numpy(np.searchsorted(items, tokens.labels.numpy()))]
    assert ranks.tolist() == (scores >= own[:, None]).sum(1).tolist()


def test_items_have_a_direction_though_rows_are_to_start_at_zero() -> None:
    vectors = make(init_scale=0.0).item_vectors(np.array([1, 2]))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert not torch.allclose(vectors[0], vectors[1])


def test_users_without_a_positive_cost_nothing() -> None:
    model = make(positive_actions="follow")
    loss, count = model.loss(model.tokens([user(1, 12, 4)]))
    assert count == 0 and loss.item() == 0.0
    loss.backward()


def test_a_diverged_retriever_finds_nothing() -> None:
    trainer = Trainer(make())
    with torch.no_grad():
        trainer.parameters["head.bias"][0] = float("nan")
    metrics = trainer.evaluate(SequenceDataset(table([user(i, 12, 4) for i in range(6)])))
    assert metrics["requests"] > 10 and metrics["hr_10"] == metrics["ndcg_10"] == 0


def test_equal_scores_are_ordered_by_id() -> None:
    model = make(item_side=False)
    rows = torch.ones(40, 8)
    model.tables()["item_output"].upsert(np.arange(1, 41), rows.numpy())
    ids, _ = model.retrieve(user(1, 5), NOW, k=10)
    assert ids.tolist() == list(range(1, 11))


@pytest.mark.parametrize("variant", ["research", "production"])
def test_only_positives_are_targets_and_what_is_no_item_never_is(variant: str) -> None:
    model = make(variant=variant, use_aux=True)
    people = [user(i, 20, 4, new_from=5) for i in range(4)]
    rows = model.examples(SequenceDataset(table(people)))
    tokens = model.tokens(rows.users(range(len(rows))))
    clicked = [u.item_id[5:][(u.actions[5:] & model.positive) > 0] for u in people]
    assert sorted(tokens.labels.tolist()) == sorted(np.concatenate(clicked).tolist())
    assert bool((tokens.kind[tokens.targets] == REQUEST).all()) and bool((tokens.item[tokens.targets] == 0).all())
    assert {AUX, ACTION, IMPRESSION, REQUEST} <= set(tokens.kind.tolist())
    assert 0 not in model.items, "a token without an item has id 0; the softmax runs over items alone"


def test_unshown_moments_do_not_move_the_loss() -> None:
    """A negative impression after the last positive changes the catalogue's loss in no way."""
    model = make(dropout=0, input_dropout=0)
    events = user(1, 20, 4)
    last = int(np.flatnonzero((events.actions & model.positive) > 0)[-1]) + 1
    assert last < 20
    loss, count = model.loss(model.tokens([events]))
    shorter, same = model.loss(model.tokens([events.take(np.arange(last), 0)]))
    assert count == same and loss.item() == pytest.approx(shorter.item(), abs=1e-5)


def test_each_step_draws_other_negatives_and_the_same_ones_when_it_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(full_softmax_limit=1, negatives=5)
    drawn: list[tuple[int, ...]] = []
    item_vectors = model.item_vectors

    def noted(ids: np.ndarray, events: Events | None = None) -> torch.Tensor:
        if events is None:
            drawn.append(tuple(ids.tolist()))
        return item_vectors(ids, events)

    monkeypatch.setattr(model, "item_vectors", noted)
    data = SequenceDataset(table([user(i, 8, 1) for i in range(3)]))  # one batch: the same in every epoch
    for _ in range(2):
        trainer = Trainer(model)
        trainer.fit(data, epochs=6)
    assert len(set(drawn[:6])) == 6 and drawn[:6] == drawn[6:]
