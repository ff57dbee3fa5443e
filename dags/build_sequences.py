"""## Build sequences

Joins a long stretch of the event log to interactions and builds the sequences that pretraining learns from.

* **Join from** and **Join until** name the stretch, e.g. the history before the continual windows begin. Left empty,
  nothing is joined and the sequences are built from what the continual windows have joined already.
  Actions count for an hour (**attribution_window_s**): a stretch that ended less long ago is refused without **early**.
* **Split**: users' interactions before it are learned from, those after it measure the model.

Running it again with the same settings changes nothing. Produces the asset `sequences`, whose newest event tells
`pretrain` the dataset id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.sdk import Param
from airflow.sdk.exceptions import AirflowFailException

from components.errors import BadInput
from components.join.config import JoinConfig
from components.sequences.config import SequencesConfig
from components.windows import Window, parse_time
from dags.assets import EVENTS, INTERACTIONS, SEQUENCES
from dags.launcher import Ref, component_task, form, freshet_dag, from_form


def history_window(params: Mapping[str, Any]) -> str:
    """The window key of the stretch to join; '' when none is given, which skips the task."""
    if not (params["join_from"] or params["join_until"]):
        return ""
    try:
        return Window(parse_time(params["join_from"] or ""), parse_time(params["join_until"] or "")).key
    except BadInput as error:
        raise AirflowFailException(f"join_from and join_until: {error}") from error


MAYBE_TEXT = ["string", "null"]
STRETCH = {
    "join_from": Param("", type=MAYBE_TEXT, section="Stretch", description="time to join from; empty: join nothing"),
    "join_until": Param("", type=MAYBE_TEXT, section="Stretch", description="time to join until (not included)"),
}
SEQUENCES_FORM = form(SequencesConfig, "Sequences", exclude=["mode", "window"])
JOIN_FORM = form(JoinConfig, "Join", exclude=["window"])

with freshet_dag(
    "build_sequences",
    schedule=None,
    tags=["data", "spark"],
    doc_md=__doc__,
    params={**STRETCH, **SEQUENCES_FORM, **JOIN_FORM},
    macros={"history_window": history_window},
) as dag:
    join = component_task(
        "join",
        "join",
        {"window": Ref("history_window(params)"), **from_form(JOIN_FORM)},
        skip_unless="{{ params.join_from or params.join_until }}",
        inlets=[EVENTS],
        outlets=[INTERACTIONS],
    )
    sequences = component_task(
        "sequences",
        "sequences",
        {"mode": "history", **from_form(SEQUENCES_FORM)},
        trigger_rule="none_failed",
        inlets=[INTERACTIONS],
        outlets=[SEQUENCES],
    )
    join >> sequences
