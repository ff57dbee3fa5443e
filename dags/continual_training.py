"""## Continual training

One run for each window: its events are joined, become sequences, and each live version learns from them once. What
changed is published as the next delta of the version's parameter log, which the server applies in place.

* The window is the run's **partition key**: a window key like `20220501T000000Z-20220502T000000Z`, or just its start,
  with the length from the form. A run without a partition key takes the form's **Window**.
* Before a version learns from a window, it is measured on it (prequential), beside the version as it was pretrained.
* Champion and, during a rollout, challenger learn, each on its own log. One that lacks earlier windows, because it was
  pretrained meanwhile or comes back by a rollback, learns from those first.
* Windows are learned from in order and once each. After a failed run the DAG pauses itself, because later windows
  would shut the failed one out: repair the cause, clear the failed run, unpause. A run that waits already when another
  fails is started all the same: trigger a window after the one before it has succeeded.

`FRESHET_CONTINUAL_CRON`, e.g. `0 * * * *`, runs it on a schedule: each tick takes the window from the tick before
and joins it once its actions had the **attribution window** to arrive. The first window begins at
`FRESHET_CONTINUAL_START`, up to which the past is joined. Ticks that pass while the DAG is paused are made up for, in
order; a window in which nothing happened is passed.

Airflow runs the windows of a **backfill** side by side and beside the schedule, and a window is refused once a later
one is learned from: create it with `--max-active-runs=1`, not backwards, for windows that come after all learned ones.
"""

from __future__ import annotations

from airflow.sdk import Param

from components.compact.config import CompactConfig
from components.finetune.config import FinetuneConfig
from components.join.config import JoinConfig
from components.sequences.config import SequencesConfig
from dags.assets import EVENTS, INTERACTIONS, PARAMETERS, WINDOWS
from dags.launcher import Ref, component_task, form, freshet_dag, from_form, result
from dags.windows import by_schedule, ready_at, schedule, window_of

MODELS = ("ranker", "retriever")
WINDOW = {
    "window": Param(
        "", type=["string", "null"], section="Window", description="window key, for runs without a partition key"
    ),
    "window_hours": Param(
        1.0, type="number", exclusiveMinimum=0, maximum=8784, section="Window", description="length of a window (hours)"
    ),
}
JOIN_FORM = form(JoinConfig, "Join", exclude=["window"])
SEQUENCES_FORM = form(SequencesConfig, "Sequences", exclude=["mode", "window", "split", "end"])
FINETUNE_FORM = form(FinetuneConfig, "Learning", exclude=["model", "version", "dataset"])
COMPACT_FORM = form(CompactConfig, "Compaction", exclude=["model", "version"])

with freshet_dag(
    "continual_training",
    **schedule(),
    tags=["training", "gpu", "spark"],
    doc_md=__doc__,
    max_consecutive_failed_dag_runs=1,
    params={**WINDOW, **FINETUNE_FORM, **SEQUENCES_FORM, **JOIN_FORM, **COMPACT_FORM},
    macros={"window_of": window_of, "ready_at": ready_at, "by_schedule": by_schedule},
) as dag:
    window = Ref("window_of(dag_run, params)")
    join = component_task(
        "join",
        "join",
        {"window": window, **from_form(JOIN_FORM), "allow_empty": Ref("params.allow_empty or by_schedule(dag_run)")},
        not_before="{{ ready_at(dag_run, params) }}",
        inlets=[EVENTS],
        outlets=[INTERACTIONS],
    )
    sequences = component_task(
        "sequences",
        "sequences",
        {"mode": "window", "window": window, **from_form(SEQUENCES_FORM)},
        inlets=[INTERACTIONS],
        outlets=[WINDOWS],
    )
    versions = component_task("versions", "rollout", {"action": "status", "server_url": "none"})
    join >> [sequences, versions]  # as they are when the join has waited, not before
    for model in MODELS:
        for arm, name in (("champion", f"finetune_{model}"), ("challenger", f"finetune_challenger_{model}")):
            version = Ref(f"(ti.xcom_pull(task_ids='versions')['{arm}'] or {{}}).get('{model}')")
            learn = component_task(
                name,
                "finetune",
                {
                    **from_form(FINETUNE_FORM),
                    "model": model,
                    "version": version,
                    "dataset": result("sequences", "dataset"),
                },
                gpu=True,
                skip_unless="True" if arm == "champion" else f"{{{{ {version} }}}}",
                inlets=[WINDOWS],
                outlets=[PARAMETERS],
            )
            [sequences, versions] >> learn
            if arm == "champion":
                learn >> component_task(
                    f"compact_{model}",
                    "compact",
                    {**from_form(COMPACT_FORM), "model": model, "version": result(name, "version")},
                    skip_unless=f"{{{{ {result(name, 'since_snapshot')} >= params.min_deltas }}}}",
                )
