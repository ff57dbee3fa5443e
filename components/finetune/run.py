"""Continual training: one pass over a new window, committed as the next delta of the version's parameter log.

First the version is measured on the window before it learns from it (prequential), and beside it the frozen version,
as it was pretrained, on the same events. Then it learns once from each event, in event-time order, and publishes the
changed rows, the dense parameters and the metrics as delta n + 1. Servers that follow the log pick it up.

Each window is learned from exactly once: run again, the step returns the delta that exists; killed at any moment and
run again, it ends with the same bits (on CPUs, with as many threads). A window without events still makes a delta,
which marks it as consumed. A window that begins before the end of the newest consumed one is refused. Joined windows
that lie between are learned from first, in order, each as a delta of its own (--skip-gap leaves them out for good).

example:
  python -m components.finetune --model ranker --dataset window-20220501T000000Z-20220502T000000Z-0123456789ab
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from components import sequence_data
from components.errors import BadInput
from components.finetune.config import FinetuneConfig
from components.finetune.gap import datasets_before
from components.manifests import Manifest
from components.parameters.log import LogManifest
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.storage import Storage
from components.windows import Window, from_us

if TYPE_CHECKING:
    import torch

    from components.items import Items
    from components.registry import Registry
    from components.sequence_data import Part
    from model.trainer import Trainer

EXPERIMENT = "continual"
FROZEN = "frozen_"


class FinetuneResult(BaseModel):
    """The delta that holds what was learned from the window."""

    model: str
    version: int
    n: int = Field(description="delta number")
    windows: list[str]
    rows: dict[str, int] = Field(description="rows in the delta, by slot")
    metrics: dict[str, float] = Field(description="before learning: auc_click, ..., and frozen_auc_click, ...")
    event_time_min_us: int | None = Field(description="first event learned from; null: the window was empty")
    event_time_max_us: int | None = Field(description="newest event learned from")
    run_id: str = Field(description="MLflow run of the window")
    since_snapshot: int = Field(description="deltas after the newest snapshot up to this one: what is left to fold")


def run(config: FinetuneConfig) -> FinetuneResult:
    """Learn from the window, and from joined ones that the version lacks before it; or return the delta that did."""
    from components.registry import Registry

    if not config.dataset:
        raise BadInput("no dataset given; pass --dataset with the id of the window's sequence dataset")
    storage = Storage(config.root)
    dataset = sequence_data.require_dataset(storage, config.dataset)
    registry = Registry(config.tracking_uri)
    version = registry.resolve(config.model, config.version)
    reader = LogReader(storage, config.model, version)
    head = reader.head()
    done = _consumed(reader, head, dataset)
    if done is None:
        _refuse_overlap(reader, head, dataset)
        if head > 0:
            _settle(config, registry, reader.manifest(head))  # its process may have died when it had just published
        for earlier in [] if config.skip_gap else datasets_before(storage, reader, head, dataset):
            done = _learn(config, storage, registry, earlier, version, head)
            _settle(config, registry, done)
            head = done.n
        done = _learn(config, storage, registry, dataset, version, head)
        head = done.n
    _settle(config, registry, done, newest=done.n == head)
    folded = max(n for n in reader.snapshots() if n <= done.n)
    return FinetuneResult(**done.model_dump(include=set(FinetuneResult.model_fields)), since_snapshot=done.n - folded)


def _settle(config: FinetuneConfig, registry: Registry, done: LogManifest, newest: bool = True) -> None:
    """Say in MLflow what was published."""
    from components.tracking import Tracker

    Tracker(config.tracking_uri).finish(done.run_id, delta=done.n)
    if newest:
        registry.note_delta(config.model, done.version, done.n, ",".join(done.windows))


def _consumed(reader: LogReader, head: int, dataset: Manifest) -> LogManifest | None:
    """The delta that learned from exactly these windows, if there is one."""
    start = min((Window.parse(key).start_us for key in dataset.windows), default=0)
    for n in range(head, 0, -1):
        manifest = reader.manifest(n)
        if manifest.windows == dataset.windows:
            return manifest
        if manifest.consumed_until_us is not None and manifest.consumed_until_us <= start:
            break  # windows are consumed in order: all earlier deltas end before this one starts
    return None


def _refuse_overlap(reader: LogReader, head: int, dataset: Manifest) -> None:
    if not dataset.windows:
        raise BadInput(f"dataset {dataset.name} names no window; build it for a window, not for the full history")
    if head < 0:
        raise BadInput(f"{reader.model} {reader.version} has no parameters; run python -m components.publish first")
    until = reader.manifest(head).consumed_until_us
    start = min(Window.parse(key).start_us for key in dataset.windows)
    if until is not None and start < until:
        raise BadInput(
            f"window {dataset.windows[0]} begins before {from_us(until):%Y-%m-%dT%H:%M:%S.%fZ}, up to which "
            f"{reader.model} {reader.version} has learned: each event is learned from once; take the next window"
        )


def _learn(
    config: FinetuneConfig, storage: Storage, registry: Registry, dataset: Manifest, version: int, head: int
) -> LogManifest:
    import torch

    from components.parameters.bridge import choose_device, close_epochs, export_changes
    from components.tracking import Tracker
    from components.training import fit, policy_counts

    torch.set_num_threads(config.threads)
    part, items = sequence_data.read_part(storage, dataset, "train"), sequence_data.read_items(storage)
    reader = LogReader(storage, config.model, version)
    device = choose_device(config.device)
    trainer = _restore(reader, items, part, head, config.overrides(), device, with_state=True)
    n, window = head + 1, ",".join(dataset.windows)
    name = f"{config.model} {version} delta {n}: {window}"
    key = f"{EXPERIMENT}:{config.model}:{version}:{window}"
    tags = {"model": config.model, "version": version, "parent_version": version, "window": window}
    tags["version_run"] = registry.version(config.model, version).run_id
    params = {**config.model_dump(exclude={"root", "tracking_uri"}), **trainer.model.config.model_dump()}
    with Tracker(config.tracking_uri).run(EXPERIMENT, key, name, params, **tags) as tracked:
        tracked.dataset(storage, dataset, "training")
        metrics = _prequential(config, reader, trainer, items, part, head)
        tracked.metrics(metrics)
        since = close_epochs(trainer)
        if part.users is not None:
            fit(trainer, part.users, tracked, name, continual=True)
            tracked.metrics(policy_counts(trainer))
        delta = export_changes(trainer, since, n)
        manifest = LogWriter(storage, config.model, version).publish_delta(
            n, delta, windows=dataset.windows, event_range=part.event_range, metrics=metrics, run_id=tracked.run_id
        )
        tracked.metrics({f"rows_{slot}": float(rows) for slot, rows in manifest.rows.items()})
        tracked.tags({"delta": n})
        return manifest


def _prequential(
    config: FinetuneConfig, reader: LogReader, trainer: Trainer, items: Items, part: Part, head: int
) -> dict[str, float]:
    """Metrics of the version as it is, and of the version as it was pretrained, before either sees the labels."""
    from components.parameters.bridge import choose_device
    from components.quality import measure

    metrics = measure(trainer, part.users).metrics
    if not config.compare_frozen:
        return metrics
    frozen = metrics
    if head > 0 and part.users is not None:
        device = choose_device(config.device)
        frozen = measure(_restore(reader, items, part, 0, {}, device, with_state=False), part.users).metrics
    return metrics | {FROZEN + name: value for name, value in frozen.items()}


def _restore(
    reader: LogReader,
    items: Items,
    part: Part,
    n: int,
    overrides: dict[str, Any],
    device: torch.device,
    *,
    with_state: bool,
) -> Trainer:
    """A trainer that stands exactly where the one that published n stood."""
    from components.parameters.bridge import build_model, load_into
    from components.quality import choose_items
    from model.trainer import Trainer

    settings = {**reader.manifest(n).config, **overrides}
    trainer = Trainer(build_model(reader.model, settings, items.catalogue))
    trainer.model.place(device)
    load_into(trainer, reader.load(n, with_state=with_state))
    choose_items(trainer, items, part)
    return trainer
