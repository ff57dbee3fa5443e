"""One server process without its HTTP face: parts, background loops, start and stop."""

from __future__ import annotations

import logging
import threading
import time

import pyarrow as pa

from components.rollout.state import RolloutState
from components.schemas import IMPRESSIONS
from components.serve.api import Status, TrackStatus, VersionStatus
from components.serve.config import ServeConfig
from components.serve.engine import Engine, NotReady, Track
from components.serve.eventfiles import EventFiles
from components.serve.history import History
from components.serve.intake import Intake
from components.serve.items import ItemFolder
from components.serve.journal import Journal, ship_orphans
from components.serve.loaded import LoadedVersion
from components.serve.metrics import Metrics
from components.serve.recommender import Recommender
from components.serve.shadow import Shadow
from components.serve.tally import Tally
from components.storage import Storage

log = logging.getLogger("freshet.serve")


class Server:
    """Owns the journal, the history, the loaded versions and the threads that keep them fresh."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.storage = Storage(config.root)
        self.metrics = Metrics()
        self.tally = Tally()
        self.items = ItemFolder(self.storage)
        self.history = History(
            config.history_interactions, config.history_users, config.attribution_window_s * 1_000_000
        )
        self.files = EventFiles(self.storage, self.history, config.history_days)
        self.engine = Engine(self.storage, self.items, self.metrics, config)
        self.intake = Intake(self.history, self.metrics, config.future_tolerance_s)
        self.shadow = Shadow(config.weights(), config.candidates, self.tally, self.metrics)
        self.recommender = Recommender(
            config, self.engine, self.history, self.items, self.shadow, self.tally, self.metrics
        )
        self._journal: Journal | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="sync", daemon=True)
        self._started = time.monotonic()
        self._refreshed = 0.0

    @property
    def journal(self) -> Journal:
        """The journal; NotReady before `start`."""
        if self._journal is None:
            raise NotReady("the server is starting; try again in a moment")
        return self._journal

    def open_journal(self) -> None:
        """Take the journal and ship what a crash left; BadInput if another server holds it. `start` does it too."""
        if self._journal is not None:
            return
        # the first conversion loads pandas, for a second or more: not during a request
        pa.Table.from_pylist([], IMPRESSIONS)
        folder = self.config.journal_folder()
        self._journal = Journal(folder, self.storage, self.config.flush_interval_s)
        if not self.config.journal:
            ship_orphans(folder, self.storage)
        self.shadow.journal = self._journal
        watch = self.metrics.watch
        watch("freshet_journal_bytes", "Recorded, on disk, not yet in the event log", lambda: self.journal.size())
        watch("freshet_history_users", "Users with a history in memory", lambda: len(self.history))
        watch("freshet_history_evicted_users", "Users dropped for lack of room", lambda: self.history.evicted)

    def start(self) -> None:
        """Begin to load and to follow in the background; events are taken at once."""
        self.open_journal()
        self._thread.start()

    def stop(self) -> None:
        """Stop the loops and write every recorded event to the event log."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self.shadow.close()
        if self._journal is not None:
            self._journal.close()

    def status(self) -> Status:
        """What `GET /v1/status` shows."""
        reason, tracks = self.engine.why_not_ready(), self.engine.tracks
        state = tracks.state if tracks else RolloutState()
        return Status(
            ready=reason is None,
            reason=reason,
            **state.model_dump(include={"stage", "stage_since", "share", "shadow_share"}),
            tracks={track.name: self._track(track) for track in self.engine.live()},
            errors=dict(self.engine.errors),
            items=len(self.items.items),
            users=len(self.history),
            journal_bytes=self.journal.size(),
            uptime_s=time.monotonic() - self._started,
        )

    def sync(self) -> str:
        """One round of following: items and event files when due, then the rollout record and the parameter logs."""
        if time.monotonic() - self._refreshed >= self.config.history_refresh_s or not self._refreshed:
            if self.items.refresh():
                self.engine.set_catalogue()
            self.files.refresh(f"server-{self.journal.server}-")
            self._refreshed = time.monotonic()
        return self.engine.sync()

    def _follow(self) -> None:
        import torch._dynamo  # noqa: F401  operators load it when first called, for seconds: not during a request

        last = ""
        while not self._stop.is_set():
            try:
                line = self.sync()
                log.log(logging.INFO if line != last else logging.DEBUG, "%s", line)
            except Exception as error:
                line = f"{type(error).__name__}: {error}"
                self.metrics.sync_errors.inc()
                self.engine.errors = {"sync": line}
                if line != last:
                    log.exception("sync failed; what is loaded keeps serving")
            last = line
            self._stop.wait(self.config.sync_interval_s)

    def _track(self, track: Track) -> TrackStatus:
        return TrackStatus(
            version=track.ranker.version,
            retriever_version=track.retriever.version,
            **self.tally.read(track.since, track.release, "serving").model_dump(),
            shadow=self.tally.read(track.since, track.release, "shadow"),
            ranker=_version(track.ranker),
            retriever=_version(track.retriever),
        )


def _version(version: LoadedVersion) -> VersionStatus:
    learned = version.learned_until_us
    return VersionStatus(
        version=version.version,
        delta=version.n,
        served_event_age_s=None if learned is None else time.time() - learned / 1e6,
        rows=version.rows(),
        unknown_items=version.unknown_items(),
        error=version.error,
    )
