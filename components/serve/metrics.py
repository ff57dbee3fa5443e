"""What the server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SLOW = (1, 10, 60, 600, 3600, 6 * 3600, 86400, 7 * 86400)
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.requests = Counter("freshet_requests_total", "Requests answered", ["route", "status", "track"], registry=r)
        self.latency = Histogram("freshet_request_seconds", "Time to answer", ["route"], buckets=_FAST, registry=r)
        self.scoring = Histogram("freshet_scoring_seconds", "Time to score", ["track"], buckets=_FAST, registry=r)
        self.event_age = Gauge(
            "freshet_served_event_age_seconds",
            "Now minus the newest event that the served parameters learned from",
            ["model", "version", "track"],
            registry=r,
        )
        self.delta = Gauge(
            "freshet_delta_number", "Sync point of the served parameters", ["model", "version", "track"], registry=r
        )
        self.rows = Gauge(
            "freshet_table_rows", "Rows in all embedding tables", ["model", "version", "track"], registry=r
        )
        self.apply = Histogram(
            "freshet_apply_seconds",
            "Time for which requests wait while a delta goes live",
            ["model"],
            buckets=_FAST,
            registry=r,
        )
        self.sync_errors = Counter("freshet_sync_errors_total", "Looks for new parameters that failed", registry=r)
        self.log_corrupt = Gauge(
            "freshet_parameter_log_corrupt",
            "1 while a log cannot be applied; the parameters before the damage keep serving",
            ["model", "version"],
            registry=r,
        )
        self.resyncs = Counter("freshet_resyncs_total", "Full reloads after a damaged log", ["model"], registry=r)
        self.events = Counter("freshet_events_total", "Events received", ["kind", "outcome"], registry=r)
        self.delay = Histogram(
            "freshet_event_delay_seconds",
            "From an event to its arrival; join's max_lateness_s and memory_s are bounds on it",
            ["kind"],
            buckets=_SLOW,
            registry=r,
        )
        self.unmatched = Counter(
            "freshet_unmatched_actions_total", "Actions whose impression is not known (yet)", registry=r
        )
        self.shadow = Counter(
            "freshet_shadow_requests_total",
            "Requests that the challenger scored unseen: scored, failed, or dropped under load",
            ["outcome"],
            registry=r,
        )
        self.fallbacks = Counter(
            "freshet_challenger_fallbacks_total",
            "Requests of the challenger's users answered by the champion because the challenger is not loaded",
            registry=r,
        )

    def watch(self, name: str, description: str, read: Callable[[], float]) -> None:
        """A gauge that is read when Prometheus asks."""
        Gauge(name, description, registry=self.registry).set_function(read)

    def answered(self) -> int:
        """Requests answered so far."""
        return _total(self.requests)

    def recorded(self) -> int:
        """Events accepted so far."""
        return _total(self.events, outcome="accepted")

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


def _total(counter: Counter, **labels: str) -> int:
    samples = (sample for metric in counter.collect() for sample in metric.samples if sample.name.endswith("_total"))
    return int(sum(s.value for s in samples if all(s.labels[name] == value for name, value in labels.items())))
