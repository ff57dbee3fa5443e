"""Runs a component as an Airflow task: as a local process or as a Kubernetes pod, by one setting.

    FRESHET_LAUNCHER=local        python -m components.<step> --flags as a subprocess of the task (default)
    FRESHET_LAUNCHER=kubernetes   the same command in a pod of the image $FRESHET_IMAGE

Either way the command line is the whole interface: flags in (visible as rendered arguments in the UI), one JSON
result out, which becomes the task's XCom and the extra of its asset events. Exit code 2 means that the input is wrong:
the task fails without a retry. Anything else is retried, and finished steps are not done twice.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, BaseOperator, Context, Param
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from airflow.sdk.execution_time.context import context_to_airflow_vars
from jinja2 import StrictUndefined

from components.config import StepConfig, form_fields, to_arguments
from components.windows import parse_time

ROOT = Path(__file__).resolve().parent.parent
WRONG_INPUT = 2
_FALSE = ("", "0", "False", "None")
_GRACE_S = 20
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class Ref(str):
    """A Jinja expression whose value, at run time, becomes a flag; None leaves the flag out."""


def param(name: str) -> Ref:
    """The value of a field of the trigger form."""
    return Ref(f"params.{name}")


def result(task_id: str, *path: str) -> Ref:
    """A field of the result of an earlier task."""
    return Ref(f"ti.xcom_pull(task_ids='{task_id}')" + "".join(f"['{key}']" for key in path))


def flag(value: Any, name: str) -> str:
    """Template filter: the command-line flag that sets a field, or '' for None."""
    return "".join(to_arguments({name: value}))


def freshet_dag(dag_id: str, *, schedule: Any, **settings: Any) -> DAG:
    """A DAG with the house's defaults: owner, retries, timeouts, and the filter that `component_task` needs.

    settings: of airflow's DAG; `macros` are functions for its templates.
    """
    defaults = {
        "owner": "freshet",
        "retries": 2,
        "retry_delay": timedelta(seconds=10),
        "retry_exponential_backoff": 2.0,
        "max_retry_delay": timedelta(minutes=10),
        "execution_timeout": timedelta(hours=6),
    }
    settings.setdefault("catchup", False)
    settings.setdefault("max_active_runs", 1)
    return DAG(
        dag_id,
        schedule=schedule,
        default_args=defaults | settings.pop("default_args", {}),
        template_undefined=StrictUndefined,
        user_defined_filters={"flag": flag},
        user_defined_macros=settings.pop("macros", {}),
        **settings,
    )


def form(config: type[StepConfig], section: str, exclude: Sequence[str] = (), **defaults: Any) -> dict[str, Param]:
    """The trigger form of a step: a typed, described and bounded field for each field of its config.

    `defaults` replaces default values; a field without any must be among them or excluded.
    """
    fields = {}
    for name, schema in form_fields(config).items():
        if name not in exclude:
            default = defaults[name] if name in defaults else schema["default"]
            rest = {key: value for key, value in schema.items() if key not in ("default", "description")}
            fields[name] = Param(default, description=schema["description"], section=section, **rest)
    return fields


def from_form(fields: Mapping[str, Param]) -> dict[str, Ref]:
    """Arguments that hand a form's values to the step that it came from."""
    return {name: param(name) for name in fields}


def component_task(
    task_id: str,
    step: str,
    arguments: Mapping[str, Any],
    *,
    gpu: bool = False,
    skip_unless: str = "True",
    not_before: str = "",
    **settings: Any,
) -> BaseOperator:
    """A task that runs `python -m components.<step>` with these arguments.

    arguments: field -> value, or a `Ref` that is evaluated when the task runs.
    gpu: trains; takes a slot of the pool `gpu`, and on Kubernetes a GPU.
    skip_unless: template; the task is skipped, at almost no cost, when it renders to a false value.
    not_before: template; the task waits, without holding a worker, until the ISO time that it renders to ('': no wait).
    """
    flags = [
        f"{{{{ ({value}) | flag('{name}') }}}}" if isinstance(value, Ref) else flag(value, name)
        for name, value in arguments.items()
    ]
    conditions = {"skip_unless": skip_unless, "not_before": not_before}
    settings = {"task_id": task_id, "step": step, "flags": flags, **conditions, **settings}
    settings["pre_execute"] = refuse_unknown_settings
    if gpu:
        settings.setdefault("pool", "gpu")
    launcher = os.environ.get("FRESHET_LAUNCHER", "local")
    if launcher == "local":
        return LocalStep(**settings)
    if launcher == "kubernetes":
        from dags.kubernetes_launcher import PodStep, pod_settings

        return PodStep(**pod_settings(gpu), **settings)
    raise ValueError(f"FRESHET_LAUNCHER is {launcher!r}; set it to local or kubernetes")


