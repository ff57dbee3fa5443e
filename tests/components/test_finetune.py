from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from components.errors import AlreadyExists, BadInput
from components.finetune.config import FinetuneConfig
from components.finetune.run import FinetuneResult
from components.finetune.run import run as finetune
from components.parameters.compaction import compact, retain
from components.parameters.log import MODELS
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.registry import Registry
from components.storage import LocalFiles, Storage
from tests.components.death import Killed, die
from tests.components.parameter_world import identical
from tests.components.sequence_world import HISTORY, day, write_day
from tests.components.steps import published_version
from tests.spark_jobs.log import publish_interactions


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Path:
    """A store and an MLflow database with version 1 of both models; tests work on copies."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copy(mlflow_database, folder / "mlflow.db")
    before = Path.cwd()
    os.chdir(folder)  # where MLflow without a server puts artifacts
    for model in MODELS:
        published_version({"root": f"file://{folder}/store", "tracking_uri": f"sqlite:///{folder}/mlflow.db"}, model)
    os.chdir(before)
    return folder


@pytest.fixture
def where(published: Path, tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(published / "store", tmp_path / "store")
    shutil.copy(published / "mlflow.db", tmp_path / "mlflow.db")
    return {"root": f"file://{tmp_path}/store", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}


def learn(
    where: dict[str, Any], number: int, model: Any = "ranker", users: int = 30, **settings: Any
) -> FinetuneResult:
    dataset = write_day(where["root"], number, users)
    return finetune(
        FinetuneConfig(**{"model": model, "version": 1, "threads": 1, "dataset": dataset, **settings, **where})
    )


def reader_of(where: dict[str, Any], model: Any = "ranker") -> LogReader:
    return LogReader(Storage(where["root"]), model, 1)


@pytest.mark.parametrize("model", MODELS)
def test_served_parameters_equal_the_trainers_bit_for_bit(
    where: dict[str, Any], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.parameters import bridge

    held = []
    original = bridge.export_changes

    def spy(trainer: Any, *arguments: Any) -> Any:
        held.append(bridge.export_all(trainer))
        return original(trainer, *arguments)

    monkeypatch.setattr(bridge, "export_changes", spy)
    for number in (1, 2):
        assert learn(where, number, model).n == number
    for trainer, loaded in zip(held, (1, 2), strict=True):
        replayed = reader_of(where, model).load(loaded, with_state=True)
        assert identical(replayed, trainer)


def test_a_window_is_measured_before_it_is_learned_beside_the_frozen_version(where: dict[str, Any]) -> None:
    first, second = learn(where, 1), learn(where, 2)
    for name in ("auc_click", "ne_click", "calibration_click", "auc_like"):
        assert first.metrics[name] == first.metrics[f"frozen_{name}"]  # nothing learned yet
    assert second.metrics["ne_click"] != second.metrics["frozen_ne_click"]
    assert second.metrics["impressions"] == 150
    from components.evaluate.config import EvaluateConfig
    from components.evaluate.run import run as evaluate

    for as_of, prefix in ((1, ""), (0, "frozen_")):
        config = EvaluateConfig(
            model="ranker", version=1, as_of=as_of, dataset="day-2", part="train", threads=1, **where
        )
        measured = evaluate(config).metrics
        assert {prefix + name: value for name, value in measured.items()}.items() <= second.metrics.items()


def test_continual_training_learns_new_tastes_that_the_frozen_version_does_not_know(where: dict[str, Any]) -> None:
    for number in (1, 2):
        last = learn(where, number, continual_bias_lr=1.0, continual_batch_tokens=128)
    assert last.metrics["auc_click"] > last.metrics["frozen_auc_click"] + 0.1
    assert last.metrics["ne_click"] < last.metrics["frozen_ne_click"]


def test_the_delta_names_its_window_event_times_rows_and_run(where: dict[str, Any]) -> None:
    result = learn(where, 1)
    manifest = reader_of(where).manifest(1)
    assert manifest.windows == [day(1).key] == result.windows
    assert day(1).start_us <= (result.event_time_min_us or 0) < (result.event_time_max_us or 0) < day(1).end_us
    assert manifest.learned_until_us == result.event_time_max_us and manifest.consumed_until_us == day(1).end_us
    assert manifest.rows == result.rows and 0 < result.rows["item"] <= 40
    assert manifest.metrics == result.metrics and manifest.config["heads"] == "click,long_view,like"


def test_a_consumed_window_returns_its_delta_and_learns_nothing(
    where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = learn(where, 1), learn(where, 2)
    before = Storage(where["root"]).list("parameters")
    from model.trainer import Trainer

    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert learn(where, 2) == second and learn(where, 1) == first
    assert Storage(where["root"]).list("parameters") == before
    assert Registry(where["tracking_uri"]).client.get_model_version("ranker", "1").tags["freshet.head"] == "2"


def test_a_consumed_window_is_known_after_compaction_and_retention(where: dict[str, Any]) -> None:
    first, second = learn(where, 1), learn(where, 2)
    compact(Storage(where["root"]), "ranker", 1)
    assert retain(Storage(where["root"]), "ranker", 1, keep=0)
    assert learn(where, 2) == second.model_copy(update={"since_snapshot": 0}) and learn(where, 1) == first
    assert learn(where, 3).n == 3


def test_training_goes_on_from_a_compacted_snapshot_with_the_same_bits(where: dict[str, Any], tmp_path: Path) -> None:
    learn(where, 1)
    shutil.copytree(tmp_path / "store", tmp_path / "folded")
    folded = {**where, "root": f"file://{tmp_path}/folded"}
    compact(Storage(folded["root"]), "ranker", 1)
    retain(Storage(folded["root"]), "ranker", 1, keep=0)
    learn(where, 2)
    learn(folded, 2)
    assert identical(reader_of(where).delta(2, with_state=True), reader_of(folded).delta(2, with_state=True))


def test_a_window_that_was_learned_in_part_is_refused(where: dict[str, Any]) -> None:
    learn(where, 2)
    with pytest.raises(BadInput, match=r"begins before 2022-05-05T00:00:00.000000Z, up to which ranker 1 has learned"):
        learn(where, 1)
    assert reader_of(where).head() == 1


def join_days(where: dict[str, Any], joined: list[int], with_sequences: list[int]) -> None:
    """What join and sequences leave of these days: manifests, and datasets under the names that they give."""
    storage = Storage(where["root"])
    for number in joined:
        publish_interactions(storage, day(number), [])
    for number in with_sequences:
        write_day(where["root"], number, dataset=f"window-{day(number).key}-0123456789ab")


def test_joined_windows_that_the_version_lacks_are_learned_from_first(where: dict[str, Any]) -> None:
    publish_interactions(Storage(where["root"]), HISTORY, [])
    join_days(where, joined=[1, 2, 3, 4], with_sequences=[1, 2])
    result = learn(where, 3)
    assert result.n == 3 and result.windows == [day(3).key]
    manifests = [reader_of(where).manifest(n) for n in (1, 2, 3)]
    assert [m.windows for m in manifests] == [[day(n).key] for n in (1, 2, 3)]
    assert Registry(where["tracking_uri"]).client.get_model_version("ranker", "1").tags["freshet.head"] == "3"
    assert learn(where, 3) == result and learn(where, 4).n == 4
    assert result.since_snapshot == 3, "what compaction waits for, however many windows a run learns from"


def test_windows_learned_from_late_or_in_time_give_the_same_bits(where: dict[str, Any], tmp_path: Path) -> None:
    join_days(where, joined=[1, 2], with_sequences=[1])
    shutil.copytree(tmp_path / "store", tmp_path / "in-time")
    in_time = {**where, "root": f"file://{tmp_path}/in-time"}
    for number in (1, 2):
        learn(in_time, number)
    learn(where, 2)
    assert identical(reader_of(where).load(with_state=True), reader_of(in_time).load(with_state=True))


def test_a_joined_window_without_sequences_is_not_left_out_unless_that_is_meant(where: dict[str, Any]) -> None:
    join_days(where, joined=[1, 2, 3], with_sequences=[2])
    with pytest.raises(BadInput, match=rf"has not learned from {day(1).key}, joined before .* --skip-gap"):
        learn(where, 3)
    assert reader_of(where).head() == 0
    assert learn(where, 3, skip_gap=True).n == 1


def test_killed_while_it_makes_up_for_windows_it_goes_on_where_it_was(
    where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    join_days(where, joined=[1, 2], with_sequences=[1])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die(patch, LocalFiles, "create", 2, True)  # the first is the dataset's manifest, the second delta 1
        learn(where, 2)
    assert reader_of(where).head() == 1
    assert learn(where, 2).n == 2


def test_the_history_that_the_version_was_pretrained_on_is_refused(where: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="each event is learned from once"):
        finetune(FinetuneConfig(model="ranker", version=1, dataset="history", **where))


def test_an_empty_window_is_consumed_by_a_delta_without_rows(where: dict[str, Any]) -> None:
    before = reader_of(where).load(with_state=True)
    result = learn(where, 1, users=0)
    assert result.n == 1 and set(result.rows.values()) == {0} and result.metrics == {}
    assert result.event_time_max_us is None
    after = reader_of(where).load(with_state=True)
    for name, value in before.dense.items():
        assert np.array_equal(value, after.dense[name])
    with pytest.raises(BadInput, match="begins before"):
        finetune(FinetuneConfig(model="ranker", version=1, dataset="history", **where))
    assert learn(where, 2).n == 2


def test_the_champion_learns_when_no_version_is_named(where: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="ranker has no champion yet"):
        learn(where, 1, version=None)
    Registry(where["tracking_uri"]).set_alias("ranker", "champion", 1)
    assert learn(where, 1, version=None).version == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": ""}, "no dataset given"),
        ({"dataset": "absent"}, "has no manifest"),
        ({"version": 7}, "publish first"),
    ],
)
def test_wrong_input_is_refused_with_the_remedy(where: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        learn(where, 1, **settings)


def test_the_window_has_a_run_with_parent_metrics_input_and_delta(where: dict[str, Any]) -> None:
    pretrained = reader_of(where).manifest(0).run_id
    result = learn(where, 1)
    run = MlflowClient(tracking_uri=where["tracking_uri"]).get_run(result.run_id)
    assert run.info.status == "FINISHED" and run.info.run_id != pretrained
    tags = {
        name.removeprefix("freshet."): value for name, value in run.data.tags.items() if name.startswith("freshet.")
    }
    assert tags["window"] == day(1).key and tags["delta"] == "1" and tags["parent_version"] == "1"
    assert tags["version_run"] == pretrained
    assert run.data.metrics["frozen_auc_click"] == result.metrics["frozen_auc_click"]
    assert run.data.params["continual_dense_lr"] == "0.0005" and run.data.params["dim"] == "8"
    assert run.inputs is not None and [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["day-1"]


def test_killed_anywhere_and_run_again_it_ends_with_the_same_bits(
    where: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model.trainer import Trainer

    learn(where, 1)
    shutil.copytree(tmp_path / "store", tmp_path / "before")
    whole = learn(where, 2)
    expected = {name: file.sha256 for name, file in reader_of(where).manifest(2).files.items()}

    deaths: list[tuple[type, str, int, bool]] = [(Trainer, "predict", 2, True), (Trainer, "_train_batch", 1, True)]
    deaths += [(LocalFiles, "write", 1, False), (LocalFiles, "write", 3, True)]
    deaths += [(LocalFiles, "create", 1, False), (LocalFiles, "create", 1, True)]
    for place, death in enumerate(deaths):
        root = f"file://{tmp_path}/death-{place}"
        shutil.copytree(tmp_path / "before", tmp_path / f"death-{place}")
        again = {**where, "root": root}
        dataset = write_day(root, 2)
        config = FinetuneConfig(model="ranker", version=1, threads=1, dataset=dataset, **again)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die(patch, *death)
            finetune(config)
        committed = death == (LocalFiles, "create", 1, True)
        assert reader_of(again).head() == (2 if committed else 1), death
        result = finetune(config)
        assert result.model_copy(update={"run_id": ""}) == whole.model_copy(update={"run_id": ""}), death
        assert {name: file.sha256 for name, file in reader_of(again).manifest(2).files.items()} == expected, death
        run = MlflowClient(tracking_uri=where["tracking_uri"]).get_run(result.run_id)
        assert run.info.status == "FINISHED" or committed
        assert run.data.tags["freshet.delta"] == "2"


def test_of_two_trainers_of_one_window_one_publishes_and_the_other_is_told(
    where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LogWriter.publish_delta
    raced: list[bool] = []

    def race(self: LogWriter, n: int, *arguments: Any, **keywords: Any) -> Any:
        if not raced:
            raced.append(True)
            learn(where, 1)  # another process is faster
        return original(self, n, *arguments, **keywords)

    monkeypatch.setattr(LogWriter, "publish_delta", race)
    with pytest.raises(AlreadyExists, match="delta 1 of ranker 1 is published"):
        learn(where, 1)
    assert reader_of(where).head() == 1
    assert learn(where, 1).n == 1


def test_settings_of_the_form_that_a_model_does_not_have_are_not_its_own() -> None:
    given = {"continual_table_lr": 0.2, "continual_bias_lr": 0.3}
    assert FinetuneConfig.model_validate({"model": "ranker", **given}).overrides() == given
    assert FinetuneConfig.model_validate({"model": "retriever", **given}).overrides() == {"continual_table_lr": 0.2}


def test_windows_expire_and_refuse_rows_by_the_settings_of_the_version_and_say_how_many(
    mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    where = {"root": f"file://{tmp_path}/store", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    published_version(where, "ranker", table_ttl_days="item=1", table_admission="author=60000")
    result = learn(where, 3, users=6)
    delta, time = reader_of(where).delta(1, with_state=True), day(3).start_us
    rows = delta.tables["item"]
    assert (
        len(rows.tombstones) and rows.last_update_us is not None and rows.last_update_us.min() >= time - 86_400_000_000
    )
    assert not len(delta.tables["author"].keys) and delta.tables["author"].candidate_keys is not None
    metrics = MlflowClient(tracking_uri=where["tracking_uri"]).get_run(result.run_id).data.metrics
    assert metrics["expired_item"] == len(rows.tombstones) and metrics["refused_admission_author"] > 0
    assert "expired_page" not in metrics


def test_the_log_says_how_far_each_table_is(where: dict[str, Any]) -> None:
    progress = [
        reader_of(where).load(n, with_state=True).optimizer["item/table_progress"] for n in (0, learn(where, 1).n)
    ]
    updates, clock = zip(*((int(p[0]), int(p[3])) for p in progress), strict=True)
    assert 0 < updates[0] < updates[1]
    assert clock[0] * 1_000_000 < day(1).start_us <= clock[1] * 1_000_000 <= day(1).end_us
