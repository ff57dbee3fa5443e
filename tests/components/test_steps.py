"""evaluate, register, publish and compact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from components.compact.config import CompactConfig
from components.compact.run import run as compact
from components.errors import BadInput, CorruptLog
from components.evaluate.config import EvaluateConfig
from components.evaluate.run import EvaluateResult
from components.evaluate.run import run as evaluate
from components.parameters.checkpoint import find_checkpoint, load_checkpoint
from components.parameters.reader import LogReader
from components.pretrain.run import PretrainResult
from components.publish.config import PublishConfig
from components.publish.run import run as publish
from components.register.config import RegisterConfig
from components.register.run import run as register
from components.registry import Registry
from components.rollout.observe import measured_beside, offline_metrics
from components.rollout.state import Release
from components.storage import Storage
from tests.components.parameter_world import identical, small_log
from tests.components.steps import published_version


@pytest.fixture
def where(tmp_path: Path, tracking_uri: str) -> dict[str, Any]:
    return {"root": f"file://{tmp_path}/store", "tracking_uri": tracking_uri}


@pytest.fixture
def made(where: dict[str, Any]) -> PretrainResult:
    return published_version(where, learn_eval=False)[0]


def measure(where: dict[str, Any], **settings: Any) -> EvaluateResult:
    return evaluate(EvaluateConfig(**{"model": "ranker", "dataset": "history", "threads": 1, **settings, **where}))


def test_a_published_version_is_its_checkpoint_with_the_metrics_of_the_gate(
    where: dict[str, Any], made: PretrainResult
) -> None:
    storage, reader = Storage(where["root"]), LogReader(Storage(where["root"]), "ranker", 1)
    checkpoint = find_checkpoint(storage, made.checkpoint)
    assert checkpoint is not None
    assert identical(reader.load(with_state=True), load_checkpoint(storage, checkpoint))
    manifest = reader.manifest(0)
    assert manifest.metrics == made.metrics and manifest.run_id == made.run_id
    assert manifest.learned_until_us == checkpoint.event_time_max_us and manifest.config == checkpoint.config
    before = storage.list("parameters")
    assert publish(PublishConfig(model="ranker", version=1, **where)).metrics == made.metrics
    assert storage.list("parameters") == before


def test_a_checkpoint_is_registered_once_with_its_lineage(
    where: dict[str, Any], made: PretrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CTX_DAG_RUN_ID", "manual__1")
    registry = Registry(where["tracking_uri"])
    again = register(RegisterConfig(model="ranker", checkpoint=made.checkpoint, **where))
    assert again.version == 1 and [v.version for v in registry.versions("ranker")] == [1]
    registry.set_alias("ranker", "champion", 1)
    other, version = published_version(where, seed=1)
    assert version == 2
    tags = registry.client.get_model_version("ranker", "2").tags
    assert tags["freshet.parent_version"] == "1" and tags["freshet.dataset"] == "history"
    assert tags["freshet.checkpoint"] == other.checkpoint and tags["freshet.airflow_dag_run_id"] == "manual__1"
    assert tags["freshet.config_digest"] == other.checkpoint.rsplit("/", 1)[1] and len(tags["freshet.git_commit"]) >= 7


def test_measuring_a_checkpoint_again_gives_what_pretraining_measured(
    where: dict[str, Any], made: PretrainResult
) -> None:
    measured = measure(where, checkpoint=made.checkpoint).metrics
    assert measured == made.metrics
    assert {f"baseline_{m}_{a}" for m in ("auc", "ne") for a in ("click", "like")} < measured.keys()
    by_version = measure(where, version=1)
    assert by_version.metrics == measured and by_version.as_of == 0


def test_what_has_learned_from_the_eval_part_is_not_measured_on_it(where: dict[str, Any], made: PretrainResult) -> None:
    flattered, version = published_version(where)
    assert flattered.metrics == made.metrics, "pretraining measures before it learns from the eval part"
    for chosen in ({"checkpoint": flattered.checkpoint}, {"version": version}):
        with pytest.raises(BadInput, match="which would flatter it"):
            measure(where, **chosen)
    assert measure(where, checkpoint=flattered.checkpoint, part="train").metrics


def test_a_finished_evaluation_is_returned_as_it_is(
    where: dict[str, Any], made: PretrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(where, version=1)
    from model.trainer import Trainer

    monkeypatch.setattr(Trainer, "predict", lambda *_: pytest.fail("measured again"))
    assert measure(where, version=1, as_of=0) == first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": ""}, "no dataset given"),
        ({"checkpoint": "checkpoints/ranker/none", "version": None}, "holds no finished checkpoint"),
        ({"checkpoint": "checkpoints/ranker/x", "version": 1}, "choose one of them"),
        ({"as_of": 9}, "has no sync point 9"),
        ({"version": None}, "no champion yet"),
        ({"model": "retriever", "version": None, "checkpoint": "MADE"}, "is a ranker, not a retriever"),
    ],
)
def test_wrong_evaluations_are_refused_with_the_remedy(
    where: dict[str, Any], made: PretrainResult, settings: dict[str, Any], message: str
) -> None:
    settings = {"version": 1, **settings}
    if settings.get("checkpoint") == "MADE":
        settings["checkpoint"] = made.checkpoint
    with pytest.raises(BadInput, match=message):
        measure(where, **settings)


def test_a_damaged_checkpoint_is_not_published(where: dict[str, Any], made: PretrainResult, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "store/parameters")
    damaged = next((tmp_path / "store" / made.checkpoint).glob("*-tables.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CorruptLog, match=f"{damaged.name} has .* it is truncated"):
        publish(PublishConfig(model="ranker", version=1, **where))
    assert LogReader(Storage(where["root"]), "ranker", 1).head() == -1


def test_a_log_of_another_registry_is_not_mistaken_for_this_version(
    where: dict[str, Any], made: PretrainResult, tmp_path: Path, mlflow_database: Path
) -> None:
    shutil.copy(mlflow_database, tmp_path / "other.db")
    other = {**where, "tracking_uri": f"sqlite:///{tmp_path}/other.db"}
    with pytest.raises(BadInput, match="does not know run"):
        published_version(other, learn_eval=False)  # the checkpoint exists, its run does not
    with pytest.raises(BadInput, match="holds the log of another run"):
        published_version(other, seed=1)


def test_compaction_waits_for_enough_deltas_and_keeps_what_is_asked(tmp_path: Path) -> None:
    where: dict[str, Any] = {"root": f"file://{tmp_path}", "tracking_uri": "unused"}
    held = small_log(where["root"], deltas=3)
    lazy = compact(CompactConfig(model="ranker", version=1, min_deltas=4, **where))
    assert lazy.snapshots == [0] and lazy.deleted == 0
    done = compact(CompactConfig(model="ranker", version=1, min_deltas=3, keep_deltas=0, **where))
    assert done.snapshots == [0, 3] and done.deleted == 9 and done.head == 3
    assert identical(LogReader(Storage(where["root"]), "ranker", 1).load(with_state=True), held[3])
    with pytest.raises(BadInput, match="publish the version first"):
        compact(CompactConfig(model="ranker", version=2, **where))


def test_a_candidate_is_measured_beside_the_champion_as_it_was_before_those_events(
    where: dict[str, Any], made: PretrainResult
) -> None:
    Registry(where["tracking_uri"]).set_alias("ranker", "champion", 1)
    twin, version = published_version(where, seed=1, learn_eval=False)
    beside = {name.removeprefix("champion_"): v for name, v in twin.metrics.items() if name.startswith("champion_")}
    assert beside.pop("version") == 1
    own = {name: value for name, value in made.metrics.items() if not name.startswith("baseline_")}
    assert beside == own, "the champion had not learned from the eval part either"
    storage, release = Storage(where["root"]), Release(ranker=version, retriever=1)
    gate = measured_beside(offline_metrics(storage, release), Release(ranker=1, retriever=1))
    assert gate == {f"ranker.{name}": value for name, value in own.items()}
    assert measured_beside(offline_metrics(storage, release), Release(ranker=7, retriever=1)) == {}


def test_a_champion_that_knows_the_events_already_is_not_compared_on_them(where: dict[str, Any]) -> None:
    published_version(where)
    Registry(where["tracking_uri"]).set_alias("ranker", "champion", 1)
    assert not [name for name in published_version(where, seed=1)[0].metrics if name.startswith("champion_")]


@pytest.mark.parametrize("damage", ["tables", "config"])
def test_a_new_version_can_be_trained_when_the_champions_log_is_no_use(
    where: dict[str, Any], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    published_version(where, learn_eval=False)
    Registry(where["tracking_uri"]).set_alias("ranker", "champion", 1)
    storage = Storage(where["root"])
    if damage == "tables":
        storage.write_bytes(LogReader(storage, "ranker", 1).manifest(0).files["tables"].path, b"damaged")
    else:
        path = "parameters/ranker/1/snapshot-0/manifest.json"
        manifest = json.loads(storage.read_bytes(path))
        manifest["config"]["a_setting_of_another_version"] = 1
        storage.write_bytes(path, json.dumps(manifest).encode())
    metrics = published_version(where, seed=1)[0].metrics
    assert "auc_click" in metrics and not [name for name in metrics if name.startswith("champion_")]
    assert "the champion is not measured beside the candidate" in capsys.readouterr().err
