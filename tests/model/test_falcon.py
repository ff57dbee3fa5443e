"""M-FALCON gives what one plain forward gives, whatever was kept and however it was cut."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from components.errors import BadInput
from components.schemas import action_bit
from model import falcon
from model.attention import Visibility
from model.catalogue import ItemCatalogue
from model.dataset import SequenceDataset
from model.falcon import KeyValues, Rows
from model.hstu import Hstu, HstuConfig
from model.inputs import Queries, UserEvents
from model.ranker import Ranker, RankerConfig, ScoreCache
from model.scoring import score_tokens
from model.serving_table import serving_copy
from model.trainer import Trainer
from tests.model.make import SECOND, START, catalogue, shown_alone, table, user

NOW = START + 10**13
IDS = np.arange(1, 31)


def stack(layers: int, **options: object) -> Hstu:
    torch.manual_seed(1)
    config = HstuConfig(dim=6, layers=layers, heads=2, dqk=3, dv=5, positions=9, dropout=0.0, **options)
    return Hstu(config).double().eval()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(0, 99),
    st.sampled_from([{}, {"softmax": True}, {"gate": "concat_raw", "silu_all": False, "scale_scores": True}]),
)
def test_candidates_over_kept_keys_and_values_equal_one_forward(
    history: int, count: int, microbatch: int, window: int, layers: int, seed: int, options: dict
) -> None:
    model, random = stack(layers, **options), np.random.default_rng(seed)
    total, cut = history + count, int(random.integers(0, history + 1))
    x = torch.from_numpy(random.normal(size=(total, 6)))
    time = torch.from_numpy(np.sort(random.integers(0, 10**6, total)))
    end = torch.arange(total).clamp(max=history)
    begin = (end - window).clamp(min=0)
    whole = model(x, Visibility(torch.tensor([0, total]), begin, end), time, time)
    rows = Rows(x, begin, end, time)
    kept = KeyValues.empty(model, x)
    for first, last in ((0, cut), (cut, history)):  # in two pieces: the second is new events after the kept ones
        kept = falcon.extend(model, kept, rows.part(first, last), time[first:last])
    assert len(kept) == history
    got = falcon.score_rows(model, kept, rows.part(history, total), microbatch)
    torch.testing.assert_close(got, whole[history:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("microbatch", [0, -1])
def test_candidates_are_scored_one_at_a_time_at_least(microbatch: int) -> None:
    model, none = stack(1), torch.zeros(3, dtype=torch.int64)
    rows = Rows(torch.zeros(3, 6, dtype=torch.float64), none, none, none)
    with pytest.raises(BadInput, match="microbatch must be at least 1, or None"):
        falcon.score_rows(model, KeyValues.empty(model, rows.x), rows, microbatch)


SETTINGS = [
    {},
    {"context": "user", "positions": 8},
    {"variant": "production"},
    {"variant": "production", "context": "user,page"},
    {"relative_bias": "none", "use_aux": True, "softmax": True},
]


def small(**options: object) -> Ranker:
    base = {"heads": "click,watch", "dim": 8, "head_dim": 4, "window": 7, "init_scale": 0.3, "bias_slots": "item,user"}
    model = Ranker(RankerConfig(**(base | options)), catalogue())
    data = SequenceDataset(table([user(i, 12, 9) for i in range(10)]))
    Trainer(model).fit(data, epochs=1)
    return model


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda s: ",".join(map(str, s.values())) or "default")
def ranker(request: pytest.FixtureRequest) -> Ranker:
    return small(**request.param)


def test_the_served_scores_are_those_of_the_plain_forward(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(falcon, "MICROBATCH", 7)
    for count in (0, 1, 5, 40):
        history = user(3, count, 5, items=60)
        for now in (NOW, START + 3000 * SECOND):
            plain = ranker.score_plain(history, IDS, now, 1)
            np.testing.assert_allclose(ranker.score(history, IDS, now, 1), plain, atol=1e-6)


def test_in_float64_the_served_outputs_equal_the_plain_ones(ranker: Ranker) -> None:
    tokens = ranker.build([user(3, 25, 5)], [Queries.candidates(IDS, NOW, 1)], cut=True)
    ranker.eval()
    with torch.no_grad():
        x = ranker.embed(tokens).double()
        model = Hstu(ranker.hstu.config).double().eval()
        model.load_state_dict(ranker.hstu.state_dict())
        plain = model(x, tokens.seen, tokens.query_time, tokens.key_time)[tokens.targets]
        first, seen = len(tokens) - len(IDS), tokens.seen
        rows = Rows(x, seen.begin, seen.end, tokens.query_time, seen.prefix)
        kept = falcon.extend(model, KeyValues.empty(model, x), rows.part(0, first), tokens.key_time[:first])
        got = falcon.score_rows(model, kept, rows.part(first, len(tokens)), 4)
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-12)


def known_until(events: UserEvents, count: int) -> UserEvents:
    """The first interactions, with the action events that were known when the last of them happened."""
    cut = events.take(np.arange(count), 0)
    seen = cut.action_known_at <= (cut.timestamp[-1] if count else 0)
    parts = {name: getattr(cut, name)[seen] for name in vars(cut) if name.startswith("action_")}
    return dataclasses.replace(cut, **parts)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 50))
def test_a_cache_kept_between_requests_changes_no_score(counts: list[int], seed: int) -> None:
    """Also when the history grows, shrinks, is cut by the reach of the layers, or is another user's."""
    model, events, cache = MODELS.setdefault("plain", small()), user(4, 30, seed), ScoreCache()
    for step, count in enumerate(counts):
        owner = events if step != 3 else user(5, 30, seed)
        history = known_until(owner, count)
        now = int(history.timestamp[-1]) + 1 if count else START
        expected = model.score_plain(history, IDS[:5], now)
        np.testing.assert_allclose(model.score(history, IDS[:5], now, cache=cache), expected, atol=1e-6)


