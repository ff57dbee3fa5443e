"""Builds the observation: what the logs and the server say about the stage's period."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.compute as pc

from components.errors import BadInput
from components.parameters.reader import LogReader
from components.pretrain.champion import PREFIX, VERSION
from components.rollout.assignment import serves_challenger
from components.rollout.evidence import Arm, Observation, Serving
from components.rollout.policy import Policy
from components.rollout.state import Release, RolloutState
from components.schemas import ACTION_EVENTS, IMPRESSIONS
from components.serve.shipping import SHADOW
from components.storage import Storage

NO_SERVER = "none"
_KEY = ["request_id", "user_id", "item_id"]
_STATUS_TIMEOUT_S = 5.0


def observe(storage: Storage, state: RolloutState, now: datetime, server_url: str) -> Observation:
    """What is known about the rollout at `now`, as far as the stage needs it. Missing data is left out, never made up.

    `server_url`: the server whose own counts are asked for, or 'none' to judge without them.
    """
    if state.challenger is None or state.policy is None:
        return Observation()
    if state.stage == "gate":
        return _offline(storage, state.champion, state.challenger)
    if state.stage not in ("shadow", "canary"):
        return Observation()
    since = state.stage_since + timedelta(seconds=state.policy.settle_s)
    role = "shadow" if state.stage == "shadow" else "serving"
    serving, notes = _ask(server_url, state, state.challenger, role) if server_url != NO_SERVER else (None, ())
    logged: dict[str, Any] = {}
    try:
        if state.stage == "shadow":
            logged["shadow"] = shadow_counts(storage, state.challenger.ranker, since, now)
        else:
            arms, logged["misassigned"] = arm_counts(storage, state, state.policy, since, now)
            logged |= arms
    except BadInput as error:  # a damaged file: nothing is known of the log, but the server's counts still are
        logged, notes = {}, (*notes, str(error))
    return Observation(serving=serving, serving_required=server_url != NO_SERVER, notes=notes, **logged)


def _offline(storage: Storage, champion: Release | None, challenger: Release) -> Observation:
    measured = offline_metrics(storage, challenger)
    beside = measured_beside(measured, champion) if champion else {}
    return Observation(offline_champion=beside, offline_challenger=measured)


def measured_beside(metrics: dict[str, float], champion: Release) -> dict[str, float]:
    """The champion's metrics on the candidate's own eval part; none of a champion that was another one then."""
    found: dict[str, float] = {}
    for model, version in champion:
        prefix = f"{model}.{PREFIX}"
        if metrics.get(f"{model}.{VERSION}") == version:
            found |= {f"{model}.{n.removeprefix(prefix)}": v for n, v in metrics.items() if n.startswith(prefix)}
            del found[f"{model}.version"]
    return found


def offline_metrics(storage: Storage, release: Release) -> dict[str, float]:
    """'model.metric' -> value from the pretrained snapshots' manifests; models that are not published are left out."""
    metrics: dict[str, float] = {}
    for model, version in release:
        if (snapshot := LogReader(storage, model, version).find("snapshot", 0)) is not None:
            metrics |= {f"{model}.{name}": value for name, value in snapshot.manifest.metrics.items()}
    return metrics


def newest_version(storage: Storage, model: str) -> int | None:
    """The highest version of the model that has a published snapshot."""
    found = {
        int(p.split("/")[2]) for p in storage.list(f"parameters/{model}") if p.endswith("snapshot-0/manifest.json")
    }
    return max(found, default=None)


