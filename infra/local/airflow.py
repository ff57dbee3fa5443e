"""Airflow's REST API as a person uses it: trigger a run, watch it, read what its tasks returned."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import httpx
from pydantic import BaseModel

from components.errors import BadInput, FreshetError

FINISHED = ("success", "failed")


class DagRun(BaseModel):
    """One run, by its DAG and run id."""

    dag_id: str
    run_id: str


class Airflow:
    """A client of one Airflow API server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=60.0, transport=httpx.HTTPTransport(retries=3))

    def login(self) -> None:
        """Fetch a token; the local installation hands one to everybody on this machine."""
        token = self._checked(self.http.get("/auth/token"))["access_token"]
        self.http.headers["Authorization"] = f"Bearer {token}"

    def wait_for_dags(self, dag_ids: set[str], since: datetime, timeout: float) -> None:
        """Wait until the DAG processor has read all `dag_ids` since then; FreshetError shows what does not load.

        What its database holds from before says nothing of the files as they are now: neither a DAG nor an error.
        """
        deadline = time.monotonic() + timeout
        while missing := dag_ids - self._read_since(since):
            for error in self.get("/importErrors")["import_errors"]:
                if datetime.fromisoformat(error["timestamp"]) >= since:
                    raise FreshetError(f"a DAG file does not load: {error['stack_trace']}")
            if time.monotonic() > deadline:
                raise FreshetError(f"Airflow has not read {', '.join(sorted(missing))} in {timeout:.0f} s")
            time.sleep(1)

    def _read_since(self, since: datetime) -> set[str]:
        dags = self.get("/dags", limit=100)["dags"]
        return {dag["dag_id"] for dag in dags if datetime.fromisoformat(dag["last_parsed_time"]) >= since}

    def ensure_pool(self, name: str, slots: int) -> None:
        """Create a pool if absent; deferred tasks keep their slot, so that a GPU is never promised twice."""
        pool = {"name": name, "slots": slots, "include_deferred": True, "description": "training"}
        if self.http.get(f"/api/v2/pools/{name}").status_code == 404:
            self._checked(self.http.post("/api/v2/pools", json=pool))

    def trigger(self, dag_id: str, conf: dict[str, Any], partition_key: str | None = None) -> DagRun:
        """Start a run; `partition_key` is the window key of a continual training run."""
        body = {
            "dag_run_id": f"{partition_key or dag_id}-{secrets.token_hex(3)}",  # Airflow's own ids need quoting in URLs
            "logical_date": None,
            "conf": conf,
            "partition_key": partition_key,
        }
        run = self._checked(self.http.post(f"/api/v2/dags/{dag_id}/dagRuns", json=body))
        return DagRun(dag_id=dag_id, run_id=run["dag_run_id"])

    def state(self, run: DagRun) -> str:
        state: str = self.get(f"/dags/{run.dag_id}/dagRuns/{run.run_id}")["state"]
        return state

    def task_states(self, run: DagRun) -> dict[str, str | None]:
        found = self.get(f"/dags/{run.dag_id}/dagRuns/{run.run_id}/taskInstances")["task_instances"]
        return {task["task_id"]: task["state"] for task in found}

    def wait(self, run: DagRun, timeout: float, tick: Callable[[], None] = lambda: None) -> None:
        """Wait for success; FreshetError with the failed task's log otherwise."""
        deadline = time.monotonic() + timeout
        while (state := self.state(run)) not in FINISHED:
            if time.monotonic() > deadline:
                raise FreshetError(f"{run.dag_id} is still {state} after {timeout:.0f} s: {self.task_states(run)}")
            tick()
            time.sleep(2)  # each look costs the API server a tenth of a second of CPU
        if state == "failed":
            raise FreshetError(f"{run.dag_id} failed ({self.page(run)})\n{self._failures(run)}")

    def result(self, run: DagRun, task_id: str) -> Any:
        """What a task returned (its XCom)."""
        path = f"/dags/{run.dag_id}/dagRuns/{run.run_id}/taskInstances/{task_id}/xcomEntries/return_value"
        return self.get(path, deserialize=True)["value"]

    def runs(self) -> list[dict[str, Any]]:
        """All runs of all DAGs, newest first."""
        runs: list[dict[str, Any]] = self.get("/dags/~/dagRuns", limit=100, order_by="-run_after")["dag_runs"]
        return runs

    def page(self, run: DagRun) -> str:
        return f"{self.url}/dags/{run.dag_id}/runs/{run.run_id}"

    def get(self, path: str, **query: Any) -> Any:
        return self._checked(self.http.get(f"/api/v2{path}", params=query))

    def _failures(self, run: DagRun) -> str:
        failed = [task for task, state in self.task_states(run).items() if state == "failed"]
        return "\n".join(f"-- {task}:\n{self._log(run, task)}" for task in failed)

    def _log(self, run: DagRun, task_id: str, lines: int = 25) -> str:
        path = f"/dags/{run.dag_id}/dagRuns/{run.run_id}/taskInstances/{task_id}"
        attempt = self.get(path)["try_number"]
        content = self.get(f"{path}/logs/{attempt}", full_content=True)["content"]
        events = [line if isinstance(line, str) else str(line.get("event", line)) for line in content]
        return "\n".join(events[-lines:])

    def _checked(self, response: httpx.Response) -> Any:
        if response.status_code in (401, 403):
            raise BadInput(f"Airflow at {self.url} refuses the login: {response.text}")
        if response.is_error:
            raise FreshetError(f"{response.request.method} {response.url}: {response.status_code} {response.text}")
        return response.json()
