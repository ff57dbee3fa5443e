"""Events -> tokens: order, visibility in time, and one function for training and serving."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import BadInput
from components.schemas import action_bit
from model.catalogue import ItemCatalogue
from model.inputs import ACTION, AUX, IMPRESSION, REQUEST, Queries, Tokens, UserEvents, build_tokens
from tests.model.make import SECOND, START, catalogue, user

users = st.lists(st.integers(0, 12), min_size=1, max_size=4)


def build(events: list[UserEvents], window: int = 6, **options: object) -> Tokens:
    return build_tokens(events, window=window, catalogue=catalogue(), **options)  # type: ignore[arg-type]


def rows_of(tokens: Tokens, index: int) -> slice:
    return slice(int(tokens.seen.offsets[index]), int(tokens.seen.offsets[index + 1]))


@settings(max_examples=40, deadline=None)
@given(users, st.integers(0, 1000), st.integers(1, 8))
def test_a_token_sees_exactly_the_last_tokens_known_before_it_asks(counts: list[int], seed: int, window: int) -> None:
    events = [user(i, n, seed) for i, n in enumerate(counts)]
    tokens = build(events, window)
    for index in range(len(events)):
        rows = rows_of(tokens, index)
        query, key = tokens.query_time[rows].numpy(), tokens.key_time[rows].numpy()
        assert (np.diff(key) >= 0).all()
        end = (key[None, :] < query[:, None]).sum(1)  # the made-up times are whole seconds
        assert (tokens.seen.end[rows].numpy() == end).all()
        assert (tokens.seen.begin[rows].numpy() == np.maximum(end - window, 0)).all()


def test_impressions_of_one_request_do_not_see_each_other() -> None:
    events = user(1, 12, seed=3)
    tokens = build([events], 100)
    kind, end = tokens.kind.numpy(), tokens.seen.end.numpy()
    shown = np.flatnonzero(kind == IMPRESSION)
    for row in shown:
        same = shown[tokens.query_time.numpy()[shown] == tokens.query_time.numpy()[row]]
        assert (same >= end[row]).all()
    assert len(np.unique(events.request_id)) < len(events), "the made-up user has requests of several items"


def test_an_action_is_seen_only_once_it_is_known() -> None:
    events = user(2, 10, seed=1)
    tokens = build([events], 100)
    for row in range(len(tokens)):
        seen = slice(0, int(tokens.seen.end[row]))
        assert bool((tokens.key_time[seen] < tokens.query_time[row]).all())


def test_simultaneous_actions_on_one_impression_are_one_token() -> None:
    events = user(3, 12, seed=5)
    tokens = build([events])
    acted = tokens.kind == ACTION
    pairs = {(int(a), int(t)) for a, t in zip(events.action_of, events.action_known_at, strict=True)}
    assert int(acted.sum()) == len(pairs) < len(events.action_of)
    both = action_bit("watch") | action_bit("click")
    assert both in tokens.action[acted].tolist()
    assert bool((tokens.value[acted] > 0).all()), "the watch time survives a click without a value"


def test_tokens_of_one_moment_are_impressions_then_actions_then_auxiliary_values() -> None:
    events = user(3, 12, seed=5)
    moment = int(events.timestamp[-1])
    late = dataclasses.replace(
        events, known_at=np.full(12, moment), request_id=events.request_id[::-1].copy(), item_id=np.arange(1, 13),
        action_known_at=np.full_like(events.action_known_at, moment), aux_known_at=np.array([moment]),
    )  # fmt: skip
    tokens = build([late], use_aux=True)
    assert len(set(tokens.key_time.tolist())) == 1
    kinds = tokens.kind.tolist()
    assert kinds == sorted(kinds) and set(kinds) == {IMPRESSION, ACTION, AUX}
    for kind in (IMPRESSION, ACTION):
        requests = late.request_id[tokens.item[tokens.kind == kind].numpy() - 1].tolist()
        assert len(requests) > 1 and requests == sorted(requests)


@pytest.mark.parametrize(
    ("action", "value", "bucket"),
    [
        ("watch", 0, 0), ("watch", np.nan, 0), ("watch", -3, 0), ("watch", 0.5, 2), ("watch", 1, 3), ("watch", 30, 10),
        ("watch", 1e9, 31), ("watch", np.inf, 31), ("rating", np.nan, 32), ("rating", -1, 32), ("rating", 0.5, 33),
        ("rating", 4.5, 41), ("rating", 5, 42), ("rating", 1e9, 62), ("rating", np.inf, 62), ("click", 30, 0),
    ],
)  # fmt: skip
def test_the_value_of_an_action_has_a_bucket(action: str, value: float, bucket: int) -> None:
    events = user(3, 1, seed=5)
    acted = dataclasses.replace(
        events, action_of=np.zeros(1, np.int32), action_known_at=events.timestamp + SECOND,
        action_mask=np.array([action_bit(action)], np.int32), action_value=np.array([value], np.float32),
    )  # fmt: skip
    tokens = build([acted])
    assert tokens.value[tokens.kind == ACTION].tolist() == [bucket]


def test_new_are_the_interactions_and_auxiliary_values_from_new_from_on_at_their_own_times() -> None:
    events = user(10, 6, 1, new_from=3)
    events.timestamp = events.known_at = START + np.arange(6) * 600 * SECOND
    late = dataclasses.replace(
        events, known_at=events.timestamp + 30 * SECOND, aux_slot=np.zeros(3, np.int32), aux_value=np.arange(3),
        aux_known_at=events.timestamp[[2, 3, 5]],
    )  # fmt: skip
    tokens = build([late], use_aux=True)
    for kind, expected in ((IMPRESSION, [-1, -1, -1, *events.timestamp[3:]]), (AUX, [-1, *events.timestamp[[3, 5]]])):
        assert tokens.event_us[tokens.kind == kind].tolist() == expected


def test_the_order_of_action_events_in_the_row_does_not_matter() -> None:
    events = user(4, 12, seed=2)
    turned = {name: getattr(events, name)[::-1] for name in vars(events) if name.startswith("action_")}
    one, other = build([events]), build([dataclasses.replace(events, **turned)])
    assert torch.equal(one.action, other.action) and torch.equal(one.value, other.value)


def test_targets_start_at_new_from_and_carry_the_labels() -> None:
    events = user(5, 9, seed=4, new_from=4)
    tokens = build([events])
    order = np.argsort(tokens.source.numpy())
    assert tokens.source.numpy()[order].tolist() == [4, 5, 6, 7, 8]
    assert tokens.labels.numpy()[order].tolist() == events.actions[4:].tolist()
    assert bool((tokens.kind[tokens.targets] == IMPRESSION).all())
    assert not bool(tokens.action[tokens.targets].any()), "the label is no input"


@pytest.mark.parametrize("layers", [None, 1, 3])
def test_a_candidate_at_serving_equals_the_impression_in_training(layers: int | None) -> None:
    events = user(6, 30, seed=6)
    training = build([events], 5)
    row = int(training.targets[training.source == 20][0])
    query = Queries.candidates(events.item_id[20:21], int(events.timestamp[20]), int(events.page[20]))
    serving = build([events], 5, queries=[query], layers=layers)
    assert len(serving) <= len(training) + 1
    for name in ("kind", "item", "author", "category", "duration", "page", "action", "value", "query_time"):
        assert getattr(serving, name)[-1] == getattr(training, name)[row], name
    sees = slice(int(training.seen.begin[row]), int(training.seen.end[row]))
    offered = slice(int(serving.seen.begin[-1]), int(serving.seen.end[-1]))
    for name in ("kind", "item", "action", "value", "key_time"):
        assert torch.equal(getattr(serving, name)[offered], getattr(training, name)[sees]), name


def test_queries_follow_the_history_and_nobody_sees_them() -> None:
    events = [user(7, 8, 1), user(8, 0, 1), user(9, 3, 1)]
    ask = [Queries.requests(np.array([START, START + 10**12]), np.array([1, 2])) for _ in events]
    tokens = build(events, 50, queries=ask)
    assert tokens.kind[tokens.targets].tolist() == [REQUEST] * 6
    assert tokens.page[tokens.targets].tolist() == [1, 2] * 3
    for index in range(3):
        rows = rows_of(tokens, index)
        assert int(tokens.seen.end[rows].max()) <= rows.stop - rows.start - 2


def test_the_auxiliary_series_is_tokens_of_its_own_when_asked_for() -> None:
    events = user(10, 6, 1)
    with_aux = build([events], use_aux=True)
    assert int((with_aux.kind == AUX).sum()) == 1 and len(with_aux) == len(build([events])) + 1
    unknown = dataclasses.replace(events, aux_slot=np.array([5], dtype=np.int32))
    with pytest.raises(BadInput, match="auxiliary slot"):
        build([unknown], use_aux=True)


def test_users_without_events_give_no_tokens() -> None:
    assert len(build([UserEvents.empty(1), UserEvents.empty(2)])) == 0
    assert len(build([])) == 0


def test_queries_must_match_the_users() -> None:
    with pytest.raises(BadInput, match="one Queries per user"):
        build([user(1, 3)], queries=[])
    for query in (
        Queries.impressions(np.arange(2), np.full(2, START), np.zeros(1, np.int64)),
        Queries.requests(np.full(2, START), np.zeros(3, np.int64)),
    ):
        with pytest.raises(BadInput, match="as many items as times and pages"):
            build([user(1, 3)], queries=[query])


def test_candidates_that_a_cast_could_merge_are_refused() -> None:
    with pytest.raises(BadInput, match="candidates are float64"):
        Queries.candidates(np.array([1.5, 1.25]), START, 0)


def test_nothing_is_known_before_it_happened() -> None:
    events = user(11, 6, 1)
    early = dataclasses.replace(events, known_at=events.timestamp - 5 * SECOND)
    assert torch.equal(build([early]).key_time, build([events]).key_time)


def test_side_features_come_from_the_catalogue_and_unknown_items_have_none() -> None:
    ids = np.array([5, 3, 5, -9])
    known = ItemCatalogue(ids, ids + 10, ids + 20, np.array([1, 2, 30, np.nan], dtype=np.float32))
    assert known.item_id.tolist() == [-9, 3, 5]
    assert known.features(np.array([5, 4, -9])).tolist() == [[15, 25, 10], [0, 0, 0], [1, 11, 0]]
    assert ItemCatalogue.empty().features(np.array([1, 2])).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_a_token_without_an_item_has_no_side_features_though_an_item_has_the_id_0() -> None:
    zero = ItemCatalogue(np.array([0]), np.array([5]), np.array([6]), np.array([7], np.float32))
    ask = Queries.requests(np.array([START + 10**12]), np.array([1]))
    tokens = build_tokens([user(1, 3)], [ask], window=5, catalogue=zero, use_aux=True)
    for kind in (AUX, REQUEST):
        of = tokens.kind == kind
        assert bool(of.any()) and not bool((tokens.author[of] | tokens.category[of] | tokens.duration[of]).any())


@settings(max_examples=30, deadline=None)
@given(users, st.data())
def test_it_is_known_whether_all_targets_are_at_the_end(counts: list[int], data: st.DataObject) -> None:
    events = [user(i, n, 3, new_from=data.draw(st.integers(0, n))) for i, n in enumerate(counts)]
    ask = [Queries.candidates(np.arange(data.draw(st.integers(0, 3))), START, 0) for _ in events]
    asked = build(events, queries=ask).targets_at_end()
    assert asked is not None and asked.tolist() == [len(q.item_id) for q in ask]
    tokens = build(events)
    ends = tokens.targets_at_end()
    owner = torch.arange(len(events)).repeat_interleave(tokens.seen.offsets.diff())[tokens.targets]
    found = [tokens.targets[owner == i].tolist() for i in range(len(events))]
    last = [
        list(range(stop - len(rows), stop)) for rows, stop in zip(found, tokens.seen.offsets[1:].tolist(), strict=True)
    ]
    assert (ends is not None) == (found == last)
