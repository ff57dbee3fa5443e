"""Goes on deciding until a stage of the rollout is passed: what a task of the rollout DAG runs."""

from __future__ import annotations

import sys
import time

import pyarrow as pa

from components.errors import BadInput, FreshetError
from components.rollout.config import RolloutConfig
from components.rollout.run import RolloutResult, apply, decide
from components.rollout.state import Alias
from components.storage import Storage

_ORDER = {"gate": 0, "approval": 0, "shadow": 1, "canary": 2, "promoted": 3}
_FAILED = ("rolled_back", "rejected")


class RolloutStopped(FreshetError):
    """The rollout ended without a promotion: to wait again changes nothing."""

    exit_code = 2


class ReadOnce(Storage):
    """Reads each file of the event log once: they never change, and a long stage has many thousands of them."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._tables: dict[tuple[str, ...], pa.Table] = {}

    def read_table_as(self, path: str, schema: pa.Schema) -> pa.Table:
        key = (path, *schema.names)
        if key not in self._tables:
            self._tables[key] = super().read_table_as(path, schema)
        return self._tables[key]


def follow(storage: Storage, config: RolloutConfig, result: RolloutResult, actions: tuple[Alias, ...]) -> RolloutResult:
    """Decide every `poll_s` seconds until the stage `until` is passed. A paused rollout waits for a person.

    RolloutStopped: rolled back or rejected. BadInput: another release took over, or nothing came within `wait_s`.
    """
    release = result.subject
    if release is None:
        raise BadInput("there is no rollout to wait for; start one with --action=start")
    named = {"ranker": release.ranker, "retriever": release.retriever}
    advance = config.model_copy(update={"action": "advance", **named})
    log = ReadOnce(storage.root)
    deadline, told, trouble = time.monotonic() + config.wait_s, "", None
    while True:
        if actions:
            actions, trouble = _try_apply(storage, actions, config.tracking_uri)
        told = _tell(result, config.wait_s, trouble, told)
        if not actions and _passed(result, config.until):
            return result
        if result.stage in _FAILED:
            raise RolloutStopped(f"{release} was {result.stage.replace('_', ' ')}: {result.reason}")
        if time.monotonic() > deadline:
            raise trouble or BadInput(
                f"{release} is still in stage {result.stage} after {_hours(config.wait_s)}, waiting for "
                f"{result.waiting_for}; give an order, then wait again"
            )
        time.sleep(config.poll_s)
        result, wanted = decide(log, advance)
        if result.changed:
            log = ReadOnce(storage.root)  # of the next stage: what was read for this one is let go
        actions = wanted if result.changed or actions else ()


def _passed(result: RolloutResult, until: str) -> bool:
    if result.champion == result.subject:
        return True
    return until != "promoted" and _ORDER.get(result.stage, -1) > _ORDER[until]


def _try_apply(
    storage: Storage, actions: tuple[Alias, ...], tracking_uri: str
) -> tuple[tuple[Alias, ...], FreshetError | None]:
    """What is left to apply, and why: traffic does not wait for the registry, which is tried again at the next poll."""
    try:
        apply(storage, actions, tracking_uri)
    except FreshetError as error:
        return actions, error
    return (), None


def _tell(result: RolloutResult, wait_s: float, trouble: FreshetError | None, told: str) -> str:
    """Say where the rollout stands, if that is news."""
    line = f"{result.stage}, challenger's share {result.share} of 10000: {result.reason}"
    if result.stage == "paused":
        line = f"PAUSED, waiting {_hours(wait_s)} at most for {result.waiting_for}. Why: {result.reason}"
    elif result.waiting_for:
        line += f" -- waiting for: {result.waiting_for}"
    if trouble:
        line += f" -- registry not yet updated: {trouble}"
    if line != told:
        print(line, file=sys.stderr, flush=True)
    return line


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h (--wait-s)"
