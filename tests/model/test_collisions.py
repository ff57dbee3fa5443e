"""model.experiments.collisions: hashing, split, the DeepFM, both ways of training and the whole command."""

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import BadInput
from model.experiments import collisions, collisions_report, collisions_runs
from model.experiments.collisions_data import (
    Ratings,
    colliding,
    collision_rate,
    md5_modulo,
    modulus_for,
    read_ratings,
    split_by_time,
)
from model.experiments.collisions_model import DeepFM, Keep, Settings, stream, train

GENRES = ("Comedy", "Drama", "War")
SMALL = Settings(dim=4, hidden=(8,), batch=128, stream_batch=64, epochs=6)
HOUR_S = 3600


def synthetic_lines(users: int = 60, movies: int = 30, each: int = 40) -> list[str]:
    """Ratings that depend on the user alone (every second one likes everything); one rating an hour."""
    random = np.random.default_rng(7)
    owner = random.permutation(np.repeat(np.arange(users), each))
    return [
        f"{u * 1000 + 1}::{random.integers(movies) + 1}::{5 if u % 2 else 2}::{(i + 1) * HOUR_S}"
        for i, u in enumerate(owner)
    ]


def write_log(folder: Path, ratings: list[str], movies: list[str] | None = None) -> Path:
    films = [f"{i + 1}::Film: part {i} (1999)::{'|'.join(GENRES[: i % 3 + 1])}" for i in range(30)]
    (folder / "ratings.dat").write_text("\n".join(ratings) + "\n")
    (folder / "movies.dat").write_text("\n".join(movies or films) + "\n", "latin-1")
    return folder


@pytest.fixture
def log(tmp_path: Path) -> Ratings:
    return read_ratings(write_log(tmp_path, synthetic_lines()))


def ratings_at(times: list[int]) -> Ratings:
    """One rating at each time, labels by turns."""
    n = len(times)
    ids = np.arange(n, dtype=np.int64)
    labels = (ids % 2).astype(np.float32)
    return Ratings(ids, ids, np.zeros((n, 1), np.float32), np.sort(np.array(times, dtype=np.int64)), labels)


# Data


def test_ratings_come_in_time_order_with_labels_and_shares_of_genres(tmp_path: Path) -> None:
    movies = ["1::Caf\u00e9: part 1 (1999)::Comedy|War", "7::Sevens (1998)::War"]
    log = read_ratings(write_log(tmp_path, ["2::7::4::20", "9::1::3::10", "1::7::5::20", "1::8::1::30"], movies))
    assert log.user.tolist() == [9, 1, 2, 1]
    assert log.movie.tolist() == [1, 7, 7, 8]
    assert log.time.tolist() == [10_000_000, 20_000_000, 20_000_000, 30_000_000]
    assert log.label.tolist() == [0, 1, 1, 0]
    assert log.genres.tolist() == [[0.5, 0.5], [0, 1], [0, 1], [0, 0]]  # movie 8 is not in movies.dat


@pytest.mark.parametrize("line", ["1::2::6::3", "1::2::0::3", "1::2::x::3", "1::2::3"])
def test_malformed_ratings_are_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(BadInput, match=r"ratings"):
        read_ratings(write_log(tmp_path, ["1::1::5::1", line]))


def test_malformed_movies_and_absent_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"ratings\.dat"):
        read_ratings(tmp_path)
    write_log(tmp_path, ["1::1::5::1"], ["1::no genres"])
    with pytest.raises(BadInput, match="id::title::genre"):
        read_ratings(tmp_path)
    (tmp_path / "movies.dat").unlink()
    with pytest.raises(BadInput, match=r"movies\.dat"):
        read_ratings(tmp_path)


def test_the_real_log_is_read_whole(shared: Path) -> None:
    folder = shared / "data" / "ml-1m"
    log = read_ratings(folder)
    with (folder / "ratings.dat").open() as lines:
        assert len(log) == sum(1 for _ in lines)
    assert (np.diff(log.time) >= 0).all()
    np.testing.assert_allclose(log.genres.sum(1), 1, atol=1e-6)


