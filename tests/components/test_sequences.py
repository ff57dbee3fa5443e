"""The step sequences: its names, what it refuses, and that a finished data set stays. Rows: tests/spark_jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.errors import BadInput
from components.sequences.config import SequencesConfig
from components.sequences.run import SequencesResult, dataset_id, run
from components.storage import Storage
from model.ranker import RankerConfig
from model.retriever import RetrieverConfig
from tests.spark_jobs.log import HOURS, MASTER, impression, publish_interactions


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(f"file://{tmp_path}/store")
    for place, window in enumerate(HOURS[:2]):
        row = impression(place + 1, 5, 60 * place + 10)
        row |= {"known_at": row["timestamp"], "late": False, "actions": 0, "watch_s": 0.0, "events": []}
        publish_interactions(storage, window, [row])
    return storage


def build(storage: Storage, **settings: Any) -> SequencesResult:
    return run(config(root=storage.root, spark=MASTER, **settings))


def config(**settings: Any) -> SequencesConfig:
    return SequencesConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "window", "window": HOURS[2].key}, "is not joined; run python -m components.join --window="),
        ({"mode": "window", "window": "today"}, "write START-END like"),
        ({"mode": "window", "window": HOURS[0].key, "split": "2026-03-01T10:30:00Z"}, "belong to --mode=history"),
        ({"window": HOURS[0].key}, "--window belongs to --mode=window"),
        ({"mode": "window"}, "--mode=window needs a --window; the last joined one is --window="),
        ({"end": "2026-03-01T10:30:00Z"}, f"lies inside the joined window {HOURS[0].key}"),
        ({"end": "2026-03-01T09:00:00Z"}, "no joined window ends by"),
        ({"split": "2026-03-01T13:00:00Z"}, "leaves train or eval empty"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_a_remedy(
    storage: Storage, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        build(storage, **settings)
    assert storage.list("sequences") == []


def test_a_time_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="'noon' is not a time"):
        config(split="noon")


def test_one_moment_names_one_data_set_however_it_is_written() -> None:
    spellings = ("2026-03-01", "2026-03-01T00:00:00Z", "20260301T000000Z", "2026-03-01T01:00:00+01:00")
    assert len({dataset_id(config(split=text), HOURS[:1]) for text in spellings}) == 1


def test_without_any_joined_window_the_step_says_to_join_first(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"run python -m components\.join first"):
        build(Storage(f"file://{tmp_path}/empty"))


def test_training_looks_back_as_far_as_serving() -> None:
    """An interaction is a token at least, and no model by default is influenced by more than its reach."""
    assert config().context_interactions >= max(RankerConfig().reach(), RetrieverConfig().reach())


def test_the_dataset_id_depends_on_the_settings_and_windows_but_not_on_where_it_is_built() -> None:
    here, there = config(root="file:///a", spark=""), config(root="file:///b", spark="sc://server")
    assert dataset_id(here, HOURS[:1]) == dataset_id(there, HOURS[:1])
    assert dataset_id(here, HOURS[:1]) != dataset_id(here, HOURS[:2])
    longer = config(root="file:///a", context_interactions=9)
    assert dataset_id(here, HOURS[:1]) != dataset_id(longer, HOURS[:1])
    assert dataset_id(here, HOURS[:2]).startswith("history-20260301T100000Z-20260301T120000Z-")


def test_a_finished_dataset_is_returned_and_nothing_is_written(storage: Storage) -> None:
    first = build(storage, mode="window", window=HOURS[1].key)
    assert first.counts == {"train_rows": 1, "train_interactions": 1, "train_context": 1}
    assert first.windows == [HOURS[1].key]
    before = storage.list("")
    assert build(storage, mode="window", window=HOURS[1].key) == first
    assert storage.list("") == before
