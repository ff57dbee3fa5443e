"""The join of one window: impressions and actions in, interactions and quarantine out.

The fate of an impression (unique by request_id, item_id: its first arrival counts), for the window [start, end):

    known           an earlier join emitted or quarantined it
    new             its time lies in the window: emitted
    late            its time lies in a window joined before, at most max_lateness before start: emitted here
    too_late        like late, but longer ago: quarantined
    before_history  before everything ever joined: left alone (join an earlier window to take it in)
    in_gap          between joined windows: left alone until its own window is joined

The fate of an action (unique by request_id, user_id, item_id, action: its earliest event counts):

    known           an earlier join attributed or quarantined it
    attributed      0 <= action time - impression time <= attribution_window, impression emitted here
    quarantined     late_action (its impression was emitted by an earlier join), before_impression,
                    outside_attribution_window, unknown_action, or no_impression (once none can come any more)
    pending         its impression may still come, or waits for its own window: the next joins look at it again
    ahead           the same, and its own time lies after the window

An impression can still come while action time >= end - max_lateness, since it is not after its action and the next
window takes in what is at most max_lateness before its own start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from components.schemas import ACTIONS, INTERACTIONS, action_bit
from components.windows import Window
from spark_jobs.event_log import in_any

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

IMPRESSION_KEY: Final = ("request_id", "item_id")
ACTION_KEY: Final = ("request_id", "user_id", "item_id", "action")
EMITTED: Final = ("new", "late")
ACTION_REASONS: Final = (
    "no_impression",
    "outside_attribution_window",
    "late_action",
    "before_impression",
    "unknown_action",
)
REASONS: Final = ("too_late", *ACTION_REASONS)
SETTLED: Final = (*EMITTED, "attributed", *REASONS)
"""Fates that are decided here and for good."""
_FIRST_IMPRESSION = ("received_us", "timestamp_us", "user_id", "position", "page", "version", "delta", "track", "score")
_FIRST_ACTION = ("timestamp_us", "received_us", "value")
SECOND: Final = 1_000_000


@dataclass(frozen=True)
class Rules:
    """What decides the fate of an event, besides the events: the window, the bounds (s), the windows joined before.

    `memory_s` is how far before the lateness bound the join still knows what earlier joins did and still looks for
    files that came too late.
    """

    window: Window
    attribution_window_s: int
    max_lateness_s: int
    memory_s: int
    joined: list[Window] = field(default_factory=list)

    @property
    def attribution_us(self) -> int:
        return self.attribution_window_s * SECOND

    @property
    def oldest_us(self) -> int:
        """The oldest impression time that is still emitted."""
        return self.window.start_us - self.max_lateness_s * SECOND

    @property
    def settled_us(self) -> int:
        """Before this time no further impression is ever emitted, so an action without one has none."""
        return self.window.end_us - self.max_lateness_s * SECOND

    @property
    def history_start_us(self) -> int:
        return min(window.start_us for window in [*self.joined, self.window])

    @property
    def remembered(self) -> list[Window]:
        """The windows joined before whose results this join has to know; later ones too, when it fills a gap."""
        reach = self.memory_s + self.max_lateness_s + self.attribution_window_s + 3600  # files hold whole hours
        return [w for w in self.joined if w.end > self.window.start - timedelta(seconds=reach)]


@dataclass(frozen=True)
class Joined:
    """Every impression and action that the join has looked at, once each, with its `fate`."""

    impressions: DataFrame
    actions: DataFrame

    def cache(self) -> Joined:
        return Joined(self.impressions.cache(), self.actions.cache())

    def unpersist(self) -> None:
        self.impressions.unpersist()
        self.actions.unpersist()


def join(
    impressions: DataFrame, actions: DataFrame, published: DataFrame, quarantined: DataFrame, rules: Rules
) -> Joined:
    """Decide the fate of each event.

    impressions, actions: log rows as of `event_log.read_events`; published: interactions of earlier joins;
    quarantined: quarantine rows of earlier joins (both of `Rules.remembered`).
    """
    from pyspark.sql import functions as F

    emitted = published.select(*IMPRESSION_KEY, "user_id", F.unix_micros("timestamp").alias("shown_us"), "actions")
    judged = _judge_impressions(impressions, emitted, _keys(quarantined, "impression"), rules)
    return Joined(judged, _judge_actions(actions, judged, emitted, _keys(quarantined, "action"), rules))


def _after(event: Column, known: Column) -> Column:
    """An action that arrives before its impression becomes known with it: until then nobody knows what it is about."""
    from pyspark.sql import functions as F

    return event.withField("known_at", F.greatest(event["known_at"], known))


def interactions(joined: Joined) -> DataFrame:
    """The interactions that the window emits, columns of `components.schemas.INTERACTIONS`, in no order."""
    from pyspark.sql import functions as F

    event = F.struct(
        F.greatest("timestamp_us", "received_us").alias("known_at"),
        F.col("mask"),
        F.coalesce(F.col("value").cast("float"), F.lit(0.0).cast("float")).alias("value"),
    )
    watch = F.when(F.col("action") == "watch", F.col("value").cast("float"))
    taken = (
        joined.actions.where(F.col("fate") == "attributed")
        .groupBy(*IMPRESSION_KEY)
        .agg(
            F.bit_or("mask").alias("actions"),
            F.max(watch).alias("watch_s"),
            F.array_sort(F.collect_list(event)).alias("events"),
        )
    )
    rows = joined.impressions.where(F.col("fate").isin(*EMITTED)).join(taken, list(IMPRESSION_KEY), "left")
    known = F.greatest("timestamp_us", "received_us")
    rows = rows.withColumn("events", F.array_sort(F.transform("events", lambda event: _after(event, known))))
    return rows.select(
        "request_id",
        "user_id",
        "item_id",
        F.timestamp_micros("timestamp_us").alias("timestamp"),
        F.timestamp_micros(known).alias("known_at"),
        "position",
        "page",
        "version",
        "delta",
        "track",
        "score",
        F.coalesce("actions", F.lit(0)).alias("actions"),
        F.coalesce("watch_s", F.lit(0.0).cast("float")).alias("watch_s"),
        _list("events.known_at", "bigint").alias("action_known_at"),
        _list("events.mask", "int").alias("action_masks"),
        _list("events.value", "float").alias("action_values"),
        (F.col("fate") == "late").alias("late"),
    ).select(*INTERACTIONS.names)


def quarantine(joined: Joined) -> DataFrame:
    """Events without a place, each with its reason, columns of `components.schemas.QUARANTINE`, in no order."""
    from pyspark.sql import functions as F

    impressions = joined.impressions.where(F.col("fate").isin(*REASONS))
    actions = joined.actions.where(F.col("fate").isin(*REASONS))
    return _bad_rows(impressions, "impression", _FIRST_IMPRESSION, ("request_id", "item_id")).unionByName(
        _bad_rows(actions, "action", _FIRST_ACTION, ACTION_KEY)
    )


def counts(joined: Joined) -> dict[str, int]:
    """How many events met which fate, in one pass; rows of a key beyond its first are duplicates."""
    from pyspark.sql import functions as F

    tally = [F.count(F.lit(1)).alias("keys"), F.sum("copies").alias("rows")]
    shown = joined.impressions.groupBy("fate", F.lit("impression").alias("action")).agg(*tally)
    done = joined.actions.where(F.col("fate") != "known").groupBy("fate", "action").agg(*tally)
    return _counts([(row["fate"], row["action"], row["keys"], row["rows"]) for row in shown.union(done).collect()])


def _counts(tally: list[tuple[str, str, int, int]]) -> dict[str, int]:
    """(fate, action or 'impression', keys, rows) -> the counts of a manifest."""

    def keys(*fates: str, action: str = "") -> int:
        return sum(n for fate, name, n, _ in tally if fate in fates and action in ("", name))

    settled = [(n, rows, name == "impression") for fate, name, n, rows in tally if fate in SETTLED]
    quarantined = {f"quarantined_{reason}": keys(reason) for reason in REASONS}
    return {
        "impressions": sum(rows for _, rows, impression in settled if impression),
        "actions": sum(rows for _, rows, impression in settled if not impression),
        "interactions": keys(*EMITTED),
        "attributed": keys("attributed"),
        "duplicates": sum(rows - n for n, rows, _ in settled),
        **{fate: keys(fate) for fate in ("late", "before_history", "in_gap", "pending")},
        **{f"positive_{action}": keys("attributed", action=action) for action in ACTIONS},
        "quarantined": sum(quarantined.values()),
        **quarantined,
    }


def _judge_impressions(rows: DataFrame, emitted: DataFrame, quarantined: DataFrame, rules: Rules) -> DataFrame:
    from pyspark.sql import functions as F

    known = emitted.select(*IMPRESSION_KEY).unionByName(quarantined.select(*IMPRESSION_KEY))
    first = _first(rows.where(F.col("timestamp_us") < rules.window.end_us), IMPRESSION_KEY, _FIRST_IMPRESSION)
    time = F.col("timestamp_us")
    fate = (
        F.when(F.col("known"), "known")
        .when(time >= rules.window.start_us, "new")
        .when(time < rules.history_start_us, "before_history")
        .when(~in_any(time, rules.joined), "in_gap")
        .when(time >= rules.oldest_us, "late")
        .otherwise("too_late")
    )
    flagged = first.join(known.withColumn("known", F.lit(True)), list(IMPRESSION_KEY), "left")
    return flagged.withColumn("fate", fate).drop("known")


def _judge_actions(
    rows: DataFrame, impressions: DataFrame, emitted: DataFrame, quarantined: DataFrame, rules: Rules
) -> DataFrame:
    from pyspark.sql import functions as F

    time = F.col("timestamp_us")
    inside = (time >= rules.history_start_us) & (time < rules.window.end_us + rules.attribution_us)
    masks = F.create_map(*[F.lit(part) for name in ACTIONS for part in (name, action_bit(name))])
    first = _first(rows.where(inside), ACTION_KEY, _FIRST_ACTION).withColumn("mask", masks[F.col("action")])
    here = impressions.where(~F.col("fate").isin("known", "too_late")).select(
        *IMPRESSION_KEY,
        "user_id",
        F.col("timestamp_us").alias("shown_us"),
        F.lit(0).alias("actions"),
        F.col("fate").alias("shown"),
    )
    shown = emitted.withColumn("shown", F.lit("before")).unionByName(here)
    seen = quarantined.select(*ACTION_KEY).withColumn("known", F.lit(True))
    matched = first.join(shown, ["request_id", "item_id", "user_id"], "left").join(seen, list(ACTION_KEY), "left")
    delay = time - F.col("shown_us")
    held = F.col("shown").isin("before_history", "in_gap")
    none = F.col("shown").isNull() | (held & ~delay.between(0, rules.attribution_us))
    fate = (
        F.when(F.col("known"), "known")
        .when(F.col("mask").isNull(), "unknown_action")
        .when(none & (time < rules.settled_us), "no_impression")
        .when((none | held) & (time >= rules.window.end_us), "ahead")
        .when(none | held, "pending")
        .when(F.col("actions").bitwiseAND(F.col("mask")) != 0, "known")
        .when(delay < 0, "before_impression")
        .when(delay > rules.attribution_us, "outside_attribution_window")
        .when(F.col("shown") == "before", "late_action")
        .otherwise("attributed")
    )
    return matched.withColumn("fate", fate).drop("known", "shown", "shown_us", "actions")


def _first(rows: DataFrame, key: tuple[str, ...], order: tuple[str, ...]) -> DataFrame:
    """One row per key, the smallest by `order` (which ends in the row's other columns, so that it is total)."""
    from pyspark.sql import functions as F

    smallest = F.min(F.struct(*order, "source")).alias("first")
    return rows.groupBy(*key).agg(smallest, F.count(F.lit(1)).alias("copies")).select(*key, "first.*", "copies")


def _keys(quarantined: DataFrame, kind: str) -> DataFrame:
    """The keys of quarantined rows of one kind, read back from their JSON; each once, as joins are exactly once."""
    from pyspark.sql import functions as F

    key = F.from_json("row", "request_id bigint, user_id bigint, item_id bigint, action string").alias("key")
    return quarantined.where(F.col("kind") == kind).select(key).select("key.*")


def _bad_rows(rows: DataFrame, kind: str, order: tuple[str, ...], key: tuple[str, ...]) -> DataFrame:
    from pyspark.sql import functions as F

    return rows.select(
        F.lit(kind).alias("kind"),
        F.col("fate").alias("reason"),
        F.to_json(F.struct(*key, *[name for name in order if name not in key])).alias("row"),
        F.col("source"),
    )


def _list(column: str, element: str) -> Column:
    from pyspark.sql import functions as F

    return F.coalesce(F.col(column), F.array().cast(f"array<{element}>"))
