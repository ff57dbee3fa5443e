"""A pretraining that is killed and run again goes on, and ends as if nothing had happened."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from mlflow import MlflowClient

from components.errors import BadInput
from components.parameters.checkpoint import find_checkpoint
from components.parameters.log import MODELS
from components.pretrain.config import PretrainConfig
from components.pretrain.run import PretrainResult
from components.pretrain.run import run as pretrain
from components.schemas import ITEMS
from components.storage import LocalFiles, Storage
from model.trainer import Trainer
from tests.components.death import Killed, die
from tests.components.steps import pretrain_config

STEPS = 6
"""Of the pretraining in these tests: two epochs of two steps, then two over the eval part."""
AT_EVERY_STEP = 1e-9
POLICIES = ("refused_", "expired_", "evicted_")


@pytest.fixture
def where(tmp_path: Path, tracking_uri: str) -> dict[str, Any]:
    return {"root": f"file://{tmp_path}/store", "tracking_uri": tracking_uri}


@dataclass(frozen=True)
class Undisturbed:
    """What a pretraining ends with when nothing happens to it."""

    result: PretrainResult
    bits: dict[str, str]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> dict[str, Undisturbed]:
    """By model; made in a store of its own, without saves."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(mlflow_database, folder / "mlflow.db")
    where = {"root": f"file://{folder}/store", "tracking_uri": f"sqlite:///{folder}/mlflow.db"}
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where MLflow without a server puts artifacts
        for model in MODELS:
            result = pretrain(config_of(where, model, save_every_s=0))
            made[model] = Undisturbed(result, bits(where, result))
    return made


def config_of(where: dict[str, Any], model: str = "ranker", **settings: Any) -> PretrainConfig:
    """Rows are admitted, expire and are evicted, so that all of a table's state matters."""
    rules = {"table_admission": "item=8", "table_ttl_days": "user=1,item=1", "table_max_rows": "author=4"}
    chosen = {"save_every_s": AT_EVERY_STEP, "continual_batch_tokens": 400, **rules, **settings}
    return pretrain_config(where, model, **chosen)


def bits(where: dict[str, Any], result: PretrainResult) -> dict[str, str]:
    """The checksum of each file of a checkpoint."""
    checkpoint = find_checkpoint(Storage(where["root"]), result.checkpoint)
    assert checkpoint is not None
    return {name: file.sha256 for name, file in checkpoint.files.items()}


def saves(where: dict[str, Any], ending: str = "") -> list[Path]:
    folder = Path(where["root"].removeprefix("file://"))
    return sorted(path for path in folder.glob("checkpoints/*/*/saves/*") if path.name.endswith(ending))


def killed(config: PretrainConfig, *death: Any) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die(patch, *death)
        pretrain(config)


def steps_of(config: PretrainConfig) -> tuple[PretrainResult, int]:
    """The result, and how many steps this run of the pretraining took itself."""
    calls, original = [0], Trainer._train_batch

    def counting(self: Trainer, *arguments: Any) -> Any:
        calls[0] += 1
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_batch", counting)
        return pretrain(config), calls[0]


DEATHS = [
    *((f"in step {n}, unsaved", (Trainer, "_train_batch", n), n - 1) for n in (1, 2, 4, 5, 6)),
    ("while measuring", (Trainer, "predict", 1, False), 4),
    ("before the first save's data", (LocalFiles, "write", 1, False), 0),
    ("between the first save's data and manifest", (LocalFiles, "write", 1), 0),
    ("right after the third save's manifest", (LocalFiles, "write", 6), 3),
    ("between data and manifest in the eval part", (LocalFiles, "write", 9), 4),
    ("right after the save in the eval part", (LocalFiles, "write", 10), 5),
    ("while older saves are deleted", (LocalFiles, "delete", 1), 3),
    ("while older saves are deleted", (LocalFiles, "delete", 2), 3),
    ("while the checkpoint is written", (LocalFiles, "write", 14), 6),
    ("before the commit", (LocalFiles, "create", 1, False), 6),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("death", "saved"), [case[1:] for case in DEATHS], ids=[case[0] for case in DEATHS])
