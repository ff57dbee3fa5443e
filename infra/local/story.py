"""What both demos share: DAG runs with progress, continual windows, and the table that tells the story."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import httpx
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from components.config import to_arguments
from components.errors import FreshetError
from components.windows import Window
from infra.local.airflow import Airflow, DagRun
from infra.local.stack import REPOSITORY, Stack

DAG_TIMEOUT_S = 900
ONE_THREAD = {"threads": 1}
"""Ranker and retriever learn side by side, one core each: more threads than cores only wait for each other."""


class WindowStory(BaseModel):
    """One line of the table: what one window did to the champion's ranker."""

    window: str
    note: str = ""
    events: int
    version: int
    auc: float
    frozen_auc: float
    ne: float
    frozen_ne: float
    delta: int
    rows: int
    served_delta: int
    served_event_age_s: float


class Story:
    """Drives one installation as a person would: through Airflow's API, the components' command lines and HTTP."""

    def __init__(self, stack: Stack, airflow: Airflow, console: Console) -> None:
        self.stack, self.airflow, self.console = stack, airflow, console
        self.began = time.monotonic()
        self.windows: list[WindowStory] = []

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        self.console.print(f"[dim]{minutes:02d}:{seconds:02d}[/dim] {text}")

    def component(self, step: str, **values: Any) -> subprocess.Popen[str]:
        """Start a component's command line in the background."""
        return subprocess.Popen(
            [sys.executable, "-m", f"components.{step}", *to_arguments(values)],
            env=self.stack.process_environment(),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=(self.stack.home / "logs" / f"{step}.log").open("a"),
            text=True,
        )

    def finish(self, step: str, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Wait for a component; its result, or FreshetError with what it said."""
        output, _ = process.communicate()
        if process.returncode:
            log = (self.stack.home / "logs" / f"{step}.log").read_text(errors="replace")
            raise FreshetError(f"components.{step} ended with exit code {process.returncode}:\n{log[-3000:]}")
        result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        return result

    def run_component(self, step: str, **values: Any) -> dict[str, Any]:
        with self.console.status(f"{step} …"):
            return self.finish(step, self.component(step, **values))

    def wait(self, run: DagRun, doing: str) -> None:
        """Wait for a DAG run, showing which task is at work."""
        started = time.monotonic()
        with self.console.status(doing) as status:

            def tick() -> None:
                tasks = [task for task, state in self.airflow.task_states(run).items() if state == "running"]
                status.update(f"{doing}: {', '.join(tasks) or 'waiting'}")

            self.airflow.wait(run, DAG_TIMEOUT_S, tick)
        self.say(f"{doing} [green]done[/green] in {time.monotonic() - started:.0f} s")

    def run_dag(self, dag_id: str, conf: dict[str, Any], doing: str) -> DagRun:
        run = self.airflow.trigger(dag_id, conf)
        self.wait(run, doing)
        return run

    def train_window(self, window: Window, conf: dict[str, Any], doing: str, note: str = "") -> DagRun:
        """One continual training run, and its line of the table once the server has the delta."""
        run = self.airflow.trigger("continual_training", conf, partition_key=window.key)
        self.wait(run, doing)
        learned = self.airflow.result(run, "finetune_ranker")
        served = self.wait_until_served(learned["version"], learned["n"])
        metrics = learned["metrics"]
        self.windows.append(
            WindowStory(
                window=f"{window.start:%m-%d %H:%M}",
                note=note,
                events=self.airflow.result(run, "join")["counts"]["interactions"],
                version=learned["version"],
                auc=metrics["auc_click"],
                frozen_auc=metrics["frozen_auc_click"],
                ne=metrics["ne_click"],
                frozen_ne=metrics["frozen_ne_click"],
                delta=learned["n"],
                rows=sum(learned["rows"].values()),
                served_delta=served["delta"],
                served_event_age_s=served["served_event_age_s"],
            )
        )
        return run

    def wait_until_served(self, version: int, delta: int, timeout: float = 60.0) -> dict[str, Any]:
        """Wait until the server has applied `delta` of the ranker `version`; its part of /v1/status."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for track in self.server_status()["tracks"].values():
                ranker: dict[str, Any] = track["ranker"]
                if ranker["version"] == version and ranker["delta"] >= delta:
                    return ranker
            time.sleep(0.5)
        raise FreshetError(f"the server has not applied delta {delta} of ranker {version} after {timeout:.0f} s")

    def server_status(self) -> Any:
        return httpx.get(f"{self.stack.url('serve')}/v1/status", timeout=30).raise_for_status().json()

    def wait_until_ready(self, timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        with self.console.status("the server loads the first release"):
            while httpx.get(f"{self.stack.url('serve')}/readyz", timeout=30).status_code != 200:
                if time.monotonic() > deadline:
                    raise FreshetError(f"the server is not ready after {timeout:.0f} s: {self.server_status()}")
                time.sleep(0.5)

    def check_all_runs_succeeded(self) -> None:
        """FreshetError naming every DAG run that is not a success."""
        bad = [f"{r['dag_id']} {r['dag_run_id']}: {r['state']}" for r in self.airflow.runs() if r["state"] != "success"]
        if bad:
            raise FreshetError("these DAG runs did not succeed:\n" + "\n".join(bad))

    def table(self, title: str) -> Table:
        """The story, one row a window; AUC and NE are taken before the window is learned from."""
        table = Table(title=title, title_justify="left")
        for name in ("window", "events", "AUC frozen", "AUC continual", "NE frozen", "NE continual"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in ("version", "delta", "rows synced", "event age", ""):
            table.add_column(name, justify="right")
        for w in self.windows:
            table.add_row(
                *(w.window, f"{w.events:,}", f"{w.frozen_auc:.3f}", f"{w.auc:.3f}", f"{w.frozen_ne:.3f}"),
                *(f"{w.ne:.3f}", str(w.version), str(w.delta), f"{w.rows:,}"),
                *(_age(w.served_event_age_s), w.note),
            )
        return table

    def save(self, name: str, **facts: Any) -> None:
        """Keep the story as JSON beside the logs, for documents and tests."""
        content = {"windows": [window.model_dump() for window in self.windows], **facts}
        (self.stack.home / f"{name}.json").write_text(json.dumps(content, indent=1, default=str))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def whole_second() -> datetime:
    """The current second; windows have whole seconds as bounds."""
    return datetime.now(UTC).replace(microsecond=0)


def _age(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 86400:.0f} d"
