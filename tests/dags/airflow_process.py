"""Runs Python against Airflow in a process and a home of its own, so that tests and Airflow do not see each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 500


def environment(home: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """A clean environment: nothing of a running installation's settings gets in."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "FRESHET_", "MLFLOW_"))}
    return {
        **clean,
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "AIRFLOW__DAG_PROCESSOR__DAG_VERSION_INFLATION_CHECK_LEVEL": "error",
        "PYTHONPATH": str(ROOT),
        "FRESHET_ROOT": f"file://{home}/store",
        "MLFLOW_TRACKING_URI": "none",
        **settings,
    }


def call(home: Path, source: str, settings: Mapping[str, str] | None = None) -> Any:
    """Run `source`, which ends by calling `answer(value)`, and return that value (JSON); `settings`: environment."""
    path = home / "answer.json"
    path.unlink(missing_ok=True)
    prelude = f"import json\ndef answer(value): open({str(path)!r}, 'w').write(json.dumps(value))\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + source],
        cwd=ROOT,
        env=environment(home, settings or {}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(path.read_text())
