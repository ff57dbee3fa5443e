"""The two launchers: a local process and a Kubernetes pod run the same command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from components.storage import Storage
from spark_jobs.session import settings
from tests.components.rollout_store import publish
from tests.dags.airflow_process import ROOT, call, environment

LOCAL = """
import os, threading, time
from pathlib import Path
from airflow.sdk.exceptions import AirflowException, TaskDeferred
from dags.launcher import LocalStep, component_task, refuse_unknown_settings
def execute(step, *flags, **settings):
    task = settings.pop("task", None) or LocalStep(task_id="t", step=step, flags=list(flags), **settings)
    try:
        return ["done", task.execute({"outlet_events": {}})]
    except AirflowException as error:
        return [type(error).__name__, str(error)]
def waits(moment):
    task = LocalStep(task_id="t", step="rollout", flags=[], not_before=moment)
    try:
        task.execute({"outlet_events": {}})
    except TaskDeferred as wait:
        return [wait.method_name, wait.trigger.moment.isoformat()]
def resumed():
    flags = ["--action=status", "--server-url=none"]
    task = LocalStep(task_id="t", step="rollout", flags=flags, not_before="2022-05-01T00:00:00Z")
    return task.resume_execution("resume", {"event": None}, {"outlet_events": {}})
def unknown(*names):
    from types import SimpleNamespace as some
    try:
        conf = dict.fromkeys(names)
        refuse_unknown_settings({"dag": some(params={"epochs": 4, "seed": 1}), "dag_run": some(conf=conf)})
    except AirflowException as error:
        return [type(error).__name__, str(error)]
def refusal(launcher):
    os.environ["FRESHET_LAUNCHER"] = launcher
    try:
        component_task("t", "join", {})
    except ValueError as error:
        return str(error)
def killed():
    flags = ["--action=start", "--ranker=2", "--retriever=2", "--gate-limits=ranker.none>=1", "--until=gate"]
    task, outcome = LocalStep(task_id="t", step="rollout", flags=flags), []
    thread = threading.Thread(target=lambda: outcome.extend(execute("rollout", task=task)))
    thread.start()
    paused = Path(os.environ["FRESHET_ROOT"].removeprefix("file://")) / "serving/rollout/00000002.json"
    while thread.is_alive() and not paused.exists():
        time.sleep(0.1)
    pid = task._process.pid
    task.on_kill()
    thread.join(30)
    return [pid, *outcome]
answer({
    "good": execute("rollout", "--action=start", "", "--ranker=1", "--retriever=1"),
    "wrong input": execute("rollout", "--ranker=9", "--retriever=9"),
    "wrong flag": execute("rollout", "--no-such-flag"),
    "crash": execute("no_such_step"),
    "skipped": execute("rollout", skip_unless="None"),
    "killed": killed(),
    "waits": waits("2999-01-01T00:00:00+00:00"),
    "resumed": resumed(),
    "unknown setting": unknown("epoch", "no_such_thing"),
    "known settings": unknown("epochs"),
    "unknown launcher": refusal("docker"),
    "no image": refusal("kubernetes"),
})
"""

KUBERNETES = """
from airflow.sdk.exceptions import TaskDeferred
from dags import pretrain, rollout, continual_training
from dags.kubernetes_launcher import PodStep
def pod_of(task, flags):
    task.flags = flags
    return task.build_pod_request_obj(dry_run=True).to_dict()
training = pretrain.dag.get_task("pretrain_ranker")
light = rollout.dag.get_task("gate")
from kubernetes.client import models as k8s
def finished(code):
    last = k8s.V1ContainerStateTerminated(exit_code=code, message="error: no such window; join it first")
    ended = k8s.V1ContainerState(terminated=last)
    status = k8s.V1ContainerStatus(
        name="base", image="i", image_id="i", ready=False, restart_count=0, state=ended)
    return k8s.V1Pod(metadata=k8s.V1ObjectMeta(name="p", namespace="freshet"),
                     spec=k8s.V1PodSpec(containers=[k8s.V1Container(name="base")]),
                     status=k8s.V1PodStatus(phase="Failed", container_statuses=[status]))
