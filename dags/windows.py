"""The window of a run of continual training, and the moment from which it can be joined."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import CronPartitionTimetable, PartitionedAtRuntime
from airflow.sdk.exceptions import AirflowFailException

from components.errors import BadInput
from components.windows import Window, parse_time

CRON = os.environ.get("FRESHET_CONTINUAL_CRON", "")
START = os.environ.get("FRESHET_CONTINUAL_START", "")
SHIPPING = timedelta(seconds=60)
"""Servers write what they acknowledged into the event log within their --flush-interval-s, 2 s by default."""
_WINDOW_KEY = re.compile(r"\w+-\w+")
_BY_SCHEDULE = ("scheduled", "backfill")


def schedule() -> dict[str, Any]:
    """Settings of the DAG: a window for each tick of the cron after its start, none left out, or runs by trigger alone.

    ValueError: the start is missing, or no tick, so that the first window would overlap what is joined.
    """
    if not CRON:
        return {"schedule": PartitionedAtRuntime()}
    from croniter import croniter

    wanted = "set it to the time up to which the past is joined: a tick, like 2022-05-01T00:00:00Z"
    if not START:
        raise ValueError(f"FRESHET_CONTINUAL_CRON is set but FRESHET_CONTINUAL_START is not; {wanted}")
    start = parse_time(START)
    if croniter(CRON, start - timedelta(seconds=1)).get_next(datetime) != start:  # croniter.match overlooks seconds
        raise ValueError(f"FRESHET_CONTINUAL_START, {START}, is no tick of {CRON!r}; {wanted}")
    return {
        "schedule": CronPartitionTimetable(CRON, timezone="UTC", run_offset=-1, key_format="%Y%m%dT%H%M%SZ"),
        "catchup": True,
        "start_date": start + timedelta(seconds=1),  # the tick at `start` itself ends a window of the past
    }


def window_of(dag_run: Any, params: Mapping[str, Any]) -> str:
    """The window key of a run: its partition key (a window key, or the start of one), else the form's `window`.

    A start alone is that of a window from one tick to the next in runs of the schedule, else of `window_hours`.
    """
    key = getattr(dag_run, "partition_key", None) or params.get("window")
    if not key:
        raise AirflowFailException(
            "this run has no window; trigger it with a partition key, or fill in the form's window, "
            "like 20220501T000000Z-20220502T000000Z"
        )
    try:
        if _WINDOW_KEY.fullmatch(key):
            return Window.parse(key).key
        start = parse_time(key)
        if not by_schedule(dag_run):
            return Window.starting(start, timedelta(hours=params["window_hours"])).key
        # A backfill says where its windows begin only: its runs are due at that moment.
        return Window(start, dag_run.run_after if dag_run.run_after > start else _tick_after(start)).key
    except BadInput as error:
        raise AirflowFailException(str(error)) from error


def by_schedule(dag_run: Any) -> bool:
    """Whether the cron, not a person, has chosen the run's window: nothing may have happened in it."""
    return dag_run.run_type in _BY_SCHEDULE


def ready_at(dag_run: Any, params: Mapping[str, Any]) -> str:
    """When all actions of the window of a run of the schedule are in the event log, as ISO time.

    '' (at once) for a run that somebody triggered.
    """
    if not by_schedule(dag_run):
        return ""
    attribution = timedelta(seconds=params["attribution_window_s"])
    return (Window.parse(window_of(dag_run, params)).end + attribution + SHIPPING).isoformat()


def _tick_after(start: Any) -> Any:
    if not CRON:
        raise BadInput("a backfill needs $FRESHET_CONTINUAL_CRON, which tells its windows' ends, on the workers, too")
    from croniter import croniter

    return croniter(CRON, start).get_next(type(start))
