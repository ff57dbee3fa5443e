"""Join the impressions and actions of one window to interactions, exactly once.

Reads   events/impressions, events/actions (the hours needed), manifests of earlier joins
Writes  interactions/turns/ (the order of the joins), interactions/window=<window>/ (manifest last),
        quarantine/join/<window>.parquet, quality/join/<window>.json

Every event ends in one place: an interaction, the quarantine (with a reason), or pending until a later window.
Impressions that arrive after their own window was joined are emitted by the next window, marked late, if they are not
later than --max-lateness-s, else quarantined. What is later than that by more than --memory-s is not looked for: it
stays in the log until a join that has a larger one; the server's freshet_event_delay_seconds tells how late they come.
A finished window is never joined again: the published result is returned.
Join windows in the order of time, once their actions had --attribution-window-s to arrive; before that, a window is
refused without --early. Of two joins at once the second to finish is refused, and may be run again.

example:
  python -m components.join --window=20220501T000000Z-20220502T000000Z --attribution-window-s=3600
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pyarrow as pa
from pydantic import BaseModel, Field

from components.errors import BadInput
from components.join import turns
from components.join.config import JoinConfig
from components.manifests import Manifest, find, new_attempt
from components.schemas import ACTION_EVENTS, IMPRESSIONS, INTERACTIONS, QUARANTINE
from components.storage import Storage
from components.windows import Window
from spark_jobs import event_log, quality
from spark_jobs.join import Joined, Rules, counts, interactions, join, quarantine

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

ROWS_PER_FILE = 500_000


class JoinResult(BaseModel):
    """What the join of a window came to."""

    window: str
    folder: str = Field(description="folder of the interactions, relative to the root")
    manifest: str = Field(description="path of the manifest, relative to the root")
    quarantine: str = Field(description="path of the quarantined events, empty when there are none")
    counts: dict[str, int]


def run(config: JoinConfig) -> JoinResult:
    """Join one window. BadInput: too early, no impressions, broken log files, an overlapping window, failed checks.

    FreshetError when another join published meanwhile: the same again may succeed.
    """
    storage = Storage(config.root)
    window = Window.parse(config.window)
    folder = turns.folder_of(window.key)
    turn = turns.begin(storage)
    manifest = find(storage, folder)
    if manifest is None:
        manifest = turns.commit(storage, turn, _join(config, storage, window, folder))
    return _finish(storage, folder, manifest)


def published(storage: Storage) -> list[Window]:
    """Windows with published interactions, in the order of time."""
    paths = (path.split("/") for path in storage.list(turns.FOLDER) if path.endswith("/manifest.json"))
    return sorted(Window.parse(parts[1].removeprefix("window=")) for parts in paths)


def manifest_of(storage: Storage, window: Window) -> Manifest:
    """The manifest of a window of `published`."""
    found = find(storage, turns.folder_of(window.key))
    assert found is not None
    return found


def manifests_of(storage: Storage, windows: Sequence[Window]) -> list[Manifest]:
    """The manifests of windows of `published`, in their order; several are read at once: there can be thousands."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda window: manifest_of(storage, window), windows))


def _join(config: JoinConfig, storage: Storage, window: Window, folder: str) -> Manifest:
    from spark_jobs.session import session, tune

    joined_before = published(storage)
    _refuse_overlap(window, joined_before)
    _refuse_early(config, window)
    rules = Rules(window, config.attribution_window_s, config.max_lateness_s, config.memory_s, joined_before)
    earlier = manifests_of(storage, rules.remembered)
    impressions, actions, rows = _inputs(config, storage, rules, earlier)
    spark = session(config.spark, config.root)
    tune(spark, rows)
    before = [path for m in earlier for path in m.files["data"]]
    bad_before = [path for m in earlier for path in m.files["quarantine"]]
    with event_log.naming_bad_files():
        result = join(
            event_log.read_events(spark, storage, "impressions", impressions),
            event_log.read_events(spark, storage, "actions", actions),
            event_log.read(spark, storage, before, INTERACTIONS),
            event_log.read(spark, storage, bad_before, QUARANTINE),
            rules,
        ).cache()
        try:
            found = counts(result)
            _check(config, storage, found, earlier)
            files = _write(result, found, storage, folder)
        finally:
            result.unpersist()
    return Manifest(
        kind="interactions",
        name=window.key,
        windows=[window.key],
        inputs=[*impressions, *actions],
        files=files,
        counts=found,
        config=config.model_dump(mode="json", exclude={"root", "spark"}),
    )


def _refuse_overlap(window: Window, others: list[Window]) -> None:
    for other in others:
        if window.overlaps(other):
            raise BadInput(
                f"window {window.key} overlaps {other.key}, which is already joined; "
                "choose a window that begins at its end or ends at its start"
            )


def _refuse_early(config: JoinConfig, window: Window) -> None:
    """A joined window takes no actions any more: those that come later are lost, their impressions negatives."""
    ready = window.end + timedelta(seconds=config.attribution_window_s)
    if not config.early and datetime.now(UTC) < ready:
        raise BadInput(
            f"actions for the impressions of window {window.key} count until {ready:%Y-%m-%dT%H:%M:%SZ}; "
            "join it after that, or with --early, without those that are still to come"
        )


