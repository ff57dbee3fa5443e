"""The DAG files load, quickly and lightly, and every DAG and task has what an operator of it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.compact.config import CompactConfig
from components.config import form_fields
from components.finetune.config import FinetuneConfig
from components.join.config import JoinConfig
from components.pretrain.config import PretrainConfig
from components.rollout.config import RolloutConfig
from components.sequences.config import SequencesConfig
from tests.dags.airflow_process import call

DAGS = ("build_sequences", "continual_training", "pretrain", "rollout")
WIRING = {
    "build_sequences": {
        "join": ["sequences"],
        "sequences": [],
    },
    "pretrain": {
        "pretrain_ranker": ["register_ranker"],
        "register_ranker": ["publish_ranker"],
        "publish_ranker": ["release"],
        "pretrain_retriever": ["register_retriever"],
        "register_retriever": ["publish_retriever"],
        "publish_retriever": ["release"],
        "release": ["roll_out"],
        "roll_out": [],
    },
    "continual_training": {
        "join": ["sequences", "versions"],
        "sequences": [
            "finetune_challenger_ranker",
            "finetune_challenger_retriever",
            "finetune_ranker",
            "finetune_retriever",
        ],
        "versions": [
            "finetune_challenger_ranker",
            "finetune_challenger_retriever",
            "finetune_ranker",
            "finetune_retriever",
        ],
        "finetune_ranker": ["compact_ranker"],
        "finetune_retriever": ["compact_retriever"],
        "finetune_challenger_ranker": [],
        "finetune_challenger_retriever": [],
        "compact_ranker": [],
        "compact_retriever": [],
    },
    "rollout": {"gate": ["shadow"], "shadow": ["canary"], "canary": ["promoted"], "promoted": []},
}


def test_every_dag_file_loads(bag: dict[str, Any]) -> None:
    assert bag["errors"] == {}
    assert sorted(bag["dags"]) == sorted(DAGS)
    assert all(dag["serialized"] for dag in bag["dags"].values())


def test_parsing_is_quick_and_imports_nothing_heavy(bag: dict[str, Any]) -> None:
    heavy = {"torch", "pyspark", "mlflow", "pyarrow", "pandas", "numpy", "boto3", "matplotlib", "kubernetes"}
    assert heavy & set(bag["imported"]) == set()
    assert bag["seconds"] < 3, "all DAG files together, in seconds of CPU"


@pytest.mark.parametrize("dag_id", DAGS)
def test_every_dag_has_owner_tags_docs_and_no_surprises(bag: dict[str, Any], dag_id: str) -> None:
    dag = bag["dags"][dag_id]
    assert dag["owner"] == "freshet" and dag["tags"]
    assert len(dag["doc"]) > 200 and dag["doc"].startswith("## ")
    assert (dag["catchup"], dag["max_active_runs"]) == (False, 1)


@pytest.mark.parametrize("dag_id", DAGS)
def test_every_task_has_retries_a_delay_and_a_timeout(bag: dict[str, Any], dag_id: str) -> None:
    for name, task in bag["dags"][dag_id]["tasks"].items():
        assert task["retries"] >= 1 and task["retry_delay"] > 0 and task["timeout"] > 0, name
        assert task["owner"] == "freshet", name


def test_the_wiring_is_as_drawn(bag: dict[str, Any]) -> None:
    found = {
        dag_id: {name: task["downstream"] for name, task in dag["tasks"].items()} for dag_id, dag in bag["dags"].items()
    }
    assert found == WIRING


def test_training_takes_slots_of_the_gpu_pool(bag: dict[str, Any]) -> None:
    pools = {name: task["pool"] for dag in bag["dags"].values() for name, task in dag["tasks"].items()}
    assert {name for name, pool in pools.items() if pool == "gpu"} == {
        name for name in pools if name.startswith(("pretrain_", "finetune_"))
    }


def test_assets_link_the_dags(bag: dict[str, Any]) -> None:
    links = {
        (dag_id, kind, asset)
        for dag_id, dag in bag["dags"].items()
        for task in dag["tasks"].values()
        for kind in ("inlets", "outlets")
        for asset in task[kind]
    }
    assert {
        ("build_sequences", "inlets", "events"),
        ("build_sequences", "outlets", "interactions"),
        ("build_sequences", "outlets", "sequences"),
        ("pretrain", "inlets", "sequences"),
        ("pretrain", "outlets", "release"),
        ("rollout", "inlets", "release"),
        ("rollout", "outlets", "serving"),
        ("continual_training", "inlets", "events"),
        ("continual_training", "outlets", "parameters"),
    } <= links


FORMS = [
    ("pretrain", PretrainConfig, {"model"}),
    ("rollout", RolloutConfig, {"action", "until", "by"}),
    ("build_sequences", JoinConfig, {"window"}),
    ("build_sequences", SequencesConfig, {"mode", "window"}),
    ("continual_training", JoinConfig, {"window"}),
    ("continual_training", SequencesConfig, {"mode", "window", "split", "end"}),
    ("continual_training", FinetuneConfig, {"model", "version", "dataset"}),
    ("continual_training", CompactConfig, {"model", "version"}),
]


@pytest.mark.parametrize(("dag_id", "config", "wired"), FORMS)
def test_a_form_shows_every_field_of_its_steps(bag: dict[str, Any], dag_id: str, config: Any, wired: set[str]) -> None:
    """All fields except those that the DAG itself sets; with type, bounds, default and description of the config."""
    params = bag["dags"][dag_id]["params"]
    for name, schema in form_fields(config).items():
        if name in wired:
            continue
        shown = params[name]
        assert (shown["value"], shown["type"]) == (schema["default"], schema["type"]), name
        bounds = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum")
        assert {b: shown.get(b) for b in bounds} == {b: schema.get(b) for b in bounds}, name
        assert shown["description"] and shown["section"], name


def test_every_form_value_reaches_a_step(bag: dict[str, Any]) -> None:
    read_elsewhere = {"roll_out", "window", "window_hours", "join_from", "join_until"}
    for dag_id, dag in bag["dags"].items():
        text = " ".join(flag for task in dag["tasks"].values() for flag in task["flags"])
        unused = {name for name in dag["params"] if f"params.{name}" not in text} - read_elsewhere
        assert unused == set(), dag_id


def test_windows_are_partition_keys_and_a_failed_one_stops_the_next(bag: dict[str, Any], tmp_path: Path) -> None:
    dag = bag["dags"]["continual_training"]
    assert (dag["timetable"], dag["max_failed"]) == ("PartitionedAtRuntime", 1)
    source = """