waiting = PodStep(task_id="w", step="join", flags=[], not_before="2999-01-01T00:00:00+00:00")
try:
    waiting.execute({})
except TaskDeferred as wait:
    waits = wait.method_name
light.process_pod_deletion = light.patch_already_checked = lambda *a, **k: None
light.is_istio_enabled = lambda pod: False
kinds = {}
for code in (1, 2):
    try:
        light.cleanup(finished(code), finished(code))
    except Exception as error:
        kinds[code] = [type(error).__name__, str(error)]
answer({
    "training": pod_of(training, ["--model=ranker", "", "--epochs=4"]),
    "light": pod_of(light, ["--action=start"]),
    "pool": training.pool, "xcom": training.do_xcom_push, "templated": list(training.template_fields),
    "kinds": sorted({type(t).__name__ for t in continual_training.dag.tasks}),
    "checked": light._pre_execute_hook.__name__,
    "failures": kinds, "waits": waits, "join": continual_training.dag.get_task("join").not_before,
})
"""
ON_KUBERNETES = {
    "FRESHET_LAUNCHER": "kubernetes",
    "FRESHET_IMAGE": "registry.example/freshet@sha256:0",
    "FRESHET_TRAINING_MEMORY": "48Gi",
    "AIRFLOW_CONN_KUBERNETES_DEFAULT": '{"conn_type": "kubernetes", "extra": {"in_cluster": false}}',
}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of several local steps."""
    home = tmp_path_factory.mktemp("local")
    for version in (1, 2):
        publish(Storage(f"file://{home}/store"), version)
    found: dict[str, Any] = call(home, LOCAL)
    return found


def test_a_local_step_returns_its_result(local: dict[str, Any]) -> None:
    kind, answer = local["good"]
    assert kind == "done" and answer["stage"] == "gate"


def test_wrong_input_is_told_apart_from_what_a_retry_may_mend(local: dict[str, Any]) -> None:
    kind, message = local["wrong input"]
    assert kind == "AirflowFailException" and message.startswith("rollout: the latest rollout is of ranker 1")
    kind, message = local["wrong flag"]
    assert kind == "AirflowFailException" and "--no-such-flag" in message
    kind, message = local["crash"]
    assert kind == "AirflowException" and "exit code 1" in message


def test_settings_that_the_form_does_not_have_are_named_with_those_that_it_has(local: dict[str, Any]) -> None:
    kind, message = local["unknown setting"]
    assert kind == "AirflowFailException", "no retry mends that"
    assert message.startswith("no such setting: epoch, no_such_thing; perhaps epochs; ")
    assert message.endswith("settings of its form: epochs, seed")
    assert local["known settings"] is None


def test_a_step_without_work_is_skipped(local: dict[str, Any]) -> None:
    assert local["skipped"][0] == "AirflowSkipException"


def test_a_step_waits_for_its_time_without_a_process_and_then_goes_on(local: dict[str, Any]) -> None:
    assert local["waits"] == ["resume", "2999-01-01T00:00:00+00:00"]
    assert local["resumed"]["champion"] is None, "the step itself has run"


def test_killing_a_local_step_stops_what_it_started(local: dict[str, Any]) -> None:
    pid, kind, message = local["killed"]
    assert kind == "AirflowException" and f"exit code {128 + signal.SIGTERM}" in message
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


