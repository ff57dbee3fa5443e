from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.config import form_fields
from components.errors import BadInput
from components.parameters.arrays import Parameters
from components.parameters.checkpoint import find_checkpoint, load_checkpoint
from components.parameters.log import MODELS
from components.pretrain.config import PretrainConfig
from components.pretrain.run import run as pretrain
from components.storage import LocalFiles, Storage
from tests.components.parameter_world import identical
from tests.components.steps import pretrain_config


@pytest.fixture
def where(tmp_path: Path, tracking_uri: str) -> dict[str, Any]:
    return {"root": f"file://{tmp_path}/store", "tracking_uri": tracking_uri}


def parameters_of(where: dict[str, Any], folder: str) -> Parameters:
    storage = Storage(where["root"])
    checkpoint = find_checkpoint(storage, folder)
    assert checkpoint is not None
    return load_checkpoint(storage, checkpoint)


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_holds_parameters_lineage_and_metrics(where: dict[str, Any], model: str) -> None:
    result = pretrain(pretrain_config(where, model))
    checkpoint = find_checkpoint(Storage(where["root"]), result.checkpoint)
    assert checkpoint is not None and checkpoint.model == model and checkpoint.dataset == "history"
    assert checkpoint.event_range is not None and checkpoint.event_range[0] < checkpoint.event_range[1]
    parameters = parameters_of(where, result.checkpoint)
    assert result.rows["item"] == len(parameters.tables["item"].keys) > 30
    assert int(parameters.optimizer["trainer/step"]) == 5, "two epochs of two steps, then one over the eval part"
    expected = {"auc_click", "ne_click", "calibration_click"} if model == "ranker" else {"hr_10", "ndcg_10"}
    assert expected <= result.metrics.keys()
    assert "auc_long_view" not in result.metrics  # nobody viewed long: undefined, hence absent


def test_a_finished_pretraining_is_returned_without_training(
    where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pretrain(pretrain_config(where))
    from model.trainer import Trainer

    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert pretrain(pretrain_config(where)) == first
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        pretrain(pretrain_config(where, seed=1))


def test_pretraining_again_from_nothing_gives_the_same_bits(where: dict[str, Any], tmp_path: Path) -> None:
    other = {**where, "root": f"file://{tmp_path}/other"}
    one, two = pretrain(pretrain_config(where)), pretrain(pretrain_config(other))
    assert one.checkpoint == two.checkpoint and one.metrics == two.metrics
    assert identical(parameters_of(where, one.checkpoint), parameters_of(other, two.checkpoint))


def test_the_run_shows_settings_curves_pictures_and_the_dataset(where: dict[str, Any]) -> None:
    result = pretrain(pretrain_config(where))
    client = MlflowClient(tracking_uri=where["tracking_uri"])
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "2" and run.data.params["heads"] == "click,long_view,like"
    assert run.data.metrics["auc_click"] == result.metrics["auc_click"] and run.data.metrics["tokens_per_s"] > 0
    assert [m.step for m in client.get_metric_history(result.run_id, "loss")] == [1, 2, 3, 4]
    assert [m.step for m in client.get_metric_history(result.run_id, "learn_eval_loss")] == [1]
    assert run.data.metrics["step_tokens_per_s"] > 0 and run.data.metrics["learn_eval_tokens_per_s"] > 0
    pictures = {file.path: file.file_size or 0 for file in client.list_artifacts(result.run_id)}
    assert pictures["learning_curve.png"] > 5000 and pictures["calibration.png"] > 5000
    assert pictures["learn_eval_learning_curve.png"] > 5000
    assert run.inputs is not None
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "history" and "sequences/history/manifest.json" in used.dataset.source
    assert [file.path for file in client.list_artifacts(result.run_id, "datasets")] == ["datasets/history.json"]


def test_a_pretraining_that_died_before_its_commit_is_closed_as_failed_and_done_again(
    where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    original = LocalFiles.create

    def die(self: LocalFiles, path: str, data: bytes) -> None:
        if path.startswith("checkpoints/"):
            raise Killed
        original(self, path, data)

    config = pretrain_config(where)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LocalFiles, "create", die)
        patch.setattr(MlflowClient, "set_terminated", lambda *_: None)  # a killed process says nothing to MLflow
        pretrain(config)
    result = pretrain(config)
    client = MlflowClient(tracking_uri=where["tracking_uri"])
    experiment = client.get_experiment_by_name("pretrain")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_id: run.info.status for run in runs}[result.run_id] == "FINISHED"
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": ""}, "no dataset given"),
        ({"dataset": "absent"}, "has no manifest; run python -m components.sequences"),
        ({"heads": "applause"}, "unknown action 'applause'"),
        ({"slots": "colour"}, "unknown slots colour"),
    ],
)
def test_wrong_settings_are_refused_with_the_remedy(
    where: dict[str, Any], settings: dict[str, str], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        pretrain(pretrain_config(where).model_copy(update=settings))


def test_the_form_offers_exactly_the_settings_of_both_models_with_their_defaults_and_bounds() -> None:
    from model.ranker import RankerConfig
    from model.retriever import RetrieverConfig

    form = form_fields(PretrainConfig)
    assert list(form)[:3] == ["model", "dataset", "learn_eval"] and form["model"]["enum"] == ["ranker", "retriever"]
    models = form_fields(RankerConfig) | form_fields(RetrieverConfig)
    assert set(form) - {"model", "dataset", "learn_eval", "device", "threads", "save_every_s"} == set(models)
    for name, field in models.items():
        told = {key: value for key, value in form[name].items() if key not in ("description", "title")}
        assert told == {key: value for key, value in field.items() if key not in ("description", "title")}, name
        assert len(form[name]["description"]) > 10


def test_reading_a_steps_settings_loads_no_heavy_library() -> None:
    steps = ("pretrain", "evaluate", "register", "publish", "finetune", "compact")
    imports = "; ".join(f"import components.{step}.config, components.{step}.run" for step in steps)
    check = (
        f"{imports}; import sys; print([m for m in ('torch', 'mlflow', 'pyspark', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]", done.stderr


def test_a_gpu_that_is_wanted_and_absent_is_an_error(where: dict[str, Any]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(BadInput, match="use auto or cpu"):
        pretrain(pretrain_config(where, device="cuda"))