from types import SimpleNamespace as run
from airflow.sdk.exceptions import AirflowFailException
from dags.windows import window_of
def key(partition, **params):
    try:
        triggered = run(partition_key=partition, run_type="manual")
        return window_of(triggered, {"window": "", "window_hours": 1.0, **params})
    except AirflowFailException as error:
        return str(error)
answer([
    key("20220501T000000Z-20220502T000000Z"), key("20220501T000000Z"), key("2022-05-01T00:00:00", window_hours=24),
    key(None, window="20220501T000000Z-20220502T000000Z"), key("garbage"), key(None),
])
"""
    whole, hour, day, form, wrong, none = call(tmp_path, source)
    assert whole == day == form == "20220501T000000Z-20220502T000000Z"
    assert hour == "20220501T000000Z-20220501T010000Z"
    assert "not a time" in wrong and "no window" in none


def test_a_log_is_compacted_once_enough_deltas_wait_though_a_run_learned_from_several_windows(tmp_path: Path) -> None:
    source = """
from types import SimpleNamespace as some
from dags import continual_training as file
def compacts(since_snapshot):
    template = file.dag.get_template_env().from_string(file.dag.get_task("compact_ranker").skip_unless)
    learned = {"n": 25, "since_snapshot": since_snapshot}
    return template.render(ti=some(xcom_pull=lambda task_ids: learned), params=some(min_deltas=24))
answer([compacts(23), compacts(25)])
"""
    assert call(tmp_path, source) == ["False", "True"]


def test_both_models_and_every_try_learn_from_the_dataset_that_was_newest_at_the_trigger(tmp_path: Path) -> None:
    source = """
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace as some
from dags import pretrain
from dags.assets import SEQUENCES
due = datetime(2022, 5, 1, tzinfo=timezone.utc)
events = [some(extra={"dataset": name}, timestamp=due + timedelta(hours=hours))
          for name, hours in (("older", -2), ("newest", -1))]
