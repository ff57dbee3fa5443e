"""Windows: half-open event-time intervals [start, end) in UTC, the unit of continual training."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from components.errors import BadInput

_KEY_FORMAT = "%Y%m%dT%H%M%SZ"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_us(moment: datetime) -> int:
    """Microseconds since the epoch of an aware datetime, exactly (no float on the way)."""
    return (moment - EPOCH) // timedelta(microseconds=1)


def from_us(microseconds: int) -> datetime:
    """The UTC datetime of microseconds since the epoch."""
    return EPOCH + timedelta(microseconds=int(microseconds))


def parse_time(text: str) -> datetime:
    """Parse an ISO 8601 time or a window-key time; a time without a zone is read as UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(f"{text!r} is not a time; write it like 2022-05-01T00:00:00Z") from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


@dataclass(frozen=True, order=True)
class Window:
    """[start, end) in UTC at whole seconds; `key` names it in paths and as the Airflow partition key."""

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        if self.start.tzinfo is None or self.end.tzinfo is None:
            raise BadInput("a window needs times with a zone; use UTC")
        if self.start >= self.end:
            raise BadInput(f"window {self.key} is empty: its start must come before its end")
        if self.start.microsecond or self.end.microsecond:
            raise BadInput("window bounds are whole seconds, so that every window has one key")

    @property
    def key(self) -> str:
        return f"{self.start.astimezone(UTC):{_KEY_FORMAT}}-{self.end.astimezone(UTC):{_KEY_FORMAT}}"

    @property
    def start_us(self) -> int:
        return to_us(self.start)

    @property
    def end_us(self) -> int:
        return to_us(self.end)

    @classmethod
    def parse(cls, key: str) -> Window:
        """Parse START-END as written by `key`; raises BadInput with the expected form."""
        start, _, end = key.partition("-")
        try:
            bounds = [datetime.strptime(part, _KEY_FORMAT).replace(tzinfo=UTC) for part in (start, end)]
        except ValueError:
            raise BadInput(f"{key!r} is not a window; write START-END like 20220501T000000Z-20220502T000000Z") from None
        return cls(*bounds)

    @classmethod
    def starting(cls, start: datetime, length: timedelta) -> Window:
        return cls(start, start + length)

    def overlaps(self, other: Window) -> bool:
        return self.start < other.end and other.start < self.end