def arm_counts(
    storage: Storage, state: RolloutState, policy: Policy, since: datetime, now: datetime
) -> tuple[dict[str, Arm], int]:
    """Counts of both arms over impressions in [since, now), and how many users saw a track that is not theirs."""
    impressions = _read(storage, "events/impressions/dt=%Y-%m-%d/hour=%H", since, now, _subset(IMPRESSIONS, "track"))
    tracked = impressions.filter(pc.is_in(impressions["track"], pa.array(["champion", "challenger"])))
    tracked = tracked.group_by([*_KEY, "track"]).aggregate([])  # one row per impression, however often it was sent
    actions = _read(storage, "events/actions/dt=%Y-%m-%d/hour=%H", since, now, _subset(ACTION_EVENTS, "action"))
    hits = actions.filter(pc.equal(actions["action"], policy.quality_action)).group_by(_KEY).aggregate([])
    hits = hits.append_column("hit", pa.array([1] * hits.num_rows, pa.int64()))
    joined = tracked.join(hits, keys=_KEY, join_type="left outer")
    joined = joined.set_column(joined.schema.get_field_index("hit"), "hit", pc.fill_null(joined["hit"], 0))
    users = joined.group_by(["user_id", "track"]).aggregate([("hit", "sum"), ("hit", "count")])
    rows = users.to_pylist()
    wrong = {
        row["user_id"]
        for row in rows
        if (row["track"] == "challenger") != serves_challenger(row["user_id"], state.salt, state.share)
    }
    arms = {track: _arm([row for row in rows if row["track"] == track]) for track in ("champion", "challenger")}
    return arms, len(wrong)


def _arm(users: list[dict[str, Any]]) -> Arm:
    pairs = [(row["hit_count"], row["hit_sum"]) for row in users]
    return Arm(
        users=len(pairs),
        impressions=sum(n for n, _ in pairs),
        hits=sum(x for _, x in pairs),
        sum_nn=sum(n * n for n, _ in pairs),
        sum_xx=sum(x * x for _, x in pairs),
        sum_nx=sum(n * x for n, x in pairs),
    )


def shadow_counts(storage: Storage, version: int, since: datetime, now: datetime) -> Serving:
    """What the shadow log says of this ranker version: requests, failed ones, and ones without any scored item."""
    rows = _read(storage, "serving/shadow/dt=%Y-%m-%d", since, now, _subset(SHADOW, "version", "error"))
    rows = rows.filter(pc.equal(rows["version"], version))
    failed = set(rows.filter(pc.is_valid(rows["error"]))["request_id"].to_pylist())
    scored = set(rows.filter(pc.is_valid(rows["item_id"]))["request_id"].to_pylist())
    requests = set(rows["request_id"].to_pylist())
    return Serving(requests=len(requests), errors=len(failed), empty=len(requests - scored - failed))


def _ask(
    server_url: str, state: RolloutState, challenger: Release, role: str
) -> tuple[Serving | None, tuple[str, ...]]:
    """The server's own counts of the challenger in this stage (role: serving or shadow), or None and why not."""
    url = f"{server_url.rstrip('/')}/v1/status"
    try:
        response = httpx.get(url, timeout=_STATUS_TIMEOUT_S)
        response.raise_for_status()
        status = response.json()
        track = status["tracks"].get("challenger")
        if track is None:
            return None, (f"{url} shows no challenger yet",)
        if (track["ranker"]["version"], track["retriever"]["version"]) != (challenger.ranker, challenger.retriever):
            return None, (f"{url} has another challenger loaded than {challenger}",)
        if datetime.fromisoformat(status["stage_since"]) != state.stage_since:
            return None, (f"{url} does not follow this stage yet: its counts are of another one",)
        counts = track["shadow"] if role == "shadow" else track
        return Serving(**{name: counts[name] for name in ("requests", "errors", "empty", "p99_ms")}), ()
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, (f"{url} gave no counts of the challenger: {error!r}",)


def _read(storage: Storage, folder: str, since: datetime, now: datetime, schema: pa.Schema) -> pa.Table:
    """Rows with timestamp in [since, now) and the columns of `schema`; folder: of an hour or a day, for strftime.

    BadInput names a file that cannot be read or lacks a column that every row needs.
    """
    first = since.replace(minute=0, second=0, microsecond=0)
    hours = (first + timedelta(hours=n) for n in range((now - first) // timedelta(hours=1) + 1))
    tables = [schema.empty_table()]
    for place in dict.fromkeys(hour.strftime(folder) for hour in hours):
        for path in storage.list(place):
            if path.endswith(".parquet"):
                table = storage.read_table_as(path, schema)
                in_period = pc.and_(
                    pc.greater_equal(table["timestamp"], pa.scalar(since)), pc.less(table["timestamp"], pa.scalar(now))
                )
                tables.append(table.filter(in_period))
    return pa.concat_tables(tables)


def _subset(schema: pa.Schema, *columns: str) -> pa.Schema:
    """The columns that name an event and its time, and these."""
    return pa.schema([schema.field(name) for name in (*_KEY, "timestamp", *columns)])
