"""Bodies of the HTTP API: what the OpenAPI page shows is what is checked."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, field_validator, model_validator
from pydantic_core import PydanticCustomError

from components.errors import BadInput
from components.schemas import ACTIONS, action_bit

INT64_MAX = 2**63 - 1
MAX_ITEMS = 200
MAX_EXCLUDE = 10_000
MAX_EVENTS = 10_000
"""Rows per list: while they are checked (a second per some 20,000), nobody else is answered."""

Id = Annotated[int, Field(strict=True, ge=-(2**63), le=INT64_MAX)]
Int32 = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Track = Literal["champion", "challenger"]


class Strict(BaseModel):
    """Unknown fields are refused: a misspelt field is not silently ignored."""

    model_config = ConfigDict(extra="forbid")


class RecommendBody(Strict):
    """Who asks, and for how much."""

    user_id: Id = Field(description="the user; one never seen before is fine", examples=[42])
    k: Annotated[int, Field(strict=True)] = Field(10, ge=1, le=MAX_ITEMS, description="items wanted", examples=[10])
    page: Id = Field(0, description="where they will be shown (a category of yours; 0 = none)", examples=[0])
    exclude: list[Id] = Field(
        [],
        max_length=MAX_EXCLUDE,
        description="items not to recommend, e.g. what the user has just seen",
        examples=[[7]],
    )


class RankBody(Strict):
    """Candidates to put in order."""

    user_id: Id = Field(description="the user; one never seen before is fine", examples=[42])
    candidates: list[Id] = Field(
        min_length=1, description="item ids to rank; their number is limited by max_candidates", examples=[[101, 102]]
    )
    page: Id = Field(0, description="where they will be shown (a category of yours; 0 = none)", examples=[0])


class ImpressionIn(Strict):
    """An item that was shown. Copy request_id, version, delta, track and score from the answer that it came from."""

    request_id: Id = Field(description="of the answer, or your own for what Freshet did not recommend", examples=[1])
    user_id: Id = Field(description="who saw it", examples=[42])
    item_id: Id = Field(description="what was shown", examples=[101])
    timestamp_us: Id = Field(
        description="time of the request, microseconds since 1970 UTC (timestamp_us of the answer)",
        examples=[1_760_000_000_000_000],
    )
    position: Int32 = Field(0, description="place on the page, from 0", examples=[0])
    page: Id = Field(0, description="where it was shown; the page of the request", examples=[0])
    version: Int32 | None = Field(None, description="ranker version that scored it", examples=[1])
    delta: Annotated[int, Field(strict=True, ge=0, le=INT64_MAX)] | None = Field(
        None, description="delta number of that ranker", examples=[3]
    )
    track: Track | None = Field(None, description="track of the answer", examples=["champion"])
    score: Annotated[float, Field(allow_inf_nan=False, ge=-3e38, le=3e38)] | None = Field(
        None, description="score in the answer", examples=[0.71]
    )


class ActionIn(Strict):
    """What the user did with an impression: request_id, user_id and item_id say which."""

    request_id: Id = Field(description="of the impression", examples=[1])
    user_id: Id = Field(description="who acted", examples=[42])
    item_id: Id = Field(description="on what", examples=[101])
    timestamp_us: Id = Field(
        description="time of the action, microseconds since 1970 UTC", examples=[1_760_000_005_000_000]
    )
    action: str = Field(description=f"one of {', '.join(ACTIONS)}", examples=["click"])
    value: Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e9)] | None = Field(
        None, description="seconds for watch, stars for rating; nothing for the others", examples=[None]
    )

    @field_validator("action")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            action_bit(name)
        except BadInput as error:
            raise PydanticCustomError("unknown_action", "{reason}", {"reason": str(error)}) from error
        return name

    @model_validator(mode="after")
    def _has_value(self) -> ActionIn:
        if self.action in ("watch", "rating") and self.value is None:
            unit = "seconds" if self.action == "watch" else "stars"
            raise PydanticCustomError("no_value", "{reason}", {"reason": f"{self.action} needs a value in {unit}"})
        return self


@dataclass(frozen=True)
class Refused:
    """A row that is not an event, and why."""

    row: Any
    reason: str


def explain(error: ValidationError) -> str:
    """'field: message' of each problem."""
    parts = (".".join(map(str, e["loc"])) + ": " + e["msg"] if e["loc"] else e["msg"] for e in error.errors())
    return "; ".join(parts)


def _refuse(row: Any, handler: Any) -> Any:
    try:
        return handler(row)
    except ValidationError as error:
        return Refused(row, explain(error))


class EventsBody(Strict):
    """Impressions and actions, in any mix. A bad row is refused on its own; the others are recorded.

    Send more rows than a list takes in several requests.
    """

    impressions: list[Annotated[ImpressionIn, WrapValidator(_refuse)]] = Field(
        [], max_length=MAX_EVENTS, description="what was shown"
    )
    actions: list[Annotated[ActionIn, WrapValidator(_refuse)]] = Field(
        [], max_length=MAX_EVENTS, description="what was done with it"
    )


class RecommendedItem(BaseModel):
    """One recommended item."""

    item_id: int = Field(description="the item", examples=[101])
    score: float = Field(description="weighted sum of the predicted action probabilities", examples=[0.71])
    position: int = Field(description="place in the answer, from 0", examples=[0])
    explored: bool = Field(description="a random item, shown so that new items get seen", examples=[False])


class Recommended(BaseModel):
    """Items, best first; log them as impressions with the numbers given here."""

    request_id: int = Field(description="names this answer in events; below 2^53", examples=[1_760_000_000_000_000])
    timestamp_us: int = Field(
        description="time of the request: events known before it were used", examples=[1_760_000_000_000_000]
    )
    user_id: int = Field(examples=[42], description="the user asked for")
    items: list[RecommendedItem] = Field(description="best first, except the explored ones")
    version: int = Field(description="ranker version", examples=[1])
    retriever_version: int = Field(description="retriever version", examples=[1])
    delta: int = Field(description="delta number of the ranker", examples=[3])
    track: Track = Field(description="track that served this user", examples=["champion"])


class RankedItem(BaseModel):
    """One candidate."""

    item_id: int = Field(description="the item", examples=[101])
    score: float = Field(description="weighted sum of the predicted action probabilities", examples=[0.71])
    scores: dict[str, float] = Field(description="probability of each action", examples=[{"click": 0.4}])
    position: int = Field(description="place in the order, from 0", examples=[0])
    known: bool = Field(
        description="false: nothing has been learned of this item yet, its score rests on its initial embedding",
        examples=[True],
    )


class Ranked(BaseModel):
    """The candidates, best first; an item given twice appears once."""

    request_id: int = Field(description="names this answer in events; below 2^53", examples=[1_760_000_000_000_000])
    timestamp_us: int = Field(
        description="time of the request: events known before it were used", examples=[1_760_000_000_000_000]
    )
    user_id: int = Field(examples=[42], description="the user asked for")
    items: list[RankedItem] = Field(description="best first")
    version: int = Field(description="ranker version", examples=[1])
    delta: int = Field(description="delta number of the ranker", examples=[3])
    track: Track = Field(description="track that served this user", examples=["champion"])


class Rejection(BaseModel):
    """A row that was not recorded (it is kept in quarantine)."""

    kind: Literal["impression", "action"] = Field(description="which list it was in")
    index: int = Field(description="its place in that list", examples=[0])
    reason: str = Field(
        description="what is wrong with it", examples=["unknown action 'clik'; known actions are click, like"]
    )


class EventsRecorded(BaseModel):
    """What became of the events. Accepted ones are on disk."""

    accepted: int = Field(description="rows recorded", examples=[2])
    rejected: list[Rejection] = Field(description="rows refused, each with the reason")
    unmatched_actions: int = Field(
        description="recorded actions whose impression is not known yet; the join decides later", examples=[0]
    )


class Problem(BaseModel):
    """An error: what is wrong, and what to do."""

    error: str = Field(description="what is wrong, and what to do", examples=["candidates: at least 1 item is needed"])
    detail: list[dict[str, str]] = Field([], description="field and message, where a field is to blame")


class VersionStatus(BaseModel):
    """One model of a track."""

    version: int = Field(description="registered version")
    delta: int = Field(description="sync point being served")
    served_event_age_s: float | None = Field(
        description="now minus the newest event that the parameters learned from; null = none known"
    )
    rows: int = Field(description="rows in all embedding tables")
    unknown_items: float | None = Field(
        default=None,
        description="share of the items looked up that it never learned; near 1: the catalogue and the log name items "
        "differently, for example only one was ingested with --string-ids; null = none looked up yet",
    )
    error: str | None = Field(description="why its parameter log cannot be followed; null = all is well")


class Counts(BaseModel):
    """Requests of the rollout's stage, as far as this server has run in it."""

    requests: int = Field(description="requests answered or failed")
    errors: int = Field(description="requests failed")
    empty: int = Field(description="requests for which no item was found")
    p99_ms: float | None = Field(description="99th percentile of the newest latencies; null = no request yet")


class TrackStatus(Counts):
    """A track: what serves its users, and the counts of their requests."""

    version: int = Field(description="ranker version")
    retriever_version: int = Field(description="retriever version")
    ranker: VersionStatus = Field(description="the ranker's sync")
    retriever: VersionStatus = Field(description="the retriever's sync")
    shadow: Counts = Field(description="requests that it scored unseen")


class Status(BaseModel):
    """What this server does right now."""

    ready: bool = Field(description="whether requests are answered")
    reason: str | None = Field(description="why not, and what to do")
    stage: str = Field(description="stage of the rollout")
    stage_since: datetime = Field(description="when it began: requests are counted from then on")
    share: int = Field(description="of 10,000 user buckets, how many the challenger serves")
    shadow_share: float = Field(description="share of requests that the challenger scores unseen")
    tracks: dict[str, TrackStatus] = Field(description="champion, and challenger during a rollout")
    errors: dict[str, str] = Field(description="trouble at the latest sync, by version")
    items: int = Field(description="items in the catalogue")
    users: int = Field(description="users with a history in memory")
    journal_bytes: int = Field(description="recorded, on disk, not yet in the event log")
    uptime_s: float = Field(description="seconds since the start")
