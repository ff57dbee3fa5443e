"""The versions in memory and who is served by which: follows the rollout record and each version's parameter log."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from components.errors import BadInput, FreshetError
from components.rollout import record
from components.rollout.assignment import serves_challenger
from components.rollout.state import Release, RolloutState
from components.serve.config import ServeConfig
from components.serve.items import ItemFolder
from components.serve.loaded import RETRY_S, LoadedVersion, weight_vector
from components.serve.metrics import Metrics
from components.storage import Storage
from model.ranker import Ranker

TrackName = Literal["champion", "challenger"]
log = logging.getLogger("freshet.serve.sync")


class NotReady(FreshetError):
    """The server cannot answer yet: HTTP 503."""


@dataclass(frozen=True)
class Track:
    """A release that serves: its ranker and its retriever."""

    name: TrackName
    ranker: LoadedVersion
    retriever: LoadedVersion
    since: datetime  # of the stage of the rollout in which it serves

    @property
    def release(self) -> Release:
        return Release(ranker=self.ranker.version, retriever=self.retriever.version)

    def versions(self) -> tuple[LoadedVersion, LoadedVersion]:
        return self.ranker, self.retriever


@dataclass(frozen=True)
class Failure:
    """Why a version could not be loaded, and when to try again (monotonic seconds)."""

    message: str
    retry_at: float


@dataclass(frozen=True)
class Tracks:
    """One consistent view: the rollout state and the tracks that it names, as far as they are loaded."""

    state: RolloutState
    champion: Track | None
    challenger: Track | None


class Engine:
    """Loads, syncs and hands out tracks. `sync` runs in one thread at a time; `assign` in any."""

    def __init__(self, storage: Storage, items: ItemFolder, metrics: Metrics, config: ServeConfig) -> None:
        """A model that looks back further than config.history_interactions is warned about."""
        self.storage, self.items, self.metrics, self.config = storage, items, metrics, config
        self.errors: dict[str, str] = {}
        self._found: dict[str, str] = {}  # of the round of sync at work
        self.tracks: Tracks | None = None
        self._loaded: dict[tuple[str, int], LoadedVersion] = {}
        self._failed: dict[tuple[str, int], Failure] = {}
        self._lock = threading.Lock()

    def sync(self) -> str:
        """Follow the record and the logs once. Returns a line that says what is served; never raises for bad logs.

        BadInput: the record has lost entries, as when the store is not mounted; what is loaded keeps serving.
        """
        with self._lock:
            self._found = {}
            state = record.current(self.storage)
            if self.tracks is not None and state.seq < self.tracks.state.seq:
                raise BadInput(
                    f"{self.storage.root} has lost the rollout's decision {self.tracks.state.seq}, which is served: "
                    "bring the store back, or restart the server to follow what is there now"
                )
            applied = sum(self._sync_version(version) for version in list(self._loaded.values()))
            champion = self._track("champion", state.champion, state)
            challenger = self._track("challenger", state.challenger, state)
            if state.previous is not None:
                self._track("champion", state.previous, state)  # stays loaded: a rollback is a change of pointer
            self.errors = self._found  # at once: a reader never sees a round that is half done
            self._publish(state, champion, challenger)
            self._forget_unused()
            self._measure()
            return self._line(applied)

    def assign(self, user_id: int) -> Track:
        """The track of a user: sticky, by hash. NotReady while no champion is loaded."""
        tracks = self.tracks
        if tracks is None or tracks.champion is None:
            raise NotReady(self.why_not_ready() or "no champion is loaded yet; try again in a moment")
        state = tracks.state
        if state.challenger is not None and serves_challenger(user_id, state.salt, state.share):
            if tracks.challenger is not None:
                return tracks.challenger
            self.metrics.fallbacks.inc()
        return tracks.champion

    def why_not_ready(self) -> str | None:
        """What is missing before requests can be answered, and what to do; None when ready."""
        tracks = self.tracks
        if (tracks is None or tracks.champion is None) and self.errors:
            return "; ".join(self.errors.values())
        if tracks is None:
            return "the server is starting: it reads the event log and loads parameters; try again in a moment"
        if tracks.champion is None:
            return (
                "no champion: nothing has been released yet; run the pretrain and rollout DAGs, "
                "or python -m components.rollout --action=start --until=promoted"
            )
        if not len(self.items.items):
            return "no items: the catalogue is empty; ingest items (python -m components.ingest --help)"
        return None

    def set_catalogue(self) -> None:
        """Hand the newest side features of items to every loaded model."""
        with self._lock:
            for version in self._loaded.values():
                version.set_catalogue(self.items.items.catalogue)

    def _sync_version(self, version: LoadedVersion) -> int:
        applied = version.sync()
        if version.error is not None:
            self._found[version.label()] = version.error
        return applied

    def _track(self, name: TrackName, release: Release | None, state: RolloutState) -> Track | None:
        if release is None:
            return None
        ranker = self._version("ranker", release.ranker)
        retriever = self._version("retriever", release.retriever)
        return Track(name, ranker, retriever, state.stage_since) if ranker and retriever else None

    def _version(self, model: str, version: int) -> LoadedVersion | None:
        key = (model, version)
        if key not in self._loaded:
            failure = self._failed.get(key)
            if failure is None or time.monotonic() >= failure.retry_at:
                self._load(key)
        if key in self._failed:
            self._found[f"{model} {version}"] = self._failed[key].message
        return self._loaded.get(key)

    def _load(self, key: tuple[str, int]) -> None:
        started = time.perf_counter()
        try:
            loaded = LoadedVersion(
                self.storage, *key, self.items.items.catalogue, self.metrics, self.config.table_precision
            )
            with loaded.reading() as served:
                if isinstance(served.model, Ranker):  # else it would fail every request
                    weight_vector(served.model.head_names, self.config.weights(), loaded.label())
        except FreshetError as error:
            if key not in self._failed or self._failed[key].message != str(error):
                log.error("%s %d cannot be loaded: %s", *key, error)
            self._failed[key] = Failure(str(error), time.monotonic() + RETRY_S)
            self.metrics.sync_errors.inc()
            return
        self._failed.pop(key, None)
        self._loaded[key] = loaded
        if loaded.error is not None:
            self._found[loaded.label()] = loaded.error
        log.info("%s loaded at %d in %.2f s", loaded.label(), loaded.n, time.perf_counter() - started)
        if loaded.reach() > self.config.history_interactions:
            log.warning(
                "%s looks back %d events but --history-interactions=%d keeps fewer: its scores will differ from "
                "training; raise the setting",
                loaded.label(),
                loaded.reach(),
                self.config.history_interactions,
            )

    def _publish(self, state: RolloutState, champion: Track | None, challenger: Track | None) -> None:
        old = self.tracks.champion if self.tracks else None
        if champion is None and state.champion is not None and old is not None:
            log.error("champion %s is not loaded; %s keeps serving", state.champion, old.release)
            champion = replace(old, since=state.stage_since)
        self.tracks = Tracks(state, champion, challenger)

    def _forget_unused(self) -> None:
        """Keep champion, challenger and the champion before, to which a rollback returns at once."""
        tracks = self.tracks
        assert tracks is not None
        used = [track.release for track in (tracks.champion, tracks.challenger) if track is not None]
        state = tracks.state
        used += [r for r in (state.champion, state.challenger, state.previous) if r is not None]
        keep = {("ranker", r.ranker) for r in used} | {("retriever", r.retriever) for r in used}
        for key in (self._loaded.keys() | self._failed.keys()) - keep:
            log.info("%s %d is no longer needed", *key)
            self._loaded.pop(key, None)
            self._failed.pop(key, None)
            self.metrics.log_corrupt.remove(*key)

    def _measure(self) -> None:
        for gauge in (self.metrics.event_age, self.metrics.delta, self.metrics.rows):
            gauge.clear()
        for track in self.live():
            for version in track.versions():
                labels = (version.name, version.version, track.name)
                self.metrics.delta.labels(*labels).set(version.n)
                self.metrics.rows.labels(*labels).set(version.rows())
                if version.learned_until_us is not None:
                    self.metrics.event_age.labels(*labels).set(time.time() - version.learned_until_us / 1e6)

    def live(self) -> list[Track]:
        """Champion and challenger, as far as they are loaded."""
        tracks = self.tracks
        return [t for t in (tracks.champion, tracks.challenger) if t is not None] if tracks else []

    def _line(self, applied: int) -> str:
        served = ", ".join(
            f"{track.name} " + " ".join(f"{v.name}={v.version}@{v.n}" for v in track.versions())
            for track in self.live()
        )
        assert self.tracks is not None
        trouble = f", {len(self.errors)} errors: {'; '.join(self.errors)}" if self.errors else ""
        return f"stage {self.tracks.state.stage}: {served or 'nothing to serve'}, {applied} deltas applied{trouble}"
