"""The HSTU benchmark compares like with like: both sides compute the same before they are timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from components.errors import BadInput, FreshetError
from model.experiments import bench_hstu, bench_hstu_ranking, bench_hstu_timing
from model.experiments.bench_hstu_reference import our_loss
from model.experiments.ml1m_data import read_histories
from tests.model.test_ml1m import write_log


@pytest.mark.parametrize("size", bench_hstu.SIZES)
def test_the_padded_reference_has_our_loss_and_gradients(size: str) -> None:
    bench_hstu.check_equal(size, bench_hstu.make_step(users=4))


def test_a_reference_that_computes_something_else_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_hstu, "our_loss", lambda *inputs: our_loss(*inputs) * 1.01)
    with pytest.raises(FreshetError, match="disagree"):
        bench_hstu.check_equal("base", bench_hstu.make_step(users=2))


def test_the_published_sizes_have_the_published_number_of_parameters() -> None:
    """hstu: 197,650 numbers of items, of a table that has a row for 0, and position tables of 2N - 1 and 211 rows."""
    future = 2 * (2 * 211 - 1 - 212)  # position weights of the future, in two layers: never used
    padding = 50
    counts = {size: sum(p.numel() for p in bench_hstu.make_model(size).parameters()) for size in bench_hstu.SIZES}
    assert counts["base"] + future + padding == 234_400
    assert counts["large"] + 4 * future + padding == 313_000


def test_the_step_is_of_the_shape_that_it_says() -> None:
    problem = bench_hstu.make_step()
    lengths = problem.batch.lengths
    assert len(lengths) == 128 and lengths.min() >= 20 and lengths.max() <= 200
    assert problem.drawn.shape == (int(lengths.sum()), 128) and bool(
        (problem.batch.next_time > problem.batch.time).all()
    )


def test_ranking_scores_the_same_three_ways() -> None:
    figures = bench_hstu_ranking.measure(1, items=6, candidates=40)
    assert {figure.name for figure in figures} == {"rank_vs_chunks", "rank_vs_single"}
    assert all(figure.ratio > 0 for figure in figures)


def test_a_history_has_two_tokens_per_item() -> None:
    ranker, history = bench_hstu_ranking.make_ranker(), bench_hstu_ranking.make_history(9)
    assert len(ranker.build([history], None)) == 18


def test_a_ratio_is_the_median_of_the_repetitions_ratios() -> None:
    turns = iter([9.0, 9.0, 2.0, 1.0, 30.0, 3.0, 8.0, 2.0])  # the first pair warms up

    def take() -> float:
        return next(turns)

    figure = bench_hstu_timing.paired("x", take, take, 3)
    assert (figure.ratio, figure.reference_ms, figure.ours_ms) == (4.0, 8000.0, 2000.0)


def test_the_softmaxes_are_compared_on_a_log(tmp_path: Path) -> None:
    found = bench_hstu.softmax_quality(read_histories(write_log(tmp_path)), 1, 2.0)
    assert set(found) == {"ndcg_full", "ndcg_full_same_time", "ndcg_sampled"} and all(
        0 <= value <= 1 for value in found.values()
    )


def test_the_command_prints_the_result_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = bench_hstu.make_step
    monkeypatch.setattr(bench_hstu, "make_step", lambda: whole(users=2))
    before = torch.get_num_threads()
    bench_hstu.main(["--sections=step,softmax", "--repetitions=1", "--epochs=0", f"--threads={before}"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert {
        "step_base",
        "step_large",
        "step_base_sampled",
        "full_vs_sampled",
        "full_vs_sampled_kernel",
        "medians",
    } <= set(result)
    with pytest.raises(SystemExit):
        bench_hstu.main(["--sections=stepp"])


def test_data_that_are_not_there_are_told_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_hstu, "paired", lambda *_: pytest.fail("timed"))
    with pytest.raises(BadInput, match="MovieLens-1M"):
        bench_hstu.main([f"--data={tmp_path}", "--sections=softmax"])