params = {name: pretrain.dag.params[name] for name in pretrain.dag.params}
def learned_from(model, found):
    templates = pretrain.dag.get_template_env()
    flags = pretrain.dag.get_task(f"pretrain_{model}").flags
    values = {"params": params, "inlet_events": {SEQUENCES: found}, "dag_run": some(run_after=due)}
    return [text for flag in flags if (text := templates.from_string(flag).render(values)).startswith("--dataset")]
later = some(extra={"dataset": "built meanwhile"}, timestamp=due + timedelta(hours=1))
answer([learned_from("ranker", events), learned_from("retriever", [*events, later]), learned_from("ranker", [])])
"""
    ranker, retriever, none = call(tmp_path, source)
    assert ranker == retriever == ["--dataset=newest"] and none == []


ON_SCHEDULE = """
import pendulum
from types import SimpleNamespace as some
import dags.continual_training as file
from dags.windows import SHIPPING, ready_at, window_of
from airflow.sdk.api.datamodels._generated import DagRunType
from airflow.serialization.serialized_objects import DagSerialization
dag = DagSerialization.from_dict(DagSerialization.to_dict(file.dag))
form = {name: file.dag.params[name] for name in file.dag.params}
def flags(run):
    templates = file.dag.get_template_env()
    return [templates.from_string(flag).render(dag_run=run, params=form) for flag in file.join.flags]
def told(tick, kind):
    run = some(run_type=DagRunType(kind), partition_key=tick.partition_key, run_after=tick.run_after)
    ready = ready_at(run, form)
    wait = (pendulum.parse(ready) - SHIPPING - tick.run_after).total_seconds() if ready else None
    return [window_of(run, form), wait, "--allow-empty" in flags(run)]
first = dag.next_dagrun_info(last_automated_run_info=None)
second = dag.next_dagrun_info(last_automated_run_info=first)
start = pendulum.datetime(2022, 5, 1)
(backfill,) = dag.timetable.iter_partition_dagrun_infos(earliest=start, latest=start)
answer({
    "scheduled": [told(tick, "scheduled") for tick in (first, second)],
    "backfill": told(backfill, "backfill")[0],
    "triggered": told(first, "manual")[1:],
})
"""


@pytest.mark.parametrize(
    ("cron", "first", "second"),
    [
        ("0 * * * *", "20220501T000000Z-20220501T010000Z", "20220501T010000Z-20220501T020000Z"),
        ("*/15 * * * *", "20220501T000000Z-20220501T001500Z", "20220501T001500Z-20220501T003000Z"),
        ("0 0,18 * * *", "20220501T000000Z-20220501T180000Z", "20220501T180000Z-20220502T000000Z"),
    ],
)
def test_the_ticks_of_a_schedule_share_out_all_time_since_its_start(
    tmp_path: Path, cron: str, first: str, second: str
) -> None:
    """Each window ends where the next begins, and none is left out, however long ago the last tick ran."""
    settings = {"FRESHET_CONTINUAL_CRON": cron, "FRESHET_CONTINUAL_START": "2022-05-01"}
    found = call(tmp_path, ON_SCHEDULE, settings)
    windows, waits, empty = zip(*found["scheduled"], strict=True)
    assert list(windows) == [first, second] and found["backfill"] == first
    assert waits == (3600, 3600), "actions have the attribution window to arrive"
    assert empty == (True, True), "an hour in which nothing happened does not stop the schedule"
    assert found["triggered"] == [None, False], "whoever triggers a run does not wait, and means a window with events"


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("", "FRESHET_CONTINUAL_START is not; set it"),
        ("2022-05-01T00:30Z", "no tick of '0 * * * *'; set it"),
        ("2022-05-01T00:00:30Z", "no tick of '0 * * * *'; set it"),
    ],
)
def test_a_schedule_says_where_its_first_window_begins(tmp_path: Path, start: str, message: str) -> None:
    source = """
from dags.windows import schedule
try:
    schedule()
except ValueError as error:
    answer(str(error))
"""
    settings = {"FRESHET_CONTINUAL_CRON": "0 * * * *", "FRESHET_CONTINUAL_START": start}
    assert message in call(tmp_path, source, settings)