@given(st.lists(st.integers(0, 30), min_size=40, max_size=80))
def test_a_split_by_time_keeps_every_rating_and_never_divides_a_moment(times: list[int]) -> None:
    log = ratings_at(times)
    try:
        split = split_by_time(log, 0.6, 0.2)
    except BadInput:  # a cut at the first moment, or a part of one rating
        cuts = np.sort(times)[[int(len(times) * 0.6), int(len(times) * 0.8)]]
        sizes = np.diff(np.searchsorted(np.sort(times), [-1, *cuts, 31]))
        assert sizes.min() < 2
        return
    parts = (split.train, split.validation, split.test)
    assert np.concatenate([part.user for part in parts]).tolist() == log.user.tolist()
    assert split.train.time[-1] < split.validation.time[0]
    assert split.validation.time[-1] < split.test.time[0]


# Hashing


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20), st.integers(1, 2**31 - 1), st.text(max_size=5)
)
def test_hashing_is_md5_of_the_decimal_id_modulo_m(ids: list[int], modulus: int, salt: str) -> None:
    expected = [int(hashlib.md5(f"{salt}{i}".encode()).hexdigest(), 16) % modulus for i in ids]
    assert md5_modulo(np.array(ids, dtype=np.int64), modulus, salt).tolist() == expected


def test_the_paper_table_1_is_reproduced_and_our_table_keeps_every_id() -> None:
    columns = collisions_runs.table_1()
    assert [(c.ids, c.hashed, c.rows) for c in columns.values()] == [
        (162_541, 149_970, 162_541),
        (59_047, 57_361, 59_047),
    ]


@settings(max_examples=20, deadline=None)
@given(st.integers(200, 4000), st.floats(0.02, 0.5), st.integers(0, 10**6))
def test_the_modulus_gives_the_collision_rate_asked_for(count: int, rate: float, salt: int) -> None:
    ids = np.arange(count, dtype=np.int64)
    modulus = modulus_for(ids, rate, f"{salt}:")
    assert modulus == modulus_for(ids, rate, f"{salt}:")
    reached = collision_rate(ids, md5_modulo(ids, modulus, f"{salt}:"))
    assert reached == pytest.approx(rate, abs=1.5 / count + 0.002)


def test_colliding_ids_are_those_that_share_a_hash() -> None:
    ids = np.array([5, 6, 7, 8], dtype=np.int64)
    assert colliding(ids, np.array([1, 2, 1, 3])).tolist() == [5, 7]
    assert collision_rate(ids, np.array([1, 2, 1, 3])) == 0.25


# Model and training


def test_log_odds_are_those_of_the_deepfm_equations(log: Ratings) -> None:
    model = DeepFM(SMALL, len(GENRES), seed=3)
    for start in range(0, 1280, 128):
        model.learn(log.rows(slice(start, start + 128)))
    batch = log.rows(slice(0, 9))
    user, movie = (t.lookup(ids).double() for t, ids in ((model.user, batch.user), (model.movie, batch.movie)))
    genre = torch.from_numpy(batch.genres).double() @ model.genre.lookup(np.arange(len(GENRES))).double()
    fields = [user, movie, genre]
    linear = sum(f[:, 0] for f in fields)
    pairs = sum((fields[i][:, 1:] * fields[j][:, 1:]).sum(1) for i, j in ((0, 1), (0, 2), (1, 2)))
    deep = copy.deepcopy(model.deep).double()(torch.cat([f[:, 1:] for f in fields], 1))[:, 0]
    expected = (model.bias.double() + linear + pairs + deep).detach().numpy()
    np.testing.assert_allclose(model.score(batch), expected, rtol=1e-4, atol=1e-5)


def test_a_rating_is_scored_before_its_label_or_any_later_one_is_seen(log: Ratings) -> None:
    other = replace(log, label=np.where(np.arange(len(log)) < 640, log.label, 1 - log.label))
    one, two = (stream(part, SMALL, 0, Keep()).scores for part in (log, other))
    np.testing.assert_array_equal(one[: 640 + SMALL.stream_batch], two[: 640 + SMALL.stream_batch])
    assert (one[640 + SMALL.stream_batch :] != two[640 + SMALL.stream_batch :]).any()


def test_test_scores_are_those_of_the_epoch_that_validation_chose(log: Ratings) -> None:
    eager = replace(SMALL, epochs=12, patience=2)
    split = split_by_time(log, 0.8, 0.1)
    backwards = replace(split.validation, label=1 - split.validation.label)  # so that learning makes it worse
    split = replace(split, validation=backwards)
    run = train(split, eager, seed=1)
    assert len(run.validation_auc) == run.best_epoch + 2 < eager.epochs
    again = train(split, replace(eager, epochs=run.best_epoch), seed=1)
    assert again.validation_auc == run.validation_auc[: run.best_epoch]
    np.testing.assert_array_equal(again.test_scores, run.test_scores)
    last = train(split, replace(eager, epochs=run.best_epoch + 2, patience=99), seed=1)
    assert last.validation_auc == run.validation_auc


