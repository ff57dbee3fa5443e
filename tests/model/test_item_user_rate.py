"""The baseline by hand, and its published figures on KuaiRand-Pure."""

from __future__ import annotations

import numpy as np
import pytest

from components.errors import BadInput
from model.baselines.item_user_rate import ItemUserRate
from model.experiments.kuairand import DAY_US, FIRST_WINDOW, WINDOWS, baseline
from model.experiments.kuairand_data import Log, day_us, read_log
from tests.model.golden import SHARED


def columns(item: list[int], user: list[int]) -> dict[str, np.ndarray]:
    return {"item": np.array(item), "user": np.array(user), "page": np.zeros(len(item), dtype=np.int64)}


def test_the_prediction_is_the_sum_of_smoothed_log_odds() -> None:
    model = ItemUserRate(smoothing={"item": 2.0, "user": 1.0})
    model.update(columns([1, 1, 2, 2], [7, 8, 7, 8]), np.array([True, True, False, True]))
    item, user = (2 + 2 * 0.75) / 4, (1 + 0.75) / 3

    def logit(p: float) -> float:
        return float(np.log(p / (1 - p)))

    expected = 1 / (1 + np.exp(-(logit(item) + logit(user) - logit(0.75))))
    assert model.predict(columns([1], [7]))[0] == pytest.approx(expected)


def test_unknown_items_and_users_get_the_mean_and_updates_add_up() -> None:
    data = columns([1, 2, 1, 3], [1, 1, 2, 2])
    labels = np.array([True, False, True, False])
    whole, parts = ItemUserRate(with_page=True), ItemUserRate(with_page=True)
    whole.update(data, labels)
    for half in (slice(0, 2), slice(2, 4)):
        parts.update({name: column[half] for name, column in data.items()}, labels[half])
    assert np.array_equal(whole.predict(data), parts.predict(data))
    unknown = {"item": np.array([99]), "user": np.array([-4]), "page": np.array([5])}
    assert whole.predict(unknown)[0] == pytest.approx(0.5)


def test_a_baseline_without_data_says_so() -> None:
    with pytest.raises(BadInput, match="both outcomes"):
        ItemUserRate().predict(columns([1], [1]))


@pytest.fixture(scope="module")
def log() -> Log:
    folder = SHARED / "data" / "KuaiRand-Pure" / "data"
    if not folder.exists():
        pytest.skip(f"KuaiRand-Pure is not here: {folder}")
    return read_log(folder)


@pytest.mark.parametrize(
    "daily,page,click_auc,click_ne,long_view_auc",
    [
        (False, False, 0.691, 0.916, 0.691),
        (True, False, 0.707, 0.902, 0.706),
        (False, True, 0.716, 0.892, 0.713),
        (True, True, 0.728, 0.882, 0.724),
    ],
)
def test_the_published_figures_come_out(
    log: Log, daily: bool, page: bool, click_auc: float, click_ne: float, long_view_auc: float
) -> None:
    first = day_us(FIRST_WINDOW, 8)  # the file's own days are those of UTC+8
    row = baseline(log, [first + i * DAY_US for i in range(WINDOWS)], daily=daily, with_page=page)
    assert row["auc_click"] == pytest.approx(click_auc, abs=1e-3)
    assert row["ne_click"] == pytest.approx(click_ne, abs=1e-3)
    assert row["auc_long_view"] == pytest.approx(long_view_auc, abs=1e-3)