@pytest.mark.parametrize("window", [4, 30])
def test_a_cache_knows_nothing_of_interactions_that_the_history_has_lost(window: int) -> None:
    """A bounded history forgets its oldest interactions though the layers still reach as far."""
    model, events = small(layers=3, window=window, normaliser=2.0), user(4, 12, 2)
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})
    for dropped in range(1, 10):
        cache, rest = ScoreCache(), events.take(np.arange(dropped, 12), 0)
        model.score(events, IDS, NOW, cache=cache)
        for now in (NOW, NOW + 600 * SECOND):  # what was made anew for the first serves the second
            expected = model.score_plain(rest, IDS, now)
            np.testing.assert_allclose(model.score(rest, IDS, now, cache=cache), expected, atol=1e-6)
        assert cache.added == 0


def test_a_cache_knows_nothing_of_lost_interactions_that_one_known_late_looks_back_on() -> None:
    """Interaction 25 stands near the end, and sees 21 to 24, of which the lost ones were seen."""
    model, cache = small(layers=3, window=4, normaliser=2.0), ScoreCache()
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})
    time = START + np.arange(40) * 600 * SECOND
    known = np.where(np.arange(40) == 25, time[-1] - SECOND, time)
    events = dataclasses.replace(shown_alone(user(4, 40, 2)), timestamp=time, known_at=known)
    rest = events.take(np.arange(20, 40), 0)
    expected = model.score_plain(rest, IDS, NOW)
    model.score(events, IDS, NOW, cache=cache)
    np.testing.assert_allclose(model.score(rest, IDS, NOW, cache=cache), expected, atol=1e-6)


MODELS: dict[str, Ranker] = {}


@pytest.mark.parametrize("context", ["", "user"])
def test_a_growing_history_is_extended_and_not_encoded_again(context: str) -> None:
    model, events, cache = small(context=context, positions=8), user(4, 30, 2), ScoreCache()
    for count in range(20, 30):
        history = known_until(events, count)
        now = int(history.timestamp[-1]) + 1
        expected = model.score_plain(history, IDS, now)
        np.testing.assert_allclose(model.score(history, IDS, now, cache=cache), expected, atol=1e-6)
        if count > 20:
            assert cache.reused >= 10 and cache.added <= 8
    model.score(history, IDS[:3], now, cache=cache)
    assert cache.added == 0, "nothing new, nothing to encode"


def test_a_cache_made_with_other_parameters_is_not_used() -> None:
    model, history, cache = small(), user(4, 12, 2), ScoreCache()
    model.score(history, IDS, NOW, cache=cache)
    for change in (
        lambda: model.tables()["item"].upsert(history.item_id[-1:], np.full((1, 8), 3.0, np.float32)),
        lambda: model.tables()["item"].apply_gradients(history.item_id[-1:], np.ones((1, 8), np.float32)),
        lambda: model.tables()["item"].erase(history.item_id[-1:]),
        lambda: model.tables()["item"].expire(2 * NOW),
        lambda: model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()}),
        lambda: model.load_state_dict({n: value + 0.1 for n, value in model.state_dict().items()}, assign=True),
        lambda: model.load_state_dict({n: value + 0.1 for n, value in model.state_dict().items()}, assign=True),
        lambda: vector_to_parameters(parameters_to_vector(model.parameters()).detach() * 1.5, model.parameters()),
    ):
        change()
        expected = model.score_plain(history, IDS, NOW)
        np.testing.assert_allclose(model.score(history, IDS, NOW, cache=cache), expected, atol=1e-6)
        assert cache.reused == 0
    model.score(history, IDS, NOW, cache=cache)
    assert cache.added == 0