def test_killed_anywhere_and_run_again_it_goes_on_and_ends_with_the_same_bits(
    where: dict[str, Any], undisturbed: dict[str, Undisturbed], model: str, death: tuple[Any, ...], saved: int
) -> None:
    config = config_of(where, model)
    killed(config, *death)
    result, steps = steps_of(config)
    assert steps == STEPS - saved, "what was saved is not done again"
    assert bits(where, result) == undisturbed[model].bits
    whole = undisturbed[model].result
    assert (result.metrics, result.rows) == (whole.metrics, whole.rows)
    assert not saves(where)


def test_killed_again_and_again_it_ends_with_the_same_bits(
    where: dict[str, Any], undisturbed: dict[str, Undisturbed]
) -> None:
    config = config_of(where)
    for step in range(1, STEPS):
        killed(config, Trainer, "_train_batch", 2, False)  # each attempt comes one step further
        assert saves(where, ".json")[-1].name == f"step-{step:09}.json"
    assert bits(where, pretrain(config)) == undisturbed["ranker"].bits


def test_it_goes_on_from_an_object_store_too(
    s3_root: str, tracking_uri: str, undisturbed: dict[str, Undisturbed]
) -> None:
    where = {"root": s3_root, "tracking_uri": tracking_uri}
    config = config_of(where)
    killed(config, Trainer, "_train_batch", 4)
    result, steps = steps_of(config)
    assert steps == STEPS - 3 and bits(where, result) == undisturbed["ranker"].bits
    assert not [path for path in Storage(s3_root).list("checkpoints") if "/saves/" in path]


def test_the_run_that_goes_on_shows_the_whole_course(where: dict[str, Any]) -> None:
    whole = pretrain(config_of({**where, "root": f"{where['root']}-whole"}))
    config, client = config_of(where), MlflowClient(tracking_uri=where["tracking_uri"])
    killed(config, LocalFiles, "create", 1, False)
    result = pretrain(config)

    def shown(run_id: str) -> dict[str, Any]:
        names = client.get_run(run_id).data.metrics.keys()
        kept = ("loss", "learn_eval_loss", "auc_click", *(name for name in names if name.startswith(POLICIES)))
        return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in kept}

    assert shown(result.run_id) == shown(whole.run_id)
    assert [step for step, _ in shown(result.run_id)["loss"]] == [1, 2, 3, 4]
    assert "refused_admission_item" in shown(result.run_id), "what was refused before the kill counts too"
    assert client.get_run(result.run_id).data.tags["freshet.resumed_from_step"] == "6"
    pictures = {file.path for file in client.list_artifacts(result.run_id)}
    assert {"learning_curve.png", "learn_eval_learning_curve.png", "calibration.png"} <= pictures


