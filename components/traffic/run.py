"""Live synthetic users: they ask the server for recommendations and answer with actions from their true preferences.

  python -m components.traffic --duration-s=300 --rate=6 --shift-at=2025-01-07T12:03:00Z --day-s=600
  python -m components.traffic --duration-s=0                   until stopped with Ctrl-C or SIGTERM

The world is the one whose history is in the storage root (python -m components.ingest). Each request shows a slate;
impressions are posted at once, with the version, delta, track and score that served them, actions when they happen:
the world's delays times --delay-scale, at most --max-delay-s. Items that appear are written to the catalogue. A server
that is away is waited for; when it stays away for --give-up-s the run fails. The result counts requests, clicks per
track and phase, the click rate that random items would have had, refusals and latency.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import numpy as np

from components.errors import FreshetError
from components.storage import Storage
from components.traffic.client import Client, Refused
from components.traffic.config import TrafficConfig
from components.traffic.outbox import Outbox
from components.traffic.publisher import Publisher, live_world
from components.traffic.summary import Tally, TrafficResult, percentile_ms
from components.traffic.users import Users
from components.world.world import World

REPORT_EVERY_S = 5.0


def run(config: TrafficConfig, transport: httpx.AsyncBaseTransport | None = None) -> TrafficResult:
    """Run live users against the server; `transport` replaces the network in tests.

    Raises BadInput when the root holds no world, and FreshetError when the server stays away or refuses everything.
    """
    storage = Storage(config.root)
    world_config, day_changed = live_world(storage, config)
    world = World(world_config)
    try:
        return asyncio.run(_Run(config, world, Publisher(storage, world, day_changed), transport).run())
    except BaseExceptionGroup as group:
        expected, other = group.split(FreshetError)
        if other or not expected:
            raise
        raise _first(expected) from None


def _first(group: BaseException) -> BaseException:
    return _first(group.exceptions[0]) if isinstance(group, BaseExceptionGroup) else group


@dataclass
class _Run:
    """One run: a producer of requests, a sender of events, a publisher of items and a reporter, until stopped."""

    config: TrafficConfig
    world: World
    publisher: Publisher
    transport: httpx.AsyncBaseTransport | None
    tally: Tally = field(default_factory=Tally)

    async def run(self) -> TrafficResult:
        self.started = time.monotonic()
        self.client = Client(self.config.server, self.config.give_up_s, self.transport)
        self.outbox = Outbox(self.client)
        self.users = Users(self.world, self.config, self.tally)
        self.stop = asyncio.Event()
        self.done = asyncio.Event()
        self._stop_on_signals()
        try:
            await asyncio.to_thread(self.publisher.publish)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send_events())
                group.create_task(self._publish_items())
                group.create_task(self._report())
                await self._make_requests()
                self.done.set()
        finally:
            await self.client.close()
        return self._result()

    async def _make_requests(self) -> None:
        """Start requests at Poisson moments until a limit or a signal; return when all are answered."""
        moments = np.random.default_rng([self.config.seed, 2**31])
        free = asyncio.Semaphore(self.config.concurrency)
        number, due = 0, time.monotonic()
        async with asyncio.TaskGroup() as group:
            while not self._finished(number):
                due = max(due + moments.exponential(1 / self.config.rate), time.monotonic() - 1.0)
                await _wait(self.stop, due - time.monotonic())
                if self.stop.is_set() or self._finished(number):
                    break
                await free.acquire()
                group.create_task(self._request(number)).add_done_callback(lambda _: free.release())
                number += 1

    def _finished(self, number: int) -> bool:
        over = self.config.duration_s and time.monotonic() - self.started >= self.config.duration_s
        return bool(self.stop.is_set() or over or (self.config.requests and number >= self.config.requests))

    async def _request(self, number: int) -> None:
        rng = self.users.generator(number)
        user, page = self.users.choose(rng)
        try:
            answer = await self.client.recommend(user, self.config.slate, page)
        except Refused as refusal:
            self.tally.refused[str(refusal)] += 1
            return
        if not answer.items:
            self.tally.empty += 1
            return
        answered = asyncio.get_running_loop().time()
        for kind, event, delay in self.users.react(rng, answer, page):
            self.outbox.put(kind, event, answered + delay)

    async def _send_events(self) -> None:
        """Send until the requests are over and every event that they lead to has been acknowledged."""
        while not (self.done.is_set() and len(self.outbox) == 0):
            await self.outbox.flush()
            await asyncio.sleep(self.config.flush_every_s)

    async def _publish_items(self) -> None:
        while not self.done.is_set():
            await asyncio.to_thread(self.publisher.publish)
            await _wait(self.done, self.config.publish_every_s)

    async def _report(self) -> None:
        while not self.done.is_set():
            await _wait(self.done, REPORT_EVERY_S)
            total = self.tally.share("total")
            latency = percentile_ms(self.client.latencies[-200:], 50)
            print(
                f"{time.monotonic() - self.started:5.0f} s  requests {total.requests}  clicks {total.clicks}  "
                f"click rate {total.click_rate or 0:.3f}  latency {latency or 0:.0f} ms  retries {self.client.retries}",
                file=sys.stderr,
                flush=True,
            )

    def _stop_on_signals(self) -> None:
        """SIGINT and SIGTERM end the run with its summary (only a main thread can listen)."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(number, self.stop.set)
            except (RuntimeError, ValueError):
                return

    def _result(self) -> TrafficResult:
        total = self.tally.share("total")
        if self.tally.refused and total.requests == 0:
            answer, count = self.tally.refused.most_common(1)[0]
            raise FreshetError(f"the server refused every request ({count} times: {answer}); repair it and try again")
        return TrafficResult(
            total=total,
            tracks=self.tally.shares("track"),
            phases=self.tally.shares("phase"),
            actions=dict(sorted(self.tally.actions.items())),
            duplicates=self.tally.duplicates,
            accepted=self.outbox.accepted,
            rejected=dict(self.outbox.rejected),
            unmatched_actions=self.outbox.unmatched,
            refused_requests=dict(self.tally.refused),
            empty_slates=self.tally.empty,
            unavailable_items=self.tally.gone,
            items_published=self.publisher.published,
            retries=self.client.retries,
            latency_p50_ms=percentile_ms(self.client.latencies, 50),
            latency_p99_ms=percentile_ms(self.client.latencies, 99),
            duration_s=round(time.monotonic() - self.started, 3),
        )


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event, but not longer than `seconds`."""
    if seconds > 0:
        with suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)