def test_a_cache_made_by_another_model_is_not_used() -> None:
    one, other, cache, history = small(), small(seed=1), ScoreCache(), user(4, 12, 2)
    one.score(history, IDS, NOW, cache=cache)
    np.testing.assert_array_equal(other.score(history, IDS, NOW, cache=cache), other.score(history, IDS, NOW))
    assert cache.reused == 0 and cache.added > 0


@pytest.mark.parametrize(
    "field", ["user_id", "item_id", "page", "timestamp", "known_at", "action_mask", "action_value", "action_known_at"]
)
def test_a_cache_made_for_a_history_that_differs_in_one_thing_is_not_used(field: str) -> None:
    """What is late at the source, or corrected there, may change what was read before."""
    model, cache = small(slots="item,page,user", layers=1), ScoreCache()
    events = user(4, 12, 2)
    events.known_at = events.timestamp + 7 * SECOND
    events.action_mask[-1], events.action_value[-1] = action_bit("watch"), 9.5
    other = dataclasses.replace(events, user_id=events.user_id + (field == "user_id"))
    if field != "user_id":
        setattr(other, field, changed := getattr(events, field).copy())
        changed[-1] += {"action_mask": action_bit("click"), "action_value": 80}.get(field, SECOND)
    model.score(events, IDS, NOW, cache=cache)
    np.testing.assert_allclose(model.score(other, IDS, NOW, cache=cache), model.score_plain(other, IDS, NOW), atol=1e-6)
    assert cache.reused == 0


@pytest.mark.parametrize("change", [(3, 0, 0), (0, 3, 0), (0, 0, 90)], ids=["author", "category", "duration"])
def test_a_cache_made_with_another_catalogue_is_not_used(change: tuple[int, int, int]) -> None:
    def items(author: int, category: int, seconds: int) -> ItemCatalogue:
        ids = np.arange(1, 41)
        return ItemCatalogue(ids, ids % 7 + author, ids % 4 + category, (ids + seconds).astype(np.float32))

    model, events, cache = small(), user(4, 12, 2), ScoreCache()
    for changes in ((0, 0, 0), change):
        model.catalogue = items(*changes)
        expected = model.score_plain(events, IDS, NOW)
        np.testing.assert_allclose(model.score(events, IDS, NOW, cache=cache), expected, atol=1e-6)
        assert cache.reused == 0


def test_a_cache_made_for_another_page_is_not_used_where_the_page_is_context() -> None:
    model, history, cache = small(examples="request", context="page", positions=8), user(4, 12, 2), ScoreCache()
    for page in (1, 2):
        expected = model.score_plain(history, IDS, NOW, page)
        np.testing.assert_allclose(model.score(history, IDS, NOW, page, cache=cache), expected, atol=1e-6)
        assert cache.reused == 0


def test_what_is_scored_over_a_cache_stands_at_the_end() -> None:
    model = small()
    with pytest.raises(BadInput, match="candidates at the end"):
        score_tokens(model, model.tokens([user(1, 3)]), ScoreCache())


def test_the_tokens_of_several_users_cannot_share_a_cache() -> None:
    model = small()
    query = Queries.candidates(IDS, NOW, 0)
    with pytest.raises(BadInput, match="one user"):
        score_tokens(model, model.build([user(1, 3), user(2, 3)], [query, query]), ScoreCache())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_a_gpu_are_those_of_the_cpu() -> None:
    model, history, cache = small(), user(4, 25, 2), ScoreCache()
    expected = model.score(history, IDS, NOW, cache=cache)
    model.place(torch.device("cuda"))
    for _ in range(2):
        np.testing.assert_allclose(model.score(history, IDS, NOW, cache=cache), expected, atol=1e-5)
    np.testing.assert_allclose(model.score(history, IDS, NOW), expected, atol=1e-5)


def test_a_cache_made_before_a_serving_copy_was_fed_is_not_used() -> None:
    trained, served = small(), small()
    tables, history, cache = serving_copy(served), user(4, 12, 2), ScoreCache()
    np.testing.assert_array_equal(served.score(history, IDS, NOW, cache=cache), trained.score(history, IDS, NOW))
    ids = history.item_id
    moved = np.random.default_rng(1).normal(size=(len(ids), tables["item"].dim)).astype(np.float32)
    tables["item"].upsert(ids, moved)
    trained.tables()["item"].upsert(ids, moved)
    got = served.score(history, IDS, NOW, cache=cache)
    assert cache.reused == 0
    np.testing.assert_array_equal(got, trained.score(history, IDS, NOW))