ENDLESS = """
from dags.launcher import LocalStep
flags = ["--action=start", "--ranker=2", "--retriever=2", "--gate-limits=ranker.none>=1", "--until=gate"]
LocalStep(task_id="t", step="rollout", flags=flags).execute({"outlet_events": {}})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a step ends at its next line of output")
def test_a_step_ends_with_a_task_that_is_killed_without_warning(tmp_path: Path) -> None:
    """As the OOM killer does; the retry would find the step of the first try at work."""
    publish(Storage(f"file://{tmp_path}/store"), 2)
    task = subprocess.Popen([sys.executable, "-c", ENDLESS], cwd=ROOT, env=environment(tmp_path, {}))
    paused = tmp_path / "store" / "serving" / "rollout" / "00000001.json"
    while not paused.exists():
        assert task.poll() is None
        time.sleep(0.1)
    (step,) = map(int, Path(f"/proc/{task.pid}/task/{task.pid}/children").read_text().split())
    task.kill()
    task.wait()
    for _ in range(100):
        if not Path(f"/proc/{step}").exists():
            return
        time.sleep(0.1)
    os.kill(step, signal.SIGKILL)
    pytest.fail("the step works on")


def test_a_wrong_launcher_setting_says_what_to_set(local: dict[str, Any]) -> None:
    assert "set it to local or kubernetes" in local["unknown launcher"]
    assert "FRESHET_IMAGE is not set" in local["no image"]


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pods as they would be sent to a cluster, and how finished ones are judged; no cluster is asked."""
    found: dict[str, Any] = call(tmp_path_factory.mktemp("pods"), KUBERNETES, ON_KUBERNETES)
    return found


def test_a_step_becomes_a_pod_with_image_resources_secrets_and_result(pods: dict[str, Any]) -> None:
    training = pods["training"]
    base, sidecar = training["spec"]["containers"]
    assert base["command"] == ["python", "-m", "components.pretrain"]
    assert base["args"] == ["--model=ranker", "--epochs=4"]
    assert base["image"] == "registry.example/freshet@sha256:0"
    assert base["resources"]["limits"] == {"memory": "48Gi", "nvidia.com/gpu": "1"}
    assert base["resources"]["requests"]["memory"] == "48Gi"
    assert base["security_context"]["run_as_non_root"] is True
    variables = {variable["name"]: variable["value"] for variable in base["env"]}
    assert variables["FRESHET_RESULT_PATH"] == "/airflow/xcom/return.json"
    assert "run_id" in variables["AIRFLOW_CTX_DAG_RUN_ID"]
    sources = [(s["config_map_ref"] or s["secret_ref"])["name"] for s in base["env_from"]]
    assert sources == ["freshet", "freshet"]
    assert sidecar["name"] == "airflow-xcom-sidecar" and pods["xcom"] is True
    assert training["metadata"]["namespace"] == "freshet" and pods["pool"] == "gpu"
    assert {"flags", "skip_unless", "not_before", "env_vars"} <= set(pods["templated"])
    light = pods["light"]["spec"]["containers"][0]
    assert "nvidia.com/gpu" not in light["resources"]["limits"]
    assert pods["kinds"] == ["PodStep"]


def test_a_pod_has_room_for_sparks_heap_and_python_beside_it(pods: dict[str, Any]) -> None:
    """The kernel kills a step above its limit, where the JVM would have collected garbage."""
    heap, limit = settings("local[2]", "")["spark.driver.memory"], pods["light"]["spec"]["containers"][0]["resources"]
    assert (heap, limit["limits"]["memory"]) == ("2g", "4Gi")


def test_a_pod_is_not_started_before_its_time(pods: dict[str, Any]) -> None:
    assert pods["waits"] == "resume"
    assert "ready_at" in pods["join"], "the join of a scheduled window has to wait"


def test_a_pod_is_not_started_for_a_run_with_unknown_settings(pods: dict[str, Any]) -> None:
    assert pods["checked"] == "refuse_unknown_settings"


def test_a_pod_that_refuses_its_input_is_not_retried(pods: dict[str, Any]) -> None:
    kinds = {code: kind for code, (kind, _) in pods["failures"].items()}
    assert kinds == {"1": "AirflowException", "2": "AirflowFailException"}


def test_a_failed_pod_says_what_the_step_said_and_not_how_the_pod_was_made(pods: dict[str, Any]) -> None:
    base = pods["light"]["spec"]["containers"][0]
    assert base["termination_message_policy"] == "FallbackToLogsOnError", "the step's last lines"
    for _, message in pods["failures"].values():
        assert message.endswith("returned a failure.\nerror: no such window; join it first")