def test_a_finished_pretraining_leaves_no_save_even_if_it_died_before_deleting_them(where: dict[str, Any]) -> None:
    config = config_of(where)
    killed(config, LocalFiles, "create", 1)
    assert saves(where)
    result, steps = steps_of(config)
    assert steps == 0 and not saves(where)
    run = MlflowClient(tracking_uri=where["tracking_uri"]).get_run(result.run_id)
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
@pytest.mark.parametrize("damage", [b"", b"changed"])
def test_a_damaged_save_is_named_and_passed_over_for_the_one_before(
    where: dict[str, Any],
    undisturbed: dict[str, Undisturbed],
    ending: str,
    damage: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(where)
    killed(config, Trainer, "_train_batch", 4)
    damaged = saves(where, ending)[-1]
    damaged.write_bytes(damaged.read_bytes()[:-7] + damage if damage else b"")
    result, steps = steps_of(config)
    told = capsys.readouterr().err
    assert f"{damaged.name} " in told and "this save is not used, but the one before it" in told
    assert "goes on after step 2" in told and steps == STEPS - 2
    assert bits(where, result) == undisturbed["ranker"].bits and not saves(where)


def test_when_no_save_is_whole_it_begins_anew_and_says_so(
    where: dict[str, Any], undisturbed: dict[str, Undisturbed], capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(where)
    killed(config, Trainer, "_train_batch", 4)
    for file in saves(where, ".safetensors"):
        file.unlink()
    result, steps = steps_of(config)
    assert "is missing" in (told := capsys.readouterr().err) and "beginning anew" in told
    assert steps == STEPS and bits(where, result) == undisturbed["ranker"].bits


def test_a_save_of_other_settings_is_never_used(
    where: dict[str, Any], undisturbed: dict[str, Undisturbed], capsys: pytest.CaptureFixture[str]
) -> None:
    killed(config_of(where, seed=7), Trainer, "_train_batch", 4)
    (stranger,) = {path.parent for path in saves(where)}
    config = config_of(where)
    shutil.copytree(stranger, stranger.parents[1] / config.digest() / "saves")
    result, steps = steps_of(config)
    assert "belongs to the settings" in capsys.readouterr().err
    assert steps == STEPS and bits(where, result) == undisturbed["ranker"].bits
    assert list(stranger.iterdir()), "it waits for its own"


def test_a_save_of_other_software_is_refused_with_the_remedy(where: dict[str, Any]) -> None:
    config = config_of(where)
    killed(config, Trainer, "_train_batch", 4)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BadInput, match="another version of Freshet wrote it"):
        patch.setattr("model.trainer.ROW_PARTS", ("keys", "weights", "colour"))
        pretrain(config)
    assert saves(where), "nothing is lost by asking"


def test_items_that_come_in_between_change_nothing(where: dict[str, Any], undisturbed: dict[str, Undisturbed]) -> None:
    config = config_of(where, "retriever")
    killed(config, Trainer, "_train_batch", 3)
    row = {"author_id": 6, "category": 1, "duration_s": 1.0, "available_from": None, "available_until": None}
    rows = [{**row, "item_id": item} for item in (1, 2, 999)]
    Storage(where["root"]).write_table("items/zz.parquet", pa.Table.from_pylist(rows, schema=ITEMS))
    result, steps = steps_of(config)
    assert steps == STEPS - 2 and bits(where, result) == undisturbed["retriever"].bits


def test_items_that_have_gone_in_between_are_missed_by_name(where: dict[str, Any]) -> None:
    config = config_of(where)
    killed(config, Trainer, "_train_batch", 3)
    Storage(where["root"]).delete("items/world.parquet")
    with pytest.raises(BadInput, match=r"world\.parquet.* bring it back"):
        pretrain(config)


def test_only_the_two_newest_saves_are_kept(where: dict[str, Any]) -> None:
    killed(config_of(where), Trainer, "_train_batch", 5)
    assert [path.name for path in saves(where, ".json")] == ["step-000000003.json", "step-000000004.json"]
    assert len(saves(where)) == 4


@pytest.mark.parametrize("every_s", [0, 300])
def test_nothing_is_saved_before_its_time(where: dict[str, Any], every_s: float) -> None:
    killed(config_of(where, save_every_s=every_s), LocalFiles, "create", 1, False)
    assert not saves(where)


def test_a_store_that_refuses_a_save_does_not_stop_the_training(
    where: dict[str, Any], undisturbed: dict[str, Undisturbed], capsys: pytest.CaptureFixture[str]
) -> None:
    original = LocalFiles.write

    def full(self: LocalFiles, path: str, data: bytes) -> None:
        if "/saves/" in path:
            raise OSError(28, "No space left on device")
        original(self, path, data)

    config = config_of(where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFiles, "write", full)
        result = pretrain(config)
    assert "step 1 could not be saved in" in (told := capsys.readouterr().err) and "No space left" in told
    assert bits(where, result) == undisturbed["ranker"].bits


def test_a_save_holds_plain_arrays_and_nothing_that_could_be_executed(where: dict[str, Any]) -> None:
    from safetensors.numpy import load

    killed(config_of(where), Trainer, "_train_batch", 2)
    (data,) = saves(where, ".safetensors")
    arrays = load(data.read_bytes())
    assert {"tables/item/candidates", "optimizer/trainer/step", "optimizer/item/table_progress"} <= arrays.keys()
    assert all(isinstance(array, np.ndarray) for array in arrays.values()) and len(arrays["course/losses"]) == 1
    assert len(arrays["tables/item/candidates"]), "these tests are about candidates too"
