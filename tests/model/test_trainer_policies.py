"""Admission and expiry in training: counted are events, each once, at its own time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from components.schemas import action_bit
from model.dataset import SequenceDataset
from model.inputs import IMPRESSION, UserEvents
from model.ranker import Ranker, RankerConfig
from model.retriever import Retriever, RetrieverConfig
from model.table import EmbeddingTable
from model.trainer import Trainer
from tests.model.make import SECOND, START, catalogue, table, user

DAY = 86_400_000_000
SMALL: dict[str, Any] = {"dim": 8, "head_dim": 4, "window": 16, "batch_tokens": 200, "continual_batch_tokens": 100}


def ranker(**settings: Any) -> Ranker:
    return Ranker(RankerConfig(heads="click", **(SMALL | settings)), catalogue())


def retriever(**settings: Any) -> Retriever:
    return Retriever(RetrieverConfig(positive_actions="click,watch", **(SMALL | settings)), catalogue())


def later(u: UserEvents, days: int) -> UserEvents:
    times = {
        name: getattr(u, name) + days * DAY for name in ("timestamp", "known_at", "action_known_at", "aux_known_at")
    }
    return dataclasses.replace(u, **times)


def newest(users: list[UserEvents]) -> dict[int, int]:
    """User -> day of the last impression."""
    return {u.user_id: int(u.timestamp.max() - START) // DAY for u in users}


def days_of(slot: EmbeddingTable) -> dict[int, int]:
    rows = slot.export_all()
    assert rows.last_update_us is not None
    return dict(zip(rows.keys.tolist(), ((rows.last_update_us - START) // DAY).tolist(), strict=True))


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_pretrained_row_is_as_old_as_the_last_event_of_its_id(epochs: int) -> None:
    users = [later(user(i, 6, 1), 10 * (i % 50)) for i in range(50)]
    features = {"slots": "item,user", "bias_slots": "user", "context": "user", "positions": 9}
    trainer = Trainer(ranker(epochs=epochs, **features))
    trainer.fit(SequenceDataset(table(users)))
    for slot in ("user", "user_bias", "context_user"):
        assert days_of(trainer.model.tables()[slot]) == newest(users)


def test_after_training_only_rows_within_their_time_to_live_are_left() -> None:
    users = [later(user(i, 6, 1), 10 * (i % 50)) for i in range(50)]
    trainer = Trainer(ranker(epochs=2, bias_slots="user", table_ttl_days="user=35"))
    trainer.fit(SequenceDataset(table(users)))
    ages = {u: max(newest(users).values()) - day for u, day in newest(users).items()}
    left = {u for u, age in ages.items() if age <= 35}
    assert set(days_of(trainer.model.tables()["user_bias"])) == left and 0 < len(left) < 10


@pytest.mark.parametrize("epochs", [1, 5])
def test_an_event_counts_once_whatever_the_number_of_epochs(epochs: int) -> None:
    trainer = Trainer(ranker(epochs=epochs, bias_slots="user", table_admission="user=11"))
    trainer.fit(SequenceDataset(table([user(i, 10 if i % 2 else 12, 1) for i in range(40)])))
    rows = trainer.model.tables()["user_bias"].export_all()
    assert rows.keys.tolist() == list(range(0, 40, 2)) and len(rows.candidate_keys) == 20


@pytest.mark.parametrize(
    "settings",
    [
        {"max_interactions": 12},
        {"max_interactions": 200, "stochastic_alpha": 1.2},
        {"variant": "production", "max_interactions": 12},
        {"variant": "production", "max_interactions": 12, "stochastic_alpha": 1.2},
        {"variant": "production", "generative_sampling": True, "epochs": 30},
    ],
    ids=lambda s: ",".join(map(str, s.values())),
)
def test_an_event_counts_once_where_each_epoch_may_draw_but_reads_it_again(settings: dict[str, Any]) -> None:
    counts = {u: 1 + u % 12 for u in range(24)}
    trainer = Trainer(ranker(**({"epochs": 3, "bias_slots": "user", "table_admission": "user=11"} | settings)))
    trainer.fit(SequenceDataset(table([user(i, count, 1) for i, count in counts.items()])))
    admitted = trainer.model.tables()["user_bias"].export_all().keys.tolist()
    assert sorted(admitted) == [u for u, count in counts.items() if count >= 11]


@pytest.mark.parametrize("variant", ["research", "production"])
def test_an_event_counts_once_though_later_windows_see_it_in_their_histories(variant: str) -> None:
    trainer = Trainer(ranker(variant=variant, slots="item,user", bias_slots="user,item"))
    whole = [user(i, 12, 1) for i in range(10)]
    for start, stop in ((0, 4), (4, 8), (8, 12)):  # as windows: split between requests
        parts = [split(u, start, stop) for u in whole]
        trainer.fit(SequenceDataset(table([part for part in parts if part is not None])), continual=True)
    rows = trainer.model.tables()["item_bias"].export_all()
    shown = np.concatenate([u.item_id for u in whole])
    ids, times = np.unique(shown, return_counts=True)
    assert rows.counts is not None
    assert dict(zip(rows.keys.tolist(), rows.counts.tolist(), strict=True)) == dict(
        zip(ids.tolist(), times.tolist(), strict=True)
    )


def test_an_action_counts_with_its_impression_though_it_became_known_in_the_time_of_a_later_window() -> None:
    """The join waits for a window's actions, so the window's sequences have had them."""
    trainer = Trainer(ranker(slots="item"))
    whole = [user(i, 12, 1) for i in range(10)]
    for start, stop in ((0, 4), (4, 8), (8, 12)):
        parts = [split(u, start, stop) for u in whole]
        trainer.fit(SequenceDataset(table([part for part in parts if part is not None])), continual=True)
    expected = np.concatenate([u.item_id for u in whole])
    for u in whole:  # simultaneous actions on an impression are one event
        expected = np.append(
            expected, [u.item_id[of] for of, _ in set(zip(u.action_of, u.action_known_at, strict=True))]
        )
    rows = trainer.model.tables()["item"].export_all()
    assert rows.counts is not None
    assert [rows.keys.tolist(), rows.counts.tolist()] == [c.tolist() for c in np.unique(expected, return_counts=True)]


@pytest.mark.parametrize("late", [0, 900], ids=["known at once", "known after the next request"])
def test_to_a_request_new_is_what_no_example_before_has_seen(late: int) -> None:
    """Each impression counts in the first request with a positive that sees it, in whichever window that is."""
    model = retriever(variant="production", window=64)
    whole = [
        dataclasses.replace(u, item_id=1000 * u.user_id + np.arange(20), known_at=u.timestamp + late * SECOND)
        for u in (user(i, 20, 1) for i in range(1, 20))
    ]
    found: list[int] = []
    for start, stop in ((0, 5), (5, 12), (12, 20)):
        parts = [part for u in whole if (part := split(u, start, stop)) is not None]
        rows = model.examples(SequenceDataset(table(parts)))
        tokens = model.tokens(rows.users(range(len(rows))))
        found += tokens.item[(tokens.kind == IMPRESSION) & (tokens.event_us >= 0)].tolist()
    expected = []
    for u in whole:
        asked = u.timestamp[(u.actions & model.positive) > 0].max(initial=0)
        expected += u.item_id[u.known_at < asked].tolist()
    assert sorted(found) == expected and len(expected) > 150


def split(u: UserEvents, start: int, stop: int) -> UserEvents | None:
    """The window of requests that begin within [start, stop), with the history before it."""
    first = np.searchsorted(u.timestamp, u.timestamp[min(start, len(u) - 1)]) if start else 0
    last = np.searchsorted(u.timestamp, u.timestamp[stop]) if stop < len(u) else len(u)
    return u.take(np.arange(last), int(first)) if first < last else None


@pytest.mark.parametrize("limit", [50_000, 10], ids=["full softmax", "sampled softmax"])
def test_the_catalogue_admits_no_item_that_nobody_acted_on(limit: int) -> None:
    users = [user(i, 2, 1) for i in range(3)]
    trainer = Trainer(
        retriever(epochs=4, table_admission="item=1", table_ttl_days="item=400", full_softmax_limit=limit)
    )
    trainer.fit(SequenceDataset(table(users)))
    positive = {int(i) for u in users for i in u.item_id[u.actions > 0]}
    assert set(days_of(trainer.model.tables()["item_output"])) == positive and len(positive) < 6


def test_an_item_expires_though_the_softmax_reads_it_in_every_step() -> None:
    trainer = Trainer(retriever(epochs=1, table_ttl_days="item=30"))
    early, late = ([later(user(i, 3, seed), days) for i in range(4)] for seed, days in ((1, 0), (2, 200)))
    for users in (early, late):
        trainer.fit(SequenceDataset(table(users)))
    positive = {int(i) for u in late for i in u.item_id[u.actions & action_bit("watch") > 0]}
    assert set(days_of(trainer.model.tables()["item_output"])) == positive
