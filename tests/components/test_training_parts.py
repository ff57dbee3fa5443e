"""What the training steps share: datasets, items, progress, and the bridge to the model."""

from __future__ import annotations

from datetime import timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from components import sequence_data
from components.errors import BadInput
from components.figures import learning_curve
from components.manifests import Manifest, find
from components.parameters.bridge import build_model, export_all, load_into
from components.progress import progress
from components.schemas import ITEMS
from components.storage import Storage
from components.tracking import Run
from components.training import fit
from components.windows import from_us
from model.catalogue import ItemCatalogue
from model.trainer import Step, Trainer
from tests.components.parameter_world import identical
from tests.components.sequence_world import HISTORY, SMALL, START, day, write_day, write_history


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}")


def test_only_new_interactions_count_as_learned_from(storage: Storage) -> None:
    manifest = sequence_data.require_dataset(storage, write_history(storage.root))
    train = sequence_data.read_part(storage, manifest, "train")
    seen = sequence_data.read_part(storage, manifest, "eval")
    split = START + timedelta(hours=36)
    assert len(train.new["timestamp"]) == 30 * 14  # context interactions are left out
    assert {name: len(column) for name, column in seen.new.items()} == dict.fromkeys(seen.new, 30 * 6)
    assert sorted(set(seen.new["user_id"].tolist())) == list(range(30))
    assert train.event_range and seen.event_range and train.users is not None
    assert START <= from_us(train.event_range[0]) < from_us(train.event_range[1]) < split
    assert split <= from_us(seen.event_range[0]) < from_us(seen.event_range[1]) < HISTORY.end
    assert train.users.targets() == len(train.new["timestamp"])
    with pytest.raises(BadInput, match="has no part 'test', only train, eval"):
        sequence_data.read_part(storage, manifest, "test")


def test_a_window_in_which_nothing_happened_has_no_users(storage: Storage) -> None:
    manifest = sequence_data.require_dataset(storage, write_day(storage.root, 1, users=0))
    empty = sequence_data.read_part(storage, manifest, "train")
    assert empty.users is None and empty.event_range is None and not len(empty.new["item_id"])
    none = Manifest(kind="sequences", name="none", windows=[day(1).key], files={"train": []})
    assert sequence_data.read_part(storage, none, "train").users is None


def test_items_are_available_within_their_times_and_later_rows_win(storage: Storage) -> None:
    def write(name: str, item: int, author: int, start: object, end: object) -> None:
        row = {"item_id": item, "author_id": author, "category": 1, "duration_s": 1.0}
        rows = [{**row, "available_from": start, "available_until": end}]
        storage.write_table(f"items/{name}.parquet", pa.Table.from_pylist(rows, schema=ITEMS))

    write("a", 1, 10, None, None)
    write("b", 2, 20, day(2).start, None)
    write("c", 3, 30, None, day(2).start)
    write("d", 1, 11, None, None)
    items = sequence_data.read_items(storage)
    assert items.available(day(1).start_us, day(1).end_us - 1).tolist() == [1, 3]
    assert items.available(day(2).start_us, day(2).end_us).tolist() == [1, 2]
    assert items.available(day(1).start_us, day(2).start_us).tolist() == [1, 2, 3]
    assert items.catalogue.features(np.array([1]))[0, 0] == 11
    assert find(storage, "items") is None


def test_no_items_are_known_of_an_empty_store(storage: Storage) -> None:
    assert len(sequence_data.read_items(storage).catalogue) == 0


@pytest.mark.parametrize("model", ["ranker", "retriever"])
def test_a_model_is_built_from_its_config_alone_and_takes_parameters_over_exactly(model: str) -> None:
    settings = {**SMALL, "seed": 3}
    one = Trainer(build_model(model, settings, ItemCatalogue.empty()))
    two = Trainer(build_model(model, settings, ItemCatalogue.empty()))
    assert identical(export_all(one), export_all(two))
    for slot, table in one.model.tables().items():
        table.upsert(np.array([5, -5]), np.ones((2, table.dim), np.float32) * len(slot))
    load_into(two, export_all(one))
    assert identical(export_all(one), export_all(two))


def test_parameters_of_another_config_are_refused() -> None:
    one = Trainer(build_model("ranker", {**SMALL}, ItemCatalogue.empty()))
    with pytest.raises(BadInput, match="load them with the config they were made with"):
        load_into(Trainer(build_model("ranker", {**SMALL, "slots": "item"}, ItemCatalogue.empty())), export_all(one))
    with pytest.raises(BadInput, match=r"the config does not fit this ranker \(colour: Extra inputs"):
        build_model("ranker", {"colour": "blue"}, ItemCatalogue.empty())


def test_progress_without_a_terminal_is_a_line_at_the_end_and_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("learning") as advance:
        for done in range(1, 4):
            advance(done, 3, f"loss {done}")
    assert capsys.readouterr().err.splitlines() == ["learning: 3/3 after 0 s loss 3"]


def test_the_learning_curve_shows_each_step_and_the_average() -> None:
    (axes,) = learning_curve([1.0] * 40 + [0.0] * 40, "t").axes
    raw, smooth = (np.asarray(line.get_ydata()) for line in axes.lines)
    assert len(raw) == 80 and smooth[0] == 1.0 and smooth[-1] == 0.0


def test_steps_without_a_loss_leave_no_gap_in_the_learning_curve() -> None:
    (axes,) = learning_curve([1.0] * 39 + [float("nan")] + [1.0] * 40, "t").axes
    steps, smooth = np.asarray(axes.lines[0].get_xdata()), np.asarray(axes.lines[1].get_ydata())
    assert len(steps) == 79 and 40 not in steps and (smooth == 1.0).all()


def test_the_speed_of_a_fit_counts_the_tokens_that_went_through_the_model(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = sequence_data.read_part(
        storage, sequence_data.require_dataset(storage, write_history(storage.root)), "train"
    ).users
    assert users is not None
    settings = {**SMALL, "epochs": 3, "batch_tokens": 256, "max_interactions": 14, "stochastic_alpha": 1.2}
    trainer, read = Trainer(build_model("ranker", settings, ItemCatalogue.empty())), [0]
    metrics: dict[str, float] = {}
    original = Trainer._train_batch

    def watched(self: Trainer, *arguments: Any) -> Step:
        step = original(self, *arguments)
        read[0] += step.tokens
        return step

    run = SimpleNamespace(step=lambda *_: None, metrics=metrics.update, figure=lambda *_: None)
    monkeypatch.setattr(Trainer, "_train_batch", watched)
    monkeypatch.setattr("components.training.time", SimpleNamespace(monotonic=count(0, 2).__next__))  # takes 2 s
    fit(trainer, users, cast(Run, run), "t")
    assert metrics == {"tokens_per_s": read[0] / 2} and 0 < read[0] < 3 * int(users.tokens().sum())