def test_arms_of_a_seed_repeat_and_colliding_users_lose(log: Ratings) -> None:
    arms = collisions_runs.arms(log, SMALL, seed=0)
    assert collisions_runs.arms(log, SMALL, seed=0)[4] == arms[4]
    assert (arms[0].user_rows, arms[0].movie_rows, arms[0].affected) == (60, 30, 0)
    users = [arms[k].user_rows for k in (0, 1, 2, 4)]
    assert users == sorted(set(users), reverse=True)
    assert arms[4].user_rate == pytest.approx(4 * collisions_runs.USER_RATE, abs=1 / 60)
    assert arms[0].test_auc > 0.99  # the label is the user's own
    assert arms[4].affected_auc < arms[4].affected_auc_collisionless - 0.02


# Admission and expiry


def test_admission_and_expiry_save_rows(log: Ratings) -> None:
    everything, few, short, none = (
        collisions_runs.kept(log, SMALL, 0, keep)
        for keep in (
            Keep(),
            Keep(admission_threshold=30),
            Keep(ttl_us=12 * HOUR_S * 10**6),
            Keep(admission_threshold=1000),
        )
    )
    assert (everything.user_rows, everything.movie_rows, everything.peak_rows) == (60, 30, 90)
    assert 0 < few.mean_rows < everything.mean_rows
    assert few.user_rows == 60  # every user has 40 ratings
    assert short.peak_rows <= everything.peak_rows
    assert short.mean_rows < everything.mean_rows
    assert short.user_rows < 60
    assert none.peak_rows == 0
    assert none.auc < everything.auc - 0.1  # labels that depend on the user cannot be known without rows


# The whole


def test_estimates_are_mean_standard_deviation_and_standard_error() -> None:
    estimate = collisions_report.Estimate.of([1.0, 2.0, 3.0, 4.0])
    assert estimate.mean == 2.5
    assert estimate.spread == pytest.approx((5 / 3) ** 0.5)
    assert estimate.error == pytest.approx((5 / 12) ** 0.5)
    assert estimate.signed() == "+2.5000 ± 0.6455"


def test_the_command_prints_tables_and_figures_and_draws_the_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, picture = write_log(tmp_path, synthetic_lines()), tmp_path / "images" / "collisions.png"
    collisions.main(["--data", str(folder), "--seeds", "2", "--plot", str(picture)])
    out = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    for head in ("Monolith's Table 1", "Collisions", "By admission threshold", "By time to live", "149,970"):
        assert head in out
    figures = json.loads(out.splitlines()[-1].removeprefix("RESULT "))
    for multiple in (1, 2, 4):
        cost = figures["auc_collisionless"] - figures[f"auc_hashed_{multiple}x"]
        assert figures[f"gain_{multiple}x"] == pytest.approx(cost, abs=1e-12)
        assert figures[f"gain_{multiple}x"] == pytest.approx(np.mean(figures[f"gain_{multiple}x_by_seed"]), abs=1e-12)
        assert figures[f"gain_{multiple}x_se"] >= 0
    assert figures["threshold_1"]["auc"] == figures["ttl_days_0"]["auc"]
    rows = [figures[f"threshold_{n}"]["rows_mean"] for n in collisions_runs.THRESHOLDS]
    assert rows == sorted(rows, reverse=True) and rows[-1] < rows[0]


def test_a_picture_is_drawn_only_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one in docs belongs to a table that is kept by hand."""
    folder = write_log(tmp_path, synthetic_lines())
    for name in ("MULTIPLES", "THRESHOLDS", "DAYS_TO_LIVE"):
        monkeypatch.setattr(collisions_runs, name, getattr(collisions_runs, name)[:1])
    monkeypatch.setattr(collisions_report, "plot", lambda *_: pytest.fail("drawn"))
    collisions.main(["--data", str(folder), "--seeds", "2", "--plot", ""])


def test_one_user_collides_with_nobody(tmp_path: Path) -> None:
    folder = write_log(tmp_path, [f"1::{i % 30 + 1}::{i % 5 + 1}::{i}" for i in range(60)])
    with pytest.raises(BadInput, match="several users"):
        collisions.main(["--data", str(folder), "--seeds", "2"])


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least 2"):
        collisions.main(["--data", str(tmp_path), "--seeds", "1"])
