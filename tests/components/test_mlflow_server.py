"""The whole chain of training steps against a real MLflow server, through the command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.config import to_arguments
from components.publish.config import PublishConfig
from components.publish.run import run as publish
from components.register.config import RegisterConfig
from components.register.run import run as register
from components.registry import Registry
from tests.components.sequence_world import SMALL, day, write_day, write_history

pytestmark = pytest.mark.integration


def step(name: str, where: dict[str, str], **settings: Any) -> dict[str, Any]:
    environment = {**os.environ, "FRESHET_ROOT": where["root"], "MLFLOW_TRACKING_URI": where["tracking_uri"]}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", f"components.{name}", *to_arguments(settings)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=300
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_from_dataset_to_a_delta_of_the_champion(mlflow_server: str, tmp_path: Path) -> None:
    where: dict[str, Any] = {"root": f"file://{tmp_path}", "tracking_uri": mlflow_server}
    dataset = write_history(where["root"])
    made = step("pretrain", where, model="ranker", dataset=dataset, epochs=1, threads=1, **SMALL)
    version = register(RegisterConfig(model="ranker", checkpoint=made["checkpoint"], **where)).version
    assert publish(PublishConfig(model="ranker", version=version, **where)).metrics == made["metrics"]
    registry = Registry(mlflow_server)
    registry.set_alias("ranker", "champion", version)
    learned = step("finetune", where, model="ranker", dataset=write_day(where["root"], 1), threads=1)
    assert learned["n"] == 1 and "frozen_auc_click" in learned["metrics"]

    client = MlflowClient(tracking_uri=mlflow_server)
    entry = client.get_model_version_by_alias("ranker", "champion")
    assert entry.source == f"freshet:///{made['checkpoint']}" and entry.run_id == made["run_id"]
    assert entry.tags["freshet.checkpoint_url"] == f"file://{tmp_path}/{made['checkpoint']}"
    assert entry.tags["freshet.head"] == "1" and entry.tags["freshet.newest_window"] == day(1).key
    pictures = {file.path for file in client.list_artifacts(made["run_id"])}
    assert {"learning_curve.png", "calibration.png", "datasets"} <= pictures


def test_wrong_input_exits_with_two_and_says_what_to_do(mlflow_server: str, tmp_path: Path) -> None:
    environment = {**os.environ, "FRESHET_ROOT": f"file://{tmp_path}", "MLFLOW_TRACKING_URI": mlflow_server}
    command = [sys.executable, "-m", "components.finetune", "--dataset=absent", "--version=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and "has no manifest; run python -m components.sequences" in done.stderr
    assert "Traceback" not in done.stderr
