"""The synthetic world: reproducible, at the promised rates, and harder for a model that stops learning."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from components.config import cli
from components.errors import BadInput
from components.schemas import ACTION_EVENTS, IMPRESSIONS
from components.world.config import WorldConfig
from components.world.feedback import draw_feedback
from components.world.history import History, simulate_history
from components.world.run import ExportConfig, labelled, run
from components.world.world import DAY_US, World
from model.metrics import auc

END = "2025-01-07T00:00:00+00:00"
SHIFT = "2025-01-06T00:00:00+00:00"
SMALL = {"world_end": END, "world_users": 60, "world_items": 100, "world_impressions": 2000}


def small(**changes: object) -> World:
    return World(WorldConfig.model_validate(SMALL | changes))


def times(table: pa.Table, name: str = "timestamp") -> np.ndarray:
    return table[name].cast(pa.int64()).to_numpy()


@pytest.fixture(scope="module")
def shifted() -> tuple[World, History, pd.DataFrame]:
    """The default world with a shift one day before its end, its history, and one labelled row per impression."""
    world = World(WorldConfig(world_end=END, world_shift_at=SHIFT, world_impressions=80_000))
    history = simulate_history(world)
    return world, history, labelled(world, history).sort_values(["time_us", "request_id", "position"])


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_the_same_settings_give_the_same_bytes_and_another_seed_gives_others(seed: int) -> None:
    first, again = (simulate_history(small(world_seed=seed, world_impressions=200)) for _ in range(2))
    other = simulate_history(small(world_seed=(seed + 1) % 2**31, world_impressions=200))
    assert first.impressions.equals(again.impressions)
    assert first.actions.equals(again.actions)
    assert first.malformed == again.malformed
    assert not first.impressions.equals(other.impressions)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), users=st.integers(1, 50), items=st.integers(20, 80), shift=st.booleans())
def test_every_probability_is_one_and_no_action_is_likelier_than_the_click(
    seed: int, users: int, items: int, shift: bool
) -> None:
    world = small(world_seed=seed, world_users=users, world_items=items, world_shift_at=SHIFT if shift else "")
    rng = np.random.default_rng(seed)
    time = rng.integers(world.start_us, world.end_us, 300)
    item = rng.choice(world.items(world.end_us).item_id, 300)
    p = world.probabilities(
        rng.choice(world.user_ids, 300), item, rng.integers(0, 6, 300), rng.integers(0, 50, 300), time
    )
    for action in ("click", "long_view", "like"):
        assert ((p[action] >= 0) & (p[action] <= 1) & (p[action] <= p["click"])).all()
    assert (p["watch"] >= 0).all() and np.isfinite(p["watch"]).all()


def test_every_shown_item_is_alive_at_its_request_and_slates_hold_ten_distinct_items() -> None:
    world = small()
    history = simulate_history(world)
    shown = history.impressions.to_pandas().drop_duplicates(["request_id", "item_id"])
    shown["time_us"] = shown.timestamp.astype("datetime64[us, UTC]").astype("int64")
    for time_us, rows in shown.groupby("time_us"):
        assert set(rows.item_id) <= set(world.alive(int(time_us)))
    assert (shown.groupby("request_id").size() == 10).all()
    assert (shown.groupby("request_id").timestamp.nunique() == 1).all()
    assert shown.request_id.between(0, 2**53 - 1).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_world_with_few_items_at_times_shows_shorter_slates(seed: int) -> None:
    world = small(world_seed=seed, world_items=20, world_lifetime_days=0.11, world_impressions=12_000)
    shown = simulate_history(world).impressions.to_pandas().drop_duplicates(["request_id", "item_id"])
    sizes = shown.groupby("request_id").size()
    assert sizes.max() <= 10 and sizes.min() > 0
    assert (shown.groupby("request_id").position.max() == sizes - 1).all()


@pytest.mark.parametrize("seed", range(40))
def test_a_history_of_one_request_has_it_within_the_history(seed: int) -> None:
    world = small(world_seed=seed, world_impressions=10)
    assert times(simulate_history(world).impressions).min() >= world.start_us


def test_the_history_has_the_schemas_of_the_event_log_and_never_comes_from_after_the_end() -> None:
    world = small()
    history = simulate_history(world)
    assert history.impressions.schema == IMPRESSIONS
    assert history.actions.schema == ACTION_EVENTS
    for events in (history.impressions, history.actions):
        assert times(events).min() >= world.start_us
        assert times(events, "received_at").max() <= world.end_us
        assert (times(events, "received_at") >= times(events)).all()


def test_base_rates_and_the_oracle_are_where_they_should_be(shifted: tuple[World, History, pd.DataFrame]) -> None:
    before = shifted[2][shifted[2].era == 0]
    assert 0.25 <= before.click.mean() <= 0.35
    assert 0.14 <= before.long_view.mean() <= 0.21
    assert 0.025 <= before.like.mean() <= 0.05
    assert 0.77 <= auc(before.click, before.p_click) <= 0.83
    for action in ("click", "long_view", "like"):
        assert before[action].mean() == pytest.approx(before[f"p_{action}"].mean(), abs=0.01)


def test_history_is_made_in_seconds(shifted: tuple[World, History, pd.DataFrame]) -> None:
    assert shifted[1].impressions.num_rows > 80_000


def test_duplicates_late_and_malformed_rows_come_at_their_rates() -> None:
    world = small(
        world_impressions=20_000, world_duplicate_share=0.1, world_late_share=0.05, world_malformed_share=0.02
    )
    history = simulate_history(world)
    keys = history.impressions.select(["request_id", "item_id"]).to_pandas()
    assert keys.duplicated().mean() * 1.1 == pytest.approx(0.1, abs=0.02)
    early = times(history.impressions) < world.end_us - 2 * DAY_US  # the end of history cuts delays short
    late = times(history.impressions, "received_at") - times(history.impressions) >= 3_600_000_000
    assert late[early].mean() == pytest.approx(0.05, abs=0.015)
    rows = history.impressions.num_rows + history.actions.num_rows
    assert len(history.malformed) / rows == pytest.approx(0.02, abs=0.005)
    assert {row["kind"] for row in history.malformed} == {"impression", "action"}


def test_a_history_can_be_free_of_duplicates_late_and_malformed_rows() -> None:
    history = simulate_history(small(world_duplicate_share=0, world_late_share=0, world_malformed_share=0))
    assert history.malformed == []
    assert not history.impressions.select(["request_id", "item_id"]).to_pandas().duplicated().any()
    assert (times(history.impressions, "received_at") - times(history.impressions)).max() <= 2_000_000


def test_actions_follow_their_click_in_time_and_watching_takes_its_time() -> None:
    history = simulate_history(small(world_impressions=10_000))
    actions = history.actions.to_pandas().drop_duplicates(["request_id", "item_id", "action"])
    wide = actions.pivot(index=["request_id", "item_id"], columns="action", values="timestamp")
    watched = actions[actions.action == "watch"].set_index(["request_id", "item_id"]).value
    both = wide.dropna(subset=["watch", "click"])
    assert len(both) > 500
    taken = (both.watch - both.click).dt.total_seconds()
    assert np.allclose(taken, watched.loc[both.index], atol=1e-4)
    assert (wide.like.dropna() > wide.click.loc[wide.like.dropna().index]).all()
    assert wide.click.loc[wide.long_view.dropna().index].notna().all()
    assert actions[actions.action != "watch"].value.isna().all()


def test_feedback_is_drawn_at_the_true_probabilities() -> None:
    world = small()
    item = np.full(4000, world.alive(world.end_us - 1)[0])
    user, zero = np.ones(4000, np.int64), np.zeros(4000, np.int64)
    time = np.full(4000, world.end_us - 1)
    truth = world.probabilities(user, item, zero, zero, time)
    drawn = draw_feedback(world, np.random.default_rng(5), user, item, zero, zero, time)
    for action in ("click", "long_view", "like"):
        rate = drawn.action.count(action) / 4000
        assert rate == pytest.approx(truth[action][0], abs=4 * np.sqrt(0.25 / 4000))


def test_items_appear_and_disappear_and_live_days_can_be_short() -> None:
    world = small(world_day_s=60.0, world_lifetime_days=4.0)
    later = world.end_us + 10 * 60_000_000
    then, now = set(world.alive(world.end_us)), set(world.alive(later))
    assert len(then - now) > 30 and len(now - then) > 30
    assert len(now) == pytest.approx(100, abs=40)
    fresh = world.catalogue(world.end_us, later)
    assert set(fresh["item_id"].to_pylist()) >= now - then
    assert times(fresh, "available_from").min() > world.end_us - 1
    assert times(fresh, "available_from").max() <= later


@settings(max_examples=30, deadline=None)
@given(offsets=st.lists(st.integers(-6 * DAY_US, 30 * 60_000_000), min_size=1, max_size=20))
def test_world_days_and_times_are_inverse_to_each_other(offsets: list[int]) -> None:
    world = small(world_day_s=60.0)
    time = world.end_us + np.array(offsets, dtype=np.int64)
    assert np.abs(world.time_of(world.day_of(time)) - time).max() <= 200


def test_catalogues_of_consecutive_intervals_hold_each_item_once() -> None:
    world = small(world_day_s=60.0)
    moments = [world.end_us + n * 7_000_000 for n in range(20)]
    parts = [world.catalogue(a, b) for a, b in itertools.pairwise(moments)]
    ids = np.concatenate([part["item_id"].to_numpy() for part in parts])
    assert len(ids) == len(set(ids)) > 0
    assert sorted(ids) == sorted(world.catalogue(moments[0], moments[-1])["item_id"].to_pylist())


def test_items_that_are_gone_or_were_never_there_are_never_clicked() -> None:
    world = small()
    items = world.items(world.end_us)
    gone = items.item_id[items.dies < 0][:1]
    ids = np.array([gone[0], 1, 2**60])
    p = world.probabilities(1, ids, 0, np.zeros(3, np.int64), world.end_us)
    assert p["click"].tolist() == [0.0, 0.0, 0.0]


def test_an_unknown_user_is_refused_with_the_ids_that_exist() -> None:
    with pytest.raises(BadInput, match="user ids of this world are 1 to 60"):
        small().probabilities(61, small().alive(small().end_us), 0, np.zeros(1, np.int64), small().end_us)


def test_a_world_without_an_end_says_what_to_give() -> None:
    with pytest.raises(BadInput, match="world_end is empty"):
        World(WorldConfig())


def test_the_past_of_a_world_does_not_depend_on_its_shift_to_come() -> None:
    plain, later = small(), small(world_shift_at="2025-01-08T00:00:00Z", world_day_s=60.0)
    assert simulate_history(plain).impressions.equals(simulate_history(later).impressions)
    assert simulate_history(plain).actions.equals(simulate_history(later).actions)


def test_the_shift_moves_fashion_by_the_configured_correlation() -> None:
    for correlation in (-1.0, -0.8, 0.0, 1.0):
        world = World(WorldConfig(world_end=END, world_shift_correlation=correlation))
        quality = world.items(world.end_us).quality
        assert np.asarray(np.corrcoef(quality.T))[0, 1] == pytest.approx(correlation, abs=0.05)
        assert quality[:, 1].std() == pytest.approx(quality[:, 0].std(), rel=0.1)
    interest = np.asarray(world.society.interest)
    assert np.array_equal(interest[0], interest[1])  # correlation 1: nothing shifts


def test_the_shift_hurts_a_frozen_model_with_fresh_histories_and_a_refit_one_recovers(
    shifted: tuple[World, History, pd.DataFrame],
) -> None:
    """Logistic regression on the item's id, category and author and on the user's recent taste for the category."""
    world, _, data = shifted
    features, label = _features(world, data), data.click.to_numpy()
    before, after = np.flatnonzero(data.era == 0), np.flatnonzero(data.era == 1)
    held_out, learned, window = before[-4000:], after[:4000], after[4000:8000]
    frozen = LogisticRegression(C=0.3, max_iter=300).fit(features[before[:-4000]], label[before[:-4000]])
    refit = LogisticRegression(C=0.3, max_iter=300).fit(features[learned], label[learned])

    def score(model: LogisticRegression, rows: np.ndarray) -> float:
        return auc(label[rows], model.decision_function(features[rows]))

    assert score(frozen, held_out) > 0.70
    assert score(frozen, window) < 0.55
    assert score(refit, window) > score(frozen, window) + 0.1
    assert score(refit, window) > 0.65


def _features(world: World, data: pd.DataFrame) -> sparse.csr_matrix:
    items = world.items(world.end_us)
    index, _ = world.find_items(data.item_id.to_numpy(), world.end_us)
    frame = data.assign(category=items.category[index])
    group = frame.groupby(["user_id", "category"]).click
    taste = (group.cumsum() - frame.click + 0.6) / (group.cumcount() + 2)  # the user's clicks before this impression
    columns = [np.log(taste / (1 - taste)).to_numpy()[:, None], pd.get_dummies(data.page).to_numpy(float)]
    hot = [items.category[index], items.author[index], pd.factorize(data.item_id)[0]]
    rows = np.arange(len(data))
    return sparse.hstack(
        [sparse.csr_matrix(np.hstack(columns))] + [sparse.csr_matrix((np.ones(len(rows)), (rows, h))) for h in hot]
    ).tocsr()


def test_export_writes_the_history_for_use_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    arguments += ["--world-malformed-share=0.05", f"--output={tmp_path}"]
    assert cli(ExportConfig, run, arguments) == 0
    description = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    lines = [json.loads(line) for line in (tmp_path / "impressions.jsonl").read_text().splitlines()]
    assert description["impressions"] == 2000
    assert len(lines) > description["impressions"] + description["impression_copies"]
    assert cli(ExportConfig, run, [*arguments, "--format=parquet"]) == 0
    table = pq.read_table(tmp_path / "impressions.parquet")
    malformed = (tmp_path / "malformed.jsonl").read_text().splitlines()
    assert table.num_rows == description["impressions"] + description["impression_copies"]
    assert len(malformed) == description["malformed_rows"]


def test_a_time_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(ExportConfig, run, ["--world-end=yesterday"]) == 2
    assert "is not a time; write it like" in capsys.readouterr().err
