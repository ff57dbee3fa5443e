"""Start a local Freshet and keep it up: `python -m infra.local.up` (what `make up` runs)."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

from rich.console import Console

from components.errors import FreshetError
from infra.local.airflow import Airflow
from infra.local.services import Supervisor
from infra.local.stack import Stack

DAGS = {"build_sequences", "pretrain", "continual_training", "rollout"}
GPU_POOL_SLOTS = 2  # on a laptop the pool stands for cores: ranker and retriever train side by side


def start(stack: Stack, console: Console) -> Airflow:
    """Start every service, wait until all answer and the DAGs are read; the client of the running Airflow."""
    supervisor, began = Supervisor(stack.home), datetime.now(UTC)
    with console.status("preparing folders and Airflow's database") as status:
        stack.prepare()
        *others, scheduler = stack.services()
        ran = [service.name for service in others if not supervisor.start(service)]
        for service in others:
            status.update(f"starting {service.name} (log: {supervisor.log(service.name)})")
            supervisor.wait_ready(service, timeout=180)
        ran += [scheduler.name] if not supervisor.start(scheduler) else []
        airflow = Airflow(stack.url("airflow"))
        airflow.login()
        airflow.ensure_pool("gpu", GPU_POOL_SLOTS)
        status.update("Airflow reads the DAGs")
        airflow.wait_for_dags(DAGS, since=began, timeout=120)
    if ran:
        console.print(f"{', '.join(ran)} ran already, with the code of then; after a change of it: make down, make up")
    return airflow


def addresses(stack: Stack) -> str:
    """Where to look, one line each."""
    return "\n".join(
        (
            f"  Airflow  {stack.url('airflow')}   DAGs, runs, trigger forms",
            f"  MLflow   {stack.url('mlflow')}   runs, curves, registered versions",
            f"  server   {stack.url('serve')}/docs   recommend, rank, events; /v1/status, /metrics",
            f"  files    {stack.home}   (logs in {stack.home}/logs)",
        )
    )


def main() -> int:
    console = Console(stderr=True)
    try:
        stack = Stack.default()
        start(stack, console)
    except FreshetError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    print(f"Freshet is up; stop it with `make down`\n{addresses(stack)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
