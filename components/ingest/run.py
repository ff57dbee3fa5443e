"""Read a source of events into the event log.

  python -m components.ingest                                             the synthetic world's history
  python -m components.ingest --source=kuairand --path=KuaiRand-Pure --until-time=2022-05-01
  python -m components.ingest --source=movielens --path=ml-1m
  python -m components.ingest --source=files --path=log.csv --kind=impressions \\
      --columns=user_id=uid,item_id=sku,timestamp=ts,click=clicked --time-unit=iso --string-ids

Writes events/impressions and events/actions by UTC hour, items/, and quarantine/ingest/ for rows that cannot be
read, each with its reason. Above --max-bad-share the ingest fails, and nothing of it enters the event log. File names
depend on the settings and on the content of the source, so running it again changes nothing, and running it after a
crash repairs what the crash left. Of items without events (--kind=items) the row that was ingested last wins; a
catalogue that was ingested before wins again under another file name.
With --from-time and --until-time (half-open) a log can be replayed slice by slice.

The columns of --source=files (Parquet, JSONL, or CSV with a header and commas) by --kind, [those that may be absent]:

  impressions  user_id item_id timestamp [request_id position page received_at], and actions as columns: 0/1 for click,
               like, long_view, follow, comment, share, dislike; seconds for watch and stars for rating, which count
               when above 0. An impression logged again with other feedback stays once, with the actions of all its rows
  actions      request_id user_id item_id timestamp action [value received_at], of impressions logged elsewhere
  feedback     user_id item_id timestamp [action value request_id page received_at]: an impression and its one action
               (like when the row names none) at the same time, as most public data sets are
  items        item_id [author_id category duration_s]
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Collection
from datetime import UTC, datetime
from types import ModuleType

import numpy as np
from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from components.errors import AlreadyExists, BadInput
from components.ingest import files, kuairand, movielens, synthetic
from components.ingest.batch import Batch, times_of
from components.ingest.config import IngestConfig
from components.ingest.write import event_files, items_path, last_items_path, newest_items, write_files
from components.join.run import published
from components.schemas import ACTIONS
from components.storage import Storage
from components.windows import from_us, to_us
from components.world.config import WorldConfig
from components.world.record import record_world, recorded_world

ADAPTERS: dict[str, ModuleType] = {"kuairand": kuairand, "movielens": movielens, "files": files, "synthetic": synthetic}
NOT_CONTENT = {"root", "path", "max_bad_share"}


class IngestResult(BaseModel):
    """What entered the event log and what did not; also the ingest's manifest, ingests/<name>.json."""

    name: str = Field(description="source and digest of settings and content; names every file of this ingest")
    source: str
    event_rows: int = Field(description="event rows in the slice, bad ones and duplicates included")
    item_rows: int = Field(description="catalogue rows, bad ones included")
    impressions: int
    actions: dict[str, int] = Field(description="events by action")
    items: int
    duplicates: int = Field(description="exact copies of earlier rows, dropped")
    quarantined: dict[str, int] = Field(description="bad rows by reason")
    quarantine_path: str | None
    bad_share: float
    first_event: datetime | None
    last_event: datetime | None
    files: int


def run(config: IngestConfig) -> IngestResult:
    """Ingest one source; a finished ingest returns its recorded result.

    Raises BadInput for a missing path, wrong columns, unreadable or empty files, too many bad rows, and for a synthetic
    world where there is other data.
    """
    now = datetime.now(UTC)
    storage = Storage(config.root)
    if config.source == "synthetic":
        _refuse_other_data(config, storage)
        config = config.with_end_of_world(recorded_world(storage), now)
    name = f"{config.source}-{_digest(config)}"
    manifest = f"ingests/{name}.json"
    if storage.exists(manifest):
        print(_nothing_new(config, storage, name), file=sys.stderr)
        return IngestResult.model_validate_json(storage.read_bytes(manifest))
    batch: Batch = ADAPTERS[config.source].load(config, to_us(now))
    quarantine = _set_aside(storage, name, batch)
    _check(config, storage, batch, quarantine)
    if config.source == "synthetic":
        record_world(storage, config.world())
        config.with_end_of_world(recorded_world(storage), now)  # refuses the world of another ingest that was faster
    written = _write(storage, name, batch, now)
    if late := _of_joined_windows(storage, batch):
        print(
            f"warning: {late} events are of windows that are joined already; what the next join takes of them depends "
            "on its --max-lateness-s, see python -m components.join --help",
            file=sys.stderr,
        )
    result = _result(config, name, batch, quarantine, written)
    try:
        storage.create(manifest, result.model_dump_json(indent=1).encode())
    except AlreadyExists:
        return IngestResult.model_validate_json(storage.read_bytes(manifest))
    return result


def _refuse_other_data(config: IngestConfig, storage: Storage) -> None:
    """The synthetic world is the default source: it must not come among real events because --source was forgotten."""
    given = [f"--{name}" for name in ("path", "columns") if getattr(config, name)]
    if given:
        raise BadInput(
            f"the synthetic world has no {' and no '.join(given)}; set --source to files, kuairand or movielens"
        )
    others = sorted(path for path in storage.list("ingests") if not path.startswith("ingests/synthetic-"))
    if others:
        raise BadInput(
            f"{config.root} holds other data ({others[0]}), with which a synthetic world would mix; "
            "set --source to read yours, or use another --root"
        )


