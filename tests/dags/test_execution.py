"""DAGs executed for real, in Airflow's own runner and on its own database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.rollout import record
from components.rollout.state import Release
from components.storage import Storage
from tests.components.rollout_store import publish
from tests.dags.airflow_process import call

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def store(airflow_home: Path) -> Storage:
    return Storage(f"file://{airflow_home}/store")


@pytest.fixture(scope="module")
def runs(store: Storage, airflow_home: Path) -> dict[str, Any]:
    """State of four runs, and state and try number of each of their tasks."""
    publish(store, 1)
    publish(store, 2, auc=0.3)
    source = """
from airflow.utils.db import initdb
initdb()
from types import SimpleNamespace
from airflow.sdk.exceptions import AirflowSkipException, DagRunTriggerException
from dags import continual_training, pretrain, rollout
def run(dag, **conf):
    done = dag.test(run_conf=conf)
    return [done.state, {ti.task_id: [ti.state, ti.try_number] for ti in done.get_task_instances()}]
def triggered(roll_out):
    ti = SimpleNamespace(xcom_pull=lambda task_ids: {"ranker": 4, "retriever": 5}, dag_id="pretrain", run_id="r")
    task = pretrain.dag.get_task("roll_out")
    task.trigger_run_id = "release__r"
    try:
        task.execute({"params": {"roll_out": roll_out}, "ti": ti, "task_instance": ti})
    except DagRunTriggerException as trigger:
        return [trigger.trigger_dag_id, trigger.conf]
    except AirflowSkipException:
        return "skipped"
answer({
    "triggered": [triggered(True), triggered(False)],
    "good": run(rollout.dag, server_url="none", ranker=1, retriever=1),
    "bad": run(rollout.dag, server_url="none", ranker=2, retriever=2),
    "misspelt": run(rollout.dag, server_url="none", ranker=1, retriever=1, share="2000"),
    "no events": run(continual_training.dag, window="20220501T000000Z-20220502T000000Z"),
})
"""
    found: dict[str, Any] = call(airflow_home, source)
    return found


def test_the_rollout_dag_brings_the_first_release_to_champion(runs: dict[str, Any], store: Storage) -> None:
    state, tasks = runs["good"]
    assert state == "success" and {task: found[0] for task, found in tasks.items()} == dict.fromkeys(
        ("gate", "shadow", "canary", "promoted"), "success"
    )
    started, promoted = record.history(store)[:2]
    assert (promoted.stage, promoted.champion) == ("promoted", Release(ranker=1, retriever=1))
    assert started.by.startswith("manual__"), "the record names the run that decided"


def test_the_rollout_dag_fails_loudly_and_at_once_on_a_rejected_release(runs: dict[str, Any], store: Storage) -> None:
    state, tasks = runs["bad"]
    assert (state, tasks["gate"], tasks["shadow"][0]) == ("failed", ["failed", 1], "upstream_failed")
    assert record.current(store).stage == "rejected"
    assert record.current(store).champion == Release(ranker=1, retriever=1)


def test_wrong_input_fails_a_run_without_retries(runs: dict[str, Any]) -> None:
    state, tasks = runs["no events"]
    assert state == "failed"
    assert tasks["join"] == ["failed", 1], "there are no events: no retry mends that"
    assert tasks["versions"][0] == tasks["finetune_ranker"][0] == "upstream_failed"


def test_a_misspelt_setting_fails_a_run_instead_of_being_passed_over(runs: dict[str, Any]) -> None:
    state, tasks = runs["misspelt"]
    assert (state, tasks["gate"]) == ("failed", ["failed", 1]), "it is `shares`"


def test_pretraining_hands_its_release_to_the_rollout_unless_told_not_to(runs: dict[str, Any]) -> None:
    assert runs["triggered"] == [["rollout", {"ranker": 4, "retriever": 5}], "skipped"]
