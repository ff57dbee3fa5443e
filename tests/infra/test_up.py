"""`make up` starts things in an order in which nothing fails, and leaves alone what a person has set."""

from __future__ import annotations

import io
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from components.errors import FreshetError
from infra.local import up
from infra.local.airflow import Airflow
from infra.local.services import Service, Supervisor
from infra.local.stack import Stack


def dags(names: Iterable[str], read_at: datetime) -> list[dict[str, str]]:
    return [{"dag_id": name, "last_parsed_time": read_at.isoformat()} for name in names]


@pytest.fixture
def running() -> set[str]:
    """Services that run before `make up`."""
    return set()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, running: set[str]) -> list[str]:
    """What one `make up` did and said beside an Airflow that knows all DAGs and the pool."""
    happened: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        happened.append(f"{request.method} {request.url.path}")
        return httpx.Response(200, json={"access_token": "t", "dags": dags(up.DAGS, datetime.now(UTC))})

    def connect(airflow: Airflow, url: str) -> None:
        airflow.url, airflow.http = url, httpx.Client(base_url=url, transport=httpx.MockTransport(answer))

    def wait_ready(_: Supervisor, service: Service, timeout: float) -> None:
        happened.append(f"{service.name} answers")

    def start(_: Supervisor, service: Service) -> bool:
        happened.append(f"start {service.name}")
        return service.name not in running

    monkeypatch.setattr(Stack, "prepare", lambda stack: None)
    monkeypatch.setattr(Supervisor, "start", start)
    monkeypatch.setattr(Supervisor, "wait_ready", wait_ready)
    monkeypatch.setattr(Airflow, "__init__", connect)
    said = io.StringIO()
    up.start(Stack.isolated(tmp_path), Console(file=said, width=200))
    return [*happened, *said.getvalue().splitlines()]


def test_a_paused_dag_stays_paused_and_the_pool_keeps_its_size(events: list[str]) -> None:
    """`continual_training` pauses itself after a failed run; nobody but a person may let the next window in."""
    requests = [event for event in events if "/" in event]
    assert "GET /api/v2/dags" in requests and "GET /api/v2/pools/gpu" in requests
    assert all(request.startswith("GET ") for request in requests)


def test_the_scheduler_starts_when_what_its_tasks_need_answers(events: list[str]) -> None:
    """Runs that were open at `make down` go on at once; a task without Airflow's API server would fail."""
    begin = events.index("start airflow-scheduler")
    assert {"airflow answers", "mlflow answers", "spark answers", "serve answers"} <= set(events[:begin])


@pytest.mark.parametrize("running", [set(), {"serve", "airflow-scheduler"}])
def test_what_ran_before_is_named_since_it_keeps_its_code(events: list[str], running: set[str]) -> None:
    said = [event for event in events if "make down" in event]
    assert len(said) == (1 if running else 0)
    assert not running or said[0].startswith("serve, airflow-scheduler ran already")


NOW = datetime(2026, 3, 1, 10, tzinfo=UTC)
BEFORE, AFTER = NOW - timedelta(hours=1), NOW + timedelta(seconds=3)


def wait_for_dags(monkeypatch: pytest.MonkeyPatch, answers: list[tuple[list[Any], list[Any]]]) -> None:
    """Wait, from NOW on, for the DAGs pretrain and rollout; answers: DAGs and import errors at each look."""
    looks = [{"dags": found, "import_errors": errors} for found, errors in answers for _ in ("dags", "importErrors")]

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=looks.pop(0))

    airflow = Airflow("http://airflow")
    airflow.http = httpx.Client(base_url=airflow.url, transport=httpx.MockTransport(answer))
    monkeypatch.setattr("infra.local.airflow.time.sleep", lambda _: None)
    airflow.wait_for_dags({"pretrain", "rollout"}, since=NOW, timeout=60)


def test_a_dag_that_airflow_knows_from_before_is_waited_for_until_its_file_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was broken while Airflow was down: its database has the old one."""
    broken = {"timestamp": AFTER.isoformat(), "stack_trace": "SyntaxError in rollout.py"}
    known = dags(["pretrain", "rollout"], BEFORE)
    with pytest.raises(FreshetError, match=r"does not load: SyntaxError in rollout\.py"):
        wait_for_dags(monkeypatch, [(known, []), (dags(["pretrain"], AFTER), [broken])])


def test_an_import_error_from_before_is_not_shown_for_a_file_that_was_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"timestamp": BEFORE.isoformat(), "stack_trace": "SyntaxError in rollout.py"}
    one, both = (dags(names, AFTER) for names in (["pretrain"], ["pretrain", "rollout"]))
    wait_for_dags(monkeypatch, [(one, [old]), (both, [])])
