"""## Rollout

Takes a release, a ranker and a retriever, to the users in stages: gate -> shadow -> canary -> promoted.

* **gate**: offline metrics within absolute limits, and not worse than the champion's; then, if asked for, a person's
  approval.
* **shadow**: the challenger scores real requests unseen; it must not fail on them.
* **canary**: it serves a rising share of the users. Errors, empty results, latency, or a click rate that falls roll it
  back at once; missing data or a sample ratio that cannot be chance pause it.
* **promoted**: it serves everybody; the alias `champion` points to it.

A task ends when its stage is passed, and fails when the release is rejected or rolled back. A **paused** rollout
waits: the task's log says why. Give orders from a command line, from any stage:

    python -m components.rollout --action=abort      (or approve, pause, resume, promote)

The numbers of the form are fixed when a rollout starts. Every decision is a file in `serving/rollout/`.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import chain

from components.rollout.config import RolloutConfig
from dags.assets import RELEASE, SERVING
from dags.launcher import Ref, component_task, form, freshet_dag, from_form, result

SET_BY_TASKS = ("action", "until", "by")
FORM = form(RolloutConfig, "Rules", exclude=SET_BY_TASKS)
for name in ("ranker", "retriever", "server_url", "reason", "poll_s", "wait_s"):
    FORM[name].schema["section"] = "Release"
FORM = dict(sorted(FORM.items(), key=lambda field: field[1].schema["section"] != "Release"))
BY = Ref("dag_run.run_id")

with freshet_dag(
    "rollout",
    schedule=None,
    tags=["rollout", "serving"],
    doc_md=__doc__,
    params=FORM,
    default_args={"execution_timeout": timedelta(days=14)},
) as dag:
    stages = [
        component_task(
            "gate", "rollout", {**from_form(FORM), "action": "start", "until": "gate", "by": BY}, inlets=[RELEASE]
        )
    ]
    for stage in ("shadow", "canary", "promoted"):
        waits = {
            "action": "advance",
            "until": stage,
            "ranker": result("gate", "subject", "ranker"),
            "retriever": result("gate", "subject", "retriever"),
            "by": BY,
            **from_form({name: FORM[name] for name in ("server_url", "poll_s", "wait_s")}),
        }
        stages.append(component_task(stage, "rollout", waits, outlets=[SERVING] if stage == "promoted" else []))
    chain(*stages)
