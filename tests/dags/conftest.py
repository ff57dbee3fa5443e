"""What the DAG files look like to Airflow, read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dags.airflow_process import call

DESCRIBE = """
import sys, time
from airflow.dag_processing.dagbag import DagBag
before = set(sys.modules)
start = time.process_time()
bag = DagBag()
seconds = time.process_time() - start
from airflow.serialization.serialized_objects import DagSerialization
answer({
    "errors": {str(k): v for k, v in bag.import_errors.items()},
    "warnings": [str(w) for s in bag.dagbag_stats for w in (s.warning_num,) if w],
    "seconds": seconds,
    "files": len(bag.dagbag_stats),
    "imported": sorted({m.split(".")[0] for m in set(sys.modules) - before}),
    "dags": {
        dag.dag_id: {
            "owner": dag.owner, "tags": sorted(dag.tags), "doc": dag.doc_md or "", "catchup": dag.catchup,
            "max_active_runs": dag.max_active_runs, "timetable": type(dag.timetable).__name__,
            "max_failed": dag.max_consecutive_failed_dag_runs,
            "params": {n: {"value": p.value, "description": p.description, **p.schema}
                       for n, p in ((n, dag.params.get_param(n)) for n in dag.params)},
            "tasks": {
                task.task_id: {
                    "downstream": sorted(task.downstream_task_ids), "retries": task.retries,
                    "retry_delay": task.retry_delay.total_seconds(), "owner": task.owner,
                    "timeout": task.execution_timeout and task.execution_timeout.total_seconds(),
                    "pool": task.pool, "outlets": [a.name for a in task.outlets],
                    "inlets": [a.name for a in task.inlets], "flags": getattr(task, "flags", []),
                    "step": getattr(task, "step", None), "kind": type(task).__name__,
                } for task in dag.tasks
            },
            "serialized": bool(DagSerialization.serialize_dag(dag)),
        } for dag in bag.dags.values()
    },
})
"""


@pytest.fixture(scope="session")
def airflow_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("airflow")


@pytest.fixture(scope="session")
def bag(airflow_home: Path) -> dict[str, Any]:
    """All DAGs as plain data, and what it cost to parse them."""
    found: dict[str, Any] = call(airflow_home, DESCRIBE)
    return found
