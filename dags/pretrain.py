"""## Pretrain

Trains a new ranker and a new retriever from scratch, measures them on the eval part of the data before they learn
from that too, registers both as versions in MLflow, publishes their parameters, and starts their rollout. This is also
the manual retraining: every setting is in the form.

* **Dataset**: left empty, the newest one that `build_sequences` had made when the run was triggered.
* Both models learn in the pool `gpu`; its number of slots is the number of models that train side by side.
* Equal settings give the same checkpoint: run again, nothing is trained twice.
* A task that was killed and runs again goes on from its newest save, at most **save_every_s** before its end.
* **Roll out**: the DAG `rollout` takes the new release through gate, shadow and canary. Switched off, the versions
  wait in the registry; trigger `rollout` when they shall go out.
"""

from __future__ import annotations

from typing import Any

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import Context, Param, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException

from components.pretrain.config import PretrainConfig
from dags.assets import RELEASE, SEQUENCES
from dags.launcher import Ref, component_task, form, freshet_dag, from_form, result

FORM = form(PretrainConfig, "Model", exclude=["model"])
SECTIONS = {
    "Data": ("dataset", "learn_eval", "device", "threads", "save_every_s"),
    "Learning": (
        *("epochs", "batch_tokens", "dense_lr", "table_lr", "bias_lr", "warmup", "final_lr", "weight_decay"),
        *("clip_norm", "dropout", "input_dropout", "seed"),
    ),
    "Continual training": ("continual_batch_tokens", "continual_dense_lr", "continual_table_lr", "continual_bias_lr"),
}
for section, names in SECTIONS.items():
    for name in names:
        FORM[name].schema["section"] = section
ROLL_OUT = {
    "roll_out": Param(True, type="boolean", section="Rollout", description="start the rollout of the new release")
}


def newest_dataset(inlet_events: Any, dag_run: Any) -> str | None:
    """The dataset id of the newest event of the asset `sequences` when the run was due.

    Both models learn from it, and a task that runs again goes on with it, whatever is built meanwhile.
    """
    events = [event for event in inlet_events[SEQUENCES] if event.timestamp <= dag_run.run_after]
    return events[-1].extra.get("dataset") if events else None


class StartRollout(TriggerDagRunOperator):
    """Triggers the rollout of the release, unless the form says not to."""

    def execute(self, context: Context) -> None:
        if not context["params"]["roll_out"]:
            raise AirflowSkipException("the form says not to roll out; trigger the DAG rollout when it shall go out")
        self.conf = context["ti"].xcom_pull(task_ids="release")
        super().execute(context)


with freshet_dag(
    "pretrain",
    schedule=None,
    tags=["training", "gpu"],
    doc_md=__doc__,
    params={**{name: FORM[name] for names in SECTIONS.values() for name in names}, **FORM, **ROLL_OUT},
    macros={"newest_dataset": newest_dataset},
) as dag:

    @task(outlets=[RELEASE])
    def release() -> dict[str, int]:
        """The versions that were published, as one release."""
        context = get_current_context()
        pulled = {model: context["ti"].xcom_pull(task_ids=f"publish_{model}") for model in ("ranker", "retriever")}
        versions: dict[str, int] = {model: found["version"] for model, found in pulled.items()}
        context["outlet_events"][RELEASE].extra = dict(versions)
        return versions

    released = release()
    dataset = Ref("params.dataset or newest_dataset(inlet_events, dag_run)")
    for model in ("ranker", "retriever"):
        pretrain = component_task(
            f"pretrain_{model}",
            "pretrain",
            {**from_form(FORM), "model": model, "dataset": dataset},
            gpu=True,
            inlets=[SEQUENCES],
        )
        checkpoint = result(f"pretrain_{model}", "checkpoint")
        register = component_task(f"register_{model}", "register", {"model": model, "checkpoint": checkpoint})
        version = result(f"register_{model}", "version")
        publish = component_task(f"publish_{model}", "publish", {"model": model, "version": version})
        pretrain >> register >> publish >> released
    released >> StartRollout(
        task_id="roll_out",
        trigger_dag_id="rollout",
        trigger_run_id="release__{{ run_id }}",
        skip_when_already_exists=True,
    )