def refuse_unknown_settings(context: Context) -> None:
    """Airflow keeps settings of a run that its form does not have; a misspelt one would be passed over in silence."""
    known = context["dag"].params
    if unknown := [name for name in context["dag_run"].conf or {} if name not in known]:
        near = {match for name in unknown for match in get_close_matches(name, known)}
        hint = f"perhaps {', '.join(sorted(near))}; " if near else ""
        raise AirflowFailException(
            f"no such setting: {', '.join(unknown)}; {hint}trigger it with settings of its form: {', '.join(known)}"
        )


def stop_if_not_wanted(skip_unless: str) -> None:
    """Skip the task when the rendered condition is false."""
    if skip_unless.strip() in _FALSE:
        raise AirflowSkipException("nothing to do for this run")


def wait_until(task: BaseOperator, not_before: str) -> None:
    """Leave the worker until the rendered time; the task then goes on in its method `resume`."""
    if not not_before or (moment := parse_time(not_before)) <= datetime.now(UTC):
        return
    from airflow.providers.standard.triggers.temporal import DateTimeTrigger

    task.log.info("waiting until %s", not_before)
    task.defer(trigger=DateTimeTrigger(moment=moment), method_name="resume")


def tell_assets(context: Context, outlets: Sequence[Any], answer: Mapping[str, Any]) -> None:
    """Put the step's result on the events of the assets that the task updates."""
    for outlet in outlets:
        context["outlet_events"][outlet].extra = dict(answer)


class LocalStep(BaseOperator):
    """Runs a step as a subprocess in its own process group, without a shell."""

    template_fields: Sequence[str] = ("flags", "skip_unless", "not_before")
    ui_color = "#e8f4f0"

    def __init__(
        self, *, step: str, flags: list[str], skip_unless: str = "True", not_before: str = "", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.step, self.flags, self.skip_unless, self.not_before = step, flags, skip_unless, not_before
        self._process: subprocess.Popen[str] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the step and return its result; its output goes to the task's log line by line."""
        stop_if_not_wanted(self.skip_unless)
        wait_until(self, self.not_before)
        command = [sys.executable, "-m", f"components.{self.step}", *filter(None, self.flags)]
        self.log.info("running: %s", shlex.join(command))
        with tempfile.TemporaryDirectory(prefix="freshet-") as folder:
            path = Path(folder) / "result.json"
            code, tail = self._run(command, self._environment(context, path))
            if code == WRONG_INPUT:
                raise AirflowFailException(f"{self.step}: {tail.removeprefix('error: ')}")
            if code != 0:
                raise AirflowException(f"{self.step} ended with exit code {code}: {tail}")
            answer: dict[str, Any] = json.loads(path.read_text())
        tell_assets(context, self.outlets, answer)
        return answer

    def resume(self, context: Context, event: Any = None) -> dict[str, Any]:
        """Go on after a wait."""
        return self.execute(context)

    def on_kill(self) -> None:
        """Stop the step and everything that it started."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()

    def _run(self, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
        """Exit code and the last line of the output."""
        last = ""
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_end_with_task,
        ) as self._process:
            try:
                for line in self._process.stdout or ():
                    last = line.strip() or last
                    self.log.info("%s", line.rstrip())
                return self._process.wait(), last
            finally:
                self.on_kill()

    def _environment(self, context: Context, path: Path) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW__")}
        where = {"FRESHET_RESULT_PATH": str(path), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        return inherited | context_to_airflow_vars(context, in_env_var_format=True) | where


def _end_with_task() -> None:
    """Have the kernel (Linux) end the step when its task is killed without warning, before a retry repeats it."""
    if prctl := getattr(_LIBC, "prctl", None):
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return  # it ended by itself in the meantime