def _nothing_new(config: IngestConfig, storage: Storage, name: str) -> str:
    """What an ingest does that was finished before: not what those expect who want an earlier catalogue back."""
    told = f"{name} has been ingested before; nothing is changed"
    newest = newest_items(storage.list("items"))
    if config.source == "files" and config.kind == "items" and newest and not newest.endswith(f"-{name}.parquet"):
        told += f". Its items give way to those of {newest}; to let them win, ingest the file under another name"
    return told


def _digest(config: IngestConfig) -> str:
    """12 hex digits of the settings and, for files, of their content: the same log elsewhere has the same name."""
    other = set() if config.source == "synthetic" else set(WorldConfig.model_fields)
    fields = config.model_dump_json(exclude=NOT_CONTENT | other)
    digest = hashlib.sha256(fields.encode())
    if config.source != "synthetic":
        for path in ADAPTERS[config.source].files(config):
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _set_aside(storage: Storage, name: str, batch: Batch) -> str | None:
    if batch.bad.num_rows == 0:
        return None
    path = f"quarantine/ingest/{name}.parquet"
    storage.write_table(path, batch.bad)
    return path


def _check(config: IngestConfig, storage: Storage, batch: Batch, quarantine: str | None) -> None:
    """Refuse a batch with too many bad rows or without any."""
    reasons = Counter(batch.bad["reason"].to_pylist())
    if quarantine and batch.bad_share > config.max_bad_share:
        raise BadInput(
            f"{batch.bad.num_rows} of {batch.event_rows + batch.item_rows} rows ({batch.bad_share:.1%}) are bad, "
            f"more than --max-bad-share {config.max_bad_share:.1%}; nothing was ingested\n{report(reasons)}"
            f"{_hints(config, reasons)}see {storage.url(quarantine)}, then repair the source or raise --max-bad-share"
        )
    if batch.impressions.num_rows + batch.actions.num_rows == 0 and not (
        config.source == "files" and config.kind == "items" and batch.items.num_rows
    ):
        raise BadInput(
            f"no event lies in [{config.from_time or 'the beginning'}, {config.until_time or 'the end'}); "
            "choose another --from-time and --until-time"
        )


def _hints(config: IngestConfig, reasons: Collection[str]) -> str:
    """The settings of source=files that these reasons may come from, one a line."""
    if config.source != "files":
        return ""
    text = any(reason.startswith("non_integer_") for reason in reasons if reason != "non_integer_position")
    hints = {
        "ids that are text need --string-ids": text and not config.string_ids,
        f"are the times of --time-unit={config.time_unit}? (s, ms, us, iso)": any(
            "timestamp" in reason for reason in reasons
        ),
        f"--action-names maps actions to those known: {', '.join(ACTIONS)}": "unknown_action" in reasons,
    }
    return "".join(f"{hint}\n" for hint, applies in hints.items() if applies)


def report(reasons: Counter[str]) -> str:
    """A table of reasons and counts as plain text."""
    table = Table("reason", "rows")
    for reason, count in reasons.most_common():
        table.add_row(reason, str(count))
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _write(storage: Storage, name: str, batch: Batch, now: datetime) -> int:
    """Write items first, then events, so that no reader meets an event of an item it cannot look up."""
    if batch.items.num_rows:
        storage.write_table(_items_file(storage, name, batch, now), batch.items)
    files_ = event_files("impressions", batch.impressions, name) + event_files("actions", batch.actions, name)
    write_files(storage, files_)
    return len(files_) + bool(batch.items.num_rows)


def _items_file(storage: Storage, name: str, batch: Batch, now: datetime) -> str:
    """Items beside events stand as of the newest event, items alone come after all others: those given last win."""
    if span := batch.span():
        return items_path(from_us(span[1]), name)
    paths = storage.list("items")
    begun = [path for path in paths if path.endswith(f"-{name}.parquet")]
    return begun[0] if begun else last_items_path(paths, now, name)  # what a crash left has its name already


def _of_joined_windows(storage: Storage, batch: Batch) -> int:
    """How many of the events come too late for the join of their own window."""
    times = np.sort(np.concatenate([times_of(batch.impressions), times_of(batch.actions)]))
    return sum(int(np.diff(np.searchsorted(times, [w.start_us, w.end_us]))[0]) for w in published(storage))


def _result(config: IngestConfig, name: str, batch: Batch, quarantine: str | None, written: int) -> IngestResult:
    span = batch.span()
    return IngestResult(
        name=name,
        source=config.source,
        event_rows=batch.event_rows,
        item_rows=batch.item_rows,
        impressions=batch.impressions.num_rows,
        actions=dict(sorted(Counter(batch.actions["action"].to_pylist()).items())),
        items=batch.items.num_rows,
        duplicates=batch.duplicates,
        quarantined=dict(sorted(Counter(batch.bad["reason"].to_pylist()).items())),
        quarantine_path=quarantine,
        bad_share=batch.bad_share,
        first_event=from_us(span[0]) if span else None,
        last_event=from_us(span[1]) if span else None,
        files=written,
    )
