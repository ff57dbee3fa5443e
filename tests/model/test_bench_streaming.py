"""The synthetic stream is the paper's recipe, and its command runs end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.experiments import streaming
from model.experiments.streaming_data import MOST_CATEGORIES, StreamShape, make_stream

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


def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    arguments = ["--records=200", "--items=100", "--categories=5", "--length=16", "--threads=1", f"--plot={plot}"]
    streaming.main(arguments)
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert set(result["hr"]) == set(streaming.PAPER) and result["ratio"]["Transformer"] == 1
    assert plot.stat().st_size > 1000
