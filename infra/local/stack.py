"""What a local Freshet consists of: MLflow, Spark, Airflow and the server, all bound to 127.0.0.1."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from components.errors import BadInput, FreshetError
from infra.local.services import Service, free_port

REPOSITORY = Path(__file__).resolve().parents[2]
PORTS = {"airflow": 8080, "mlflow": 5000, "serve": 8000, "spark": 15002}


def _home() -> Path:
    return Path(os.environ.get("FRESHET_HOME") or REPOSITORY / ".freshet").absolute()


def _ports() -> dict[str, int]:
    return {name: _port(f"FRESHET_PORT_{name.upper()}", port) for name, port in PORTS.items()}


def _port(setting: str, default: int) -> int:
    text = os.environ.get(setting) or str(default)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise BadInput(f"{setting} is {text!r}; set it to a port number from 1 to 65535")
    return int(text)


@dataclass(frozen=True)
class Stack:
    """One local installation: a home folder and a port for each server."""

    home: Path
    ports: dict[str, int]

    @classmethod
    def default(cls) -> Stack:
        """The installation of this checkout; $FRESHET_HOME and $FRESHET_PORT_<NAME> move it."""
        return cls(_home() / "local", _ports())

    @classmethod
    def demo(cls) -> Stack:
        """The demo's installation: its home is emptied whenever the demo starts."""
        return cls(_home() / "demo", _ports())

    @classmethod
    def isolated(cls, home: Path) -> Stack:
        """An installation beside others, on free ports: for tests."""
        return cls(home, {name: free_port() for name in PORTS})

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    @property
    def root(self) -> str:
        return f"file://{self.home}/store"

    @property
    def environment(self) -> dict[str, str]:
        """What every process of the installation sees: where things are, and Airflow's settings."""
        return {
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            "FRESHET_ROOT": self.root,
            "FRESHET_SPARK": f"sc://127.0.0.1:{self.ports['spark']}",
            "FRESHET_SERVER_URL": self.url("serve"),
            "FRESHET_LAUNCHER": "local",
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # six idle processes for features that are not used here
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "GIT_PYTHON_REFRESH": "quiet",
            **self._airflow_settings(),
        }

    def process_environment(self) -> dict[str, str]:
        """The whole environment for a child process."""
        return {**os.environ, **self.environment}

    def services(self) -> list[Service]:
        """All of them, in the order to start them; the scheduler comes last, when the others answer.

        It takes up open runs at once, and a task that cannot reach Airflow's API server fails.
        """
        airflow = [sys.executable, "-m", "airflow"]
        return [
            self._service("mlflow", self._mlflow(), "/health"),
            self._service("spark", [sys.executable, "-m", "spark_jobs.server", "--port", str(self.ports["spark"])]),
            self._service("airflow", [*airflow, "api-server"], "/api/v2/monitor/health"),
            self._service("airflow-dag-processor", [*airflow, "dag-processor"]),
            self._service("airflow-triggerer", [*airflow, "triggerer", "--skip-serve-logs"]),
            self._service(
                "serve", [sys.executable, "-m", "components.serve", f"--port={self.ports['serve']}"], "/livez"
            ),
            self._service("airflow-scheduler", [*airflow, "scheduler", "--skip-serve-logs"]),
        ]

    def _service(self, name: str, command: list[str], ready: str | None = None) -> Service:
        port = self.ports.get(name)
        return Service(
            name=name,
            command=command,
            environment=self.environment,
            port=port,
            ready_url=f"{self.url(name)}{ready}" if ready else None,
            folder=REPOSITORY,
        )

    def _mlflow(self) -> list[str]:
        folder = self.home / "mlflow"
        return [
            *(sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.ports['mlflow']}"),
            *(f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts"),
            "--workers=1",
        ]

    def _airflow_settings(self) -> dict[str, str]:
        home = self.home / "airflow"
        return {
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",  # bound to 127.0.0.1: the laptop is the user
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url('airflow')}/execution/",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
            "AIRFLOW__CORE__PARALLELISM": "4",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(self.ports["airflow"]),
            "AIRFLOW__API__BASE_URL": self.url("airflow"),
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API__SECRET_KEY": self._secret("api"),
            "AIRFLOW__API_AUTH__JWT_SECRET": self._secret("jwt"),
            "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",  # seconds that every task waits for the scheduler
            "AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK": "False",  # its health server would listen on all addresses
            "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
        }

    def prepare(self) -> None:
        """Create the folders and migrate Airflow's database; quick when both are there, of this Airflow."""
        for folder in ("store", "mlflow", "airflow", "run", "logs"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        migrated, airflow = self.home / "airflow" / "migrated", version("apache-airflow")
        if not migrated.exists() or migrated.read_text() != airflow:
            command = [sys.executable, "-m", "airflow", "db", "migrate"]
            done = subprocess.run(command, env=self.process_environment(), capture_output=True, text=True, check=False)
            if done.returncode:
                raise FreshetError(f"`airflow db migrate` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            migrated.write_text(airflow)

    def _secret(self, name: str) -> str:
        """A random secret of this installation, made once and readable by its owner only."""
        path = self.home / "secrets" / name
        if not path.exists() or not path.read_text():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
        return path.read_text()
