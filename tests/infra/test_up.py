"""`make up` starts things in an order in which nothing fails, and leaves alone what a person has set."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from rich.console import Console

from infra.local import up
from infra.local.airflow import Airflow
from infra.local.services import Service, Supervisor
from infra.local.stack import Stack


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What one `make up` did beside an Airflow that knows all DAGs and the pool: requests and services."""
    happened: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        happened.append(f"{request.method} {request.url.path}")
        return httpx.Response(200, json={"access_token": "t", "dags": [{"dag_id": name} for name in up.DAGS]})

    def connect(airflow: Airflow, url: str) -> None:
        airflow.url, airflow.http = url, httpx.Client(base_url=url, transport=httpx.MockTransport(answer))

    def wait_ready(_: Supervisor, service: Service, timeout: float) -> None:
        happened.append(f"{service.name} answers")

    monkeypatch.setattr(Stack, "prepare", lambda stack: None)
    monkeypatch.setattr(Supervisor, "start", lambda _, service: happened.append(f"start {service.name}"))
    monkeypatch.setattr(Supervisor, "wait_ready", wait_ready)
    monkeypatch.setattr(Airflow, "__init__", connect)
    up.start(Stack.isolated(tmp_path), Console(quiet=True))
    return happened


def test_a_paused_dag_stays_paused_and_the_pool_keeps_its_size(events: list[str]) -> None:
    """`continual_training` pauses itself after a failed run; nobody but a person may let the next window in."""
    requests = [event for event in events if "/" in event]
    assert "GET /api/v2/dags" in requests and "GET /api/v2/pools/gpu" in requests
    assert all(request.startswith("GET ") for request in requests)


def test_the_scheduler_starts_when_what_its_tasks_need_answers(events: list[str]) -> None:
    """Runs that were open at `make down` go on at once; a task without Airflow's API server would fail."""
    begin = events.index("start airflow-scheduler")
    assert {"airflow answers", "mlflow answers", "spark answers", "serve answers"} <= set(events[:begin])