def _inputs(
    config: JoinConfig, storage: Storage, rules: Rules, earlier: list[Manifest]
) -> tuple[list[str], list[str], int]:
    """The log files to read, checked, and their rows: the window's hours, and older files that no join has settled."""
    start, end = rules.window.start, rules.window.end
    attribution, lateness = timedelta(seconds=rules.attribution_window_s), timedelta(seconds=rules.max_lateness_s)
    memory = timedelta(seconds=rules.memory_s)
    history = min([w.start for w in rules.joined] + [start])
    oldest = max(start - lateness - memory, history)
    actions = event_log.files_between(storage, "actions", start - lateness, end + attribution)
    actions += _unsettled(storage, "actions", oldest, start, earlier)
    since = min([start - lateness, *map(event_log.hour_of, actions)]) - attribution
    impressions = event_log.files_between(storage, "impressions", since, end)
    impressions += _unsettled(storage, "impressions", oldest, start, earlier)
    if not impressions and not config.allow_empty:
        raise BadInput(
            f"no impressions up to {end:%Y-%m-%d %H:%M:%S} in {storage.url('events/impressions')}; "
            "ingest them first, choose a window that has some, or pass --allow-empty"
        )
    impressions, actions = sorted(set(impressions)), sorted(set(actions))
    rows = event_log.check_files(storage, impressions, IMPRESSIONS)
    return impressions, actions, rows + event_log.check_files(storage, actions, ACTION_EVENTS)


def _unsettled(storage: Storage, kind: str, start: datetime, end: datetime, earlier: list[Manifest]) -> list[str]:
    """Files of hours in [start, end) in which an event may not have met its fate in an earlier join.

    A join that read a file has settled its impressions if the file's hour lies before the end of the join's window,
    its actions if it lies before that by the lateness which that join allowed: until then they were pending.
    """
    if start >= end:
        return []
    settled = {
        path
        for manifest in earlier
        for path in manifest.inputs
        if path.startswith(f"events/{kind}/")
        and event_log.hour_of(path) + event_log.HOUR <= _settled_until(manifest, kind)
    }
    return [path for path in event_log.files_between(storage, kind, start, end) if path not in settled]


def _settled_until(manifest: Manifest, kind: str) -> datetime:
    end = Window.parse(manifest.name).end
    return end - timedelta(seconds=manifest.config["max_lateness_s"]) if kind == "actions" else end


def _check(config: JoinConfig, storage: Storage, found: dict[str, int], earlier: list[Manifest]) -> None:
    """Write the quality report; BadInput when the window has no impressions or a check fails."""
    if not found["interactions"] and not config.allow_empty:
        raise BadInput(
            f"no impressions in window {config.window}; ingest them first, choose a window that has some, "
            "or pass --allow-empty"
        )
    start = Window.parse(config.window).start
    past = [m for m in earlier if Window.parse(m.name).end <= start and m.counts["interactions"]]
    previous = (past[-1].name, past[-1].counts) if past else None
    limits = quality.Limits(**config.model_dump(include=set(quality.Limits.model_fields)))
    report = quality.check(config.window, found, limits, previous)
    path = f"quality/join/{config.window}.json"
    storage.write_bytes(path, report.model_dump_json(indent=1).encode())
    if report.failures:
        raise BadInput(
            f"window {config.window} failed its quality checks: {'; '.join(report.failures)}. "
            f"Report: {storage.url(path)}. Repair the log, or raise the limit that you accept"
        )


def _write(result: Joined, found: dict[str, int], storage: Storage, folder: str) -> dict[str, list[str]]:
    attempt = new_attempt(folder)
    order = ["timestamp", "request_id", "position", "item_id"]
    files = {"data": _write_part(interactions(result), found["interactions"], order, storage, f"{attempt}/data")}
    files["quarantine"] = []
    if found["quarantined"]:
        bad = quarantine(result)
        files["quarantine"] = _write_part(bad, found["quarantined"], ["kind", "row"], storage, f"{attempt}/quarantine")
    return files


def _write_part(rows: DataFrame, count: int, order: list[str], storage: Storage, folder: str) -> list[str]:
    """Write rows, sorted, to few files."""
    files = -(-count // ROWS_PER_FILE)
    placed = rows.repartition(1) if files <= 1 else rows.repartitionByRange(files, *order)
    placed.sortWithinPartitions(*order).write.parquet(storage.spark_url(folder))
    return [path for path in storage.list(folder) if path.endswith(".parquet")]


def _finish(storage: Storage, folder: str, manifest: Manifest) -> JoinResult:
    """Put the quarantined rows where people look for them (again, should an earlier attempt have died before)."""
    bad = f"quarantine/join/{manifest.name}.parquet" if manifest.files["quarantine"] else ""
    if bad and not storage.exists(bad):
        rows = pa.concat_tables(storage.read_table(path) for path in manifest.files["quarantine"])
        storage.write_table(bad, rows.cast(QUARANTINE))
    return JoinResult(
        window=manifest.name,
        folder=folder,
        manifest=f"{folder}/manifest.json",
        quarantine=bad,
        counts=manifest.counts,
    )
