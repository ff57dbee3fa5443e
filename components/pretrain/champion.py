"""The champion on the candidate's eval part, so that the gate compares two models on the same events.

The champion has been learning all along, perhaps from these very events. Its parameter log gives it back as it was at
the last sync point before the first of them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from components.errors import BadInput, CorruptLog
from components.parameters.reader import LogReader
from components.storage import Storage

if TYPE_CHECKING:
    from components.items import Items
    from components.sequence_data import Part

PREFIX = "champion_"
VERSION = f"{PREFIX}version"


def measure_champion(storage: Storage, model: str, version: int, items: Items, unseen: Part) -> dict[str, float]:
    """Its metrics under the names `champion_<metric>`, and `champion_version`.

    Empty when it has learned from some of the events at every sync point that can still be restored, and when its log
    is damaged or does not fit this software.
    """
    from components.parameters.bridge import build_model, load_into
    from components.quality import choose_items, measure
    from model.trainer import Trainer

    reader = LogReader(storage, model, version)
    try:
        n = _newest_before(reader, unseen)
        if n is None:
            return {}
        trainer = Trainer(build_model(model, reader.manifest(n).config, items.catalogue))
        load_into(trainer, reader.load(n))
    except (BadInput, CorruptLog) as error:  # a new version is the remedy: it must not fail for what it replaces
        print(f"the champion is not measured beside the candidate: {error}", file=sys.stderr)
        return {}
    choose_items(trainer, items, unseen)
    metrics = measure(trainer, unseen.users).metrics
    return {VERSION: float(version)} | {PREFIX + name: value for name, value in metrics.items()}


def _newest_before(reader: LogReader, unseen: Part) -> int | None:
    """The newest sync point that has learned from nothing at or after the first of the events."""
    if unseen.event_range is None:
        return None
    first = unseen.event_range[0]
    for n in range(reader.head(), -1, -1):
        learned_until = reader.manifest(n).learned_until_us
        if learned_until is None or learned_until < first:
            return n
    return None
