"""Runs a component as a Kubernetes pod. Settings come from the environment of the DAG processor and the workers.

FRESHET_IMAGE              image with the components (required; pin it by digest)
FRESHET_NAMESPACE          default freshet
FRESHET_SERVICE_ACCOUNT    default freshet
FRESHET_CONFIG_MAP         environment of every step (FRESHET_ROOT, MLFLOW_TRACKING_URI, ...); default freshet
FRESHET_SECRET             credentials, as environment variables; default freshet
FRESHET_GPU_RESOURCE       default nvidia.com/gpu; empty trains without a GPU
FRESHET_CPU, FRESHET_MEMORY, FRESHET_TRAINING_CPU, FRESHET_TRAINING_MEMORY    requests of a pod
"""

from __future__ import annotations

import os
from typing import Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import models as k8s

from dags.launcher import WRONG_INPUT, stop_if_not_wanted, tell_assets, wait_until

RESULT_PATH = "/airflow/xcom/return.json"
_CONTEXT = {"dag_id": "dag.dag_id", "task_id": "task.task_id", "dag_run_id": "run_id", "try_number": "ti.try_number"}
"""AIRFLOW_CTX_<name> of a step's environment, and the template of its value."""


class PodStep(KubernetesPodOperator):
    """Runs a step in a pod. `flags` are its arguments; empty ones are left out."""

    template_fields = (*KubernetesPodOperator.template_fields, "flags", "skip_unless", "not_before")

    def __init__(
        self, *, step: str, flags: list[str], skip_unless: str = "True", not_before: str = "", **kwargs: Any
    ) -> None:
        super().__init__(cmds=["python", "-m", f"components.{step}"], **kwargs)
        self.step, self.flags, self.skip_unless, self.not_before = step, flags, skip_unless, not_before

    def build_pod_request_obj(self, context: Context | None = None, *, dry_run: bool = False) -> k8s.V1Pod:
        """The pod, with the flags as rendered by now."""
        self.arguments = [text for text in self.flags if text]
        return super().build_pod_request_obj(context, dry_run=dry_run)

    def execute(self, context: Context) -> Any:
        """Run the pod and return the step's result."""
        stop_if_not_wanted(self.skip_unless)
        wait_until(self, self.not_before)
        answer = super().execute(context)
        tell_assets(context, self.outlets, answer or {})
        return answer

    def resume(self, context: Context, event: Any = None) -> Any:
        """Go on after a wait."""
        return self.execute(context)

    def cleanup(self, pod: k8s.V1Pod, remote_pod: k8s.V1Pod, *args: Any, **kwargs: Any) -> None:
        """As the operator does, but wrong input is a failure that no retry can mend."""
        try:
            super().cleanup(pod, remote_pod, *args, **kwargs)
        except AirflowException as error:
            if exit_code(remote_pod, self.base_container_name) == WRONG_INPUT:
                raise AirflowFailException(f"{self.step}: {error}") from error
            raise


def exit_code(pod: k8s.V1Pod, container: str) -> int | None:
    """Exit code of a container of a finished pod, or None."""
    for status in (pod.status.container_statuses if pod and pod.status else None) or []:
        if status.name == container and status.state and status.state.terminated:
            return int(status.state.terminated.exit_code)
    return None


def pod_settings(gpu: bool) -> dict[str, Any]:
    """What all pods share; `gpu` adds a GPU and the larger requests of training."""
    if not (image := os.environ.get("FRESHET_IMAGE")):
        raise ValueError("FRESHET_LAUNCHER is kubernetes but FRESHET_IMAGE is not set; set it to the components' image")
    return {
        "image": image,
        "namespace": os.environ.get("FRESHET_NAMESPACE", "freshet"),
        "service_account_name": os.environ.get("FRESHET_SERVICE_ACCOUNT", "freshet"),
        "env_vars": {
            "FRESHET_RESULT_PATH": RESULT_PATH,
            "PYTHONUNBUFFERED": "1",
            **{f"AIRFLOW_CTX_{name.upper()}": f"{{{{ {value} }}}}" for name, value in _CONTEXT.items()},
        },
        "env_from": [
            k8s.V1EnvFromSource(
                config_map_ref=k8s.V1ConfigMapEnvSource(name=os.environ.get("FRESHET_CONFIG_MAP", "freshet"))
            ),
            k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=os.environ.get("FRESHET_SECRET", "freshet"))),
        ],
        "container_resources": _resources(gpu),
        "container_security_context": k8s.V1SecurityContext(
            run_as_non_root=True, allow_privilege_escalation=False, capabilities=k8s.V1Capabilities(drop=["ALL"])
        ),
        "labels": {"app.kubernetes.io/part-of": "freshet"},
        "do_xcom_push": True,
        "get_logs": True,
        # A failed task says why, by the step's last lines, instead of showing the whole pod.
        "termination_message_policy": "FallbackToLogsOnError",
        "log_pod_spec_on_failure": False,
        "on_finish_action": "delete_succeeded_pod",
        "schedule_timeout_seconds": 3600,  # a GPU may be busy
        "startup_timeout_seconds": 600,  # pulling the image
    }


def _resources(gpu: bool) -> k8s.V1ResourceRequirements:
    # Spark's heap alone is 2 GiB (FRESHET_SPARK_MEMORY of the step)
    prefix, cpu, memory = ("FRESHET_TRAINING", "4", "16Gi") if gpu else ("FRESHET", "1", "4Gi")
    requests = {"cpu": os.environ.get(f"{prefix}_CPU", cpu), "memory": os.environ.get(f"{prefix}_MEMORY", memory)}
    limits = {"memory": requests["memory"]}
    device = os.environ.get("FRESHET_GPU_RESOURCE", "nvidia.com/gpu")
    if gpu and device:
        limits[device] = "1"  # a GPU request equals its limit
    return k8s.V1ResourceRequirements(requests=requests, limits=limits)
