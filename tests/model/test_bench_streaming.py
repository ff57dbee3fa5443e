"""The synthetic stream is the paper's recipe, and its command runs end to end."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import BadInput
from model.experiments import streaming
from model.experiments.run_configs import read_config
from model.experiments.streaming_data import (
    MOST_CATEGORIES,
    Reading,
    StreamShape,
    _repeat,
    best_hit_rates,
    make_stream,
)

SHAPE = StreamShape(items=400, categories=20, records=600, length=64)


def test_no_item_comes_before_it_is_released_and_all_come_in_the_end() -> None:
    stream = make_stream(SHAPE, 0)
    limits = np.array([SHAPE.available(record) for record in range(SHAPE.records)])
    assert (stream < limits[:, None]).all() and stream.min() >= 0
    assert limits[0] == 160 and SHAPE.available(300) == 280  # 40 % at the start, 70 % at half
    assert len(np.unique(stream)) > 390


def test_a_record_has_at_most_five_categories_and_some_have_one() -> None:
    """With an item per category, a category is what its item is."""
    stream = make_stream(StreamShape(items=20, categories=20, records=400, length=64), 3)
    kinds = np.array([len(np.unique(row)) for row in stream])
    assert kinds.max() <= MOST_CATEGORIES and 0.1 < (kinds == 1).mean() < 0.4


@pytest.mark.parametrize(("reading", "least", "most"), [("recipe", 2, 6), ("distinct", 0, 0), ("repeats", 5.5, 9)])
def test_items_repeat_by_chance_or_not_at_all_or_often(reading: Reading, least: float, most: float) -> None:
    """Items of a record that it had before, of 32 in the mean: some are met twice by chance, one in ten is a copy."""
    stream = make_stream(StreamShape(items=2000, categories=20, records=400, length=32, reading=reading), 0)
    repeats = np.mean([32 - len(np.unique(row)) for row in stream])
    assert least <= repeats <= most


def test_repeats_follow_alpha_and_copy_what_came_before() -> None:
    """Where alpha is tiny, all but the first item are copies; where it is huge, none is."""
    fresh = np.arange(200 * 8).reshape(200, 8)
    copied = _repeat(np.random.default_rng(0), fresh, np.full(200, 1e-9))
    assert (copied == fresh[:, :1]).all()
    assert (_repeat(np.random.default_rng(0), fresh, np.full(200, 1e12)) == fresh).all()


def one_category(reading: Reading) -> tuple[StreamShape, float]:
    shape = StreamShape(items=100, categories=1, records=20, length=8, test_share=0.05, reading=reading)
    return shape, best_hit_rates(make_stream(shape, 0), shape, 0, (10,))["hr@10"]


def test_the_best_possible_is_what_the_most_frequent_category_gives() -> None:
    """One category of 100 items: 10 of them in 100, or in those that are left."""
    shape, best = one_category("recipe")
    assert best == pytest.approx(10 / shape.available(19))
    shape, best = one_category("distinct")
    assert best == pytest.approx(np.mean([10 / (shape.available(19) - n) for n in range(4, 8)]))


def test_the_best_possible_puts_what_came_often_first_where_items_repeat() -> None:
    """One record, 7 7 8 9 and then 8 (behind 7, one of two with 9), 7 (one of two with 8), 5 and 4 (never had)."""
    shape = StreamShape(items=100, categories=1, records=1, length=8, test_share=1.0, reading="repeats")
    found = best_hit_rates(np.array([[7, 7, 8, 9, 8, 7, 5, 4]]), shape, 0, (1, 2, 5))
    others = shape.available(0) - 3
    assert found["hr@1"] == pytest.approx(np.mean([0, 0.5, 0, 0]))
    assert found["hr@2"] == pytest.approx(np.mean([0.5, 1, 0, 0]))
    assert found["hr@5"] == pytest.approx(np.mean([1, 1, 2 / others, 1 / (others - 1)]))


def test_a_category_without_an_item_yet_is_not_drawn() -> None:
    """An item per category, the second released half way: before that all records are of the first."""
    shape = StreamShape(items=3, categories=3, records=30, length=4)
    stream = make_stream(shape, 0)
    limits = np.array([shape.available(record) for record in range(shape.records)])
    assert (stream[limits == 1] == 0).all() and (stream[limits == 2] == 1).any()


def test_more_categories_than_items_are_refused() -> None:
    with pytest.raises(BadInput, match="5 categories need as many items"):
        StreamShape(items=4, categories=5)


def test_half_is_reached_at_the_end_of_the_first_window_whose_mean_is_half() -> None:
    """Batches of 16 records, every fourth measured: the window of the measurements 4 to 11 ends with batch 48."""
    assert streaming.half_after([0.0] * 8 + [1.0] * 8, 16) == (8 + 4) * 4 * 16
    assert streaming.half_after([0.0] * 8 + [1.0] * 8, 2) == (8 + 4) * 4 * 2
    assert streaming.half_after([0.49] * 40, 16) is None
    assert streaming.half_after([1.0] * (streaming.WINDOW - 1), 16) is None  # too short a pass to tell


def test_the_best_on_the_way_is_of_each_fourth_batch() -> None:
    shape = StreamShape(items=100, categories=1, records=200, length=8)
    found = streaming.best_on_the_way(make_stream(shape, 0), shape, 0, 16)
    assert len(found) == 3  # 180 training records: batches 0, 4 and 8
    assert found == sorted(found, reverse=True) and found[0] == pytest.approx(10 / 40, rel=0.1)


def test_what_a_record_has_had_is_known_at_each_place() -> None:
    rows = np.array([[5, 1, 2, 3, 4], [9, 8, 8, 7, 6]])
    _, histories, wanted = next(iter(streaming.batches(rows, 0, 2, 2)))
    had = streaming._had(histories, wanted.shape, 2, 10)  # at the places 2 and 3 of each record's first four items
    assert [np.flatnonzero(row).tolist() for row in had.numpy()] == [[1, 2, 5], [1, 2, 3, 5], [8, 9], [7, 8, 9]]


def test_what_came_often_comes_more_often() -> None:
    """The recipe is exchangeable and reinforced: early shares predict late ones beyond the common prior."""
    stream = make_stream(StreamShape(items=20, categories=20, records=2000, length=128), 0)
    early = np.stack([np.bincount(row[:64], minlength=20) for row in stream])
    late = np.stack([np.bincount(row[64:], minlength=20) for row in stream])
    used = early.sum(0) > 0
    assert used.any()
    correlation = np.corrcoef(early[:, used].ravel(), late[:, used].ravel())[0, 1]
    assert correlation > 0.8


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999))
def test_a_stream_is_a_function_of_its_seed(seed: int) -> None:
    shape = StreamShape(items=40, categories=4, records=20, length=10)
    assert (make_stream(shape, seed) == make_stream(shape, seed)).all()
    assert (make_stream(shape, seed) != make_stream(shape, seed + 1)).any()


@pytest.mark.parametrize("more", [[], ["--reading=distinct"], ["--reading=repeats"]])
def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    plot = tmp_path / "plot.png"
    arguments = [
        "--records=200",
        "--items=100",
        "--categories=5",
        "--length=16",
        "--threads=1",
        "--seeds=2",
        f"--plot={plot}",
    ]
    streaming.main(arguments + more)
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    ratios = result["ratios"]["200"]
    assert set(ratios) == set(streaming.PAPER) and ratios["Transformer"] == 1
    assert [run["seed"] for run in result["runs"]] == [0] * 3 + [1] * 3
    assert all(0 <= run["hr@10"] <= run["hr@50"] <= 1 for run in result["runs"])
    assert plot.stat().st_size > 1000


def test_each_stream_has_a_table_and_its_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--items=60", "--categories=5", "--length=8", "--threads=1", "--seeds=1", "--only=transformer,hstu"]
    streaming.main([*small, "--records=120,40"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1].removeprefix("RESULT "))
    assert printed.index("120 records:") < printed.index("40 records:\n") and printed.count("Best possible") == 2
    assert list(result["ratios"]) == ["120", "40"]
    assert [(run["records"], run["model"]) for run in result["runs"]] == [
        (records, title) for records in (120, 40) for title in ("Transformer", "HSTU")
    ]


@pytest.mark.parametrize("text", ["3k", "10000,", "0", "-5"])
def test_a_length_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write 10000,3000"):
        streaming.lengths(text)


def test_the_models_of_the_command_are_the_papers_three_and_differ_in_their_attention_alone() -> None:
    entries = {name: read_config(streaming.CONFIGS / f"{name}.toml", streaming.Entry) for name in streaming.ORDER}
    assert [entry.title for entry in entries.values()] == list(streaming.PAPER)
    networks = {name: entry.run.network(SHAPE, 3) for name, entry in entries.items()}
    assert networks["hstu"].model_copy(update={"softmax": True}) == networks["hstu-softmax"]
    shared = {"items": 400, "max_length": 64, "normaliser": 64.0, "seed": 3, "dim": 64, "layers": 2, "heads": 2}
    for name, network in networks.items():
        assert network.model_dump().items() >= (shared | {"dropout": 0.0, "input_dropout": 0.0}).items(), name
        assert (entries[name].run.batch_records, entries[name].run.lr) == (16, 1e-3)


def test_a_model_of_ones_own_stands_beside_the_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = (
        (streaming.CONFIGS / "hstu.toml")
        .read_text()
        .replace('"HSTU"', '"Mine"')
        .replace("batch_records = 16", "batch_records = 8")
    )
    (tmp_path / "mine.toml").write_text(own)
    small = ["--records=100", "--items=50", "--categories=5", "--length=8", "--threads=1", "--seeds=1"]
    streaming.main([*small, f"--configs={tmp_path}", "--only=mine"])
    printed = capsys.readouterr().out
    assert "| Mine |" in printed and "| 1.00 | never |  |  |  |" in printed
    assert json.loads(printed.splitlines()[-1].removeprefix("RESULT "))["ratios"] == {"100": {"Mine": 1}}
    with pytest.raises(BadInput, match="known are mine"):
        streaming.main([*small, f"--configs={tmp_path}", "--only=yours"])
