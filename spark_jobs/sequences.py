"""Sequences: each user's interactions in time order, with the auxiliary series merged in.

Main series: ordered by (timestamp, request_id, position, item_id), a total and stable order.
Auxiliary series: of each run of equal values, over the user's whole history, only the first is kept; a row that begins
in the middle of the history carries the entries that lie inside it, so every row is a stretch of one series. A run is
one in the order in which interactions became known: at any moment the series is what was known of it then.

A row carries one run of new interactions (those with loss, from `new_from` on) after up to N earlier ones as context.
Almost every user has one run, thus one row. A user with a late impression that belongs among interactions which were
trained on before has one row for each run, so that the order stays and yet each interaction has its loss once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pyarrow as pa

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, Observation

ORDER: Final = ("timestamp_us", "request_id", "position", "item_id")
KNOWN_ORDER: Final = ("known_us", *ORDER)

SEQUENCES: Final = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("new_from", pa.int32(), nullable=False),
        pa.field("request_id", pa.list_(pa.int64())),
        pa.field("item_id", pa.list_(pa.int64())),
        pa.field("timestamp", pa.list_(pa.int64())),
        pa.field("known_at", pa.list_(pa.int64())),
        pa.field("position", pa.list_(pa.int32())),
        pa.field("page", pa.list_(pa.int64())),
        pa.field("actions", pa.list_(pa.int32())),
        pa.field("watch_s", pa.list_(pa.float32())),
        pa.field("score", pa.list_(pa.float32())),
        pa.field("version", pa.list_(pa.int32())),
        pa.field("delta", pa.list_(pa.int64())),
        pa.field("action_of", pa.list_(pa.int32())),
        pa.field("action_known_at", pa.list_(pa.int64())),
        pa.field("action_mask", pa.list_(pa.int32())),
        pa.field("action_value", pa.list_(pa.float32())),
        pa.field("aux_slot", pa.list_(pa.int32())),
        pa.field("aux_value", pa.list_(pa.int64())),
        pa.field("aux_known_at", pa.list_(pa.int64())),
    ]
)
"""A row of a sequences data set; all times int64 us, `action_of` = index into the row's interactions."""


@dataclass(frozen=True)
class AuxiliarySlot:
    """A slowly changing categorical feature: its number in `aux_slot` and its int64 column in the interactions."""

    number: int
    column: str


AUXILIARY_SLOTS: Final = (AuxiliarySlot(0, "page"),)
_MAIN = {
    "request_id": "request_id",
    "item_id": "item_id",
    "timestamp": "timestamp_us",
    "known_at": "known_us",
    "position": "position",
    "page": "page",
    "actions": "actions",
    "watch_s": "watch_s",
    "score": "score",
    "version": "version",
    "delta": "delta",
}


def sequences(
    interactions: DataFrame, new: Column, context: int, slots: tuple[AuxiliarySlot, ...] = AUXILIARY_SLOTS
) -> DataFrame:
    """One row per user and run of new interactions, columns of `SEQUENCES`, in no order.

    interactions: rows of `components.schemas.INTERACTIONS`; new: which of them have loss (boolean column of theirs);
    context: at most so many interactions before each run. Users without new interactions have no row.
    """
    from pyspark.sql import functions as F

    events = _runs(_ranked(interactions, new, slots), context, slots)
    part = F.col("part")
    main = [part[column].alias(name) for name, column in _MAIN.items()]
    actions, aux = F.col("action_events"), F.col("aux_events")
    return (
        events.withColumn("action_events", _action_events(part))
        .withColumn("aux_events", _aux_events(part, slots))
        .select(
            "user_id",
            "new_from",
            *main,
            actions["of"].alias("action_of"),
            actions["known_us"].alias("action_known_at"),
            actions["mask"].alias("action_mask"),
            actions["value"].alias("action_value"),
            aux["slot"].alias("aux_slot"),
            aux["value"].alias("aux_value"),
            aux["known_us"].alias("aux_known_at"),
        )
        .select(*SEQUENCES.names)
    )


def observed(rows: DataFrame) -> tuple[DataFrame, Observation]:
    """The rows, counted while they are written: rows, new (interactions with loss), context (without)."""
    from pyspark.sql import Observation
    from pyspark.sql import functions as F

    observation = Observation("sequences")
    length = F.size("request_id")
    return rows.observe(
        observation,
        F.count(F.lit(1)).alias("rows"),
        F.coalesce(F.sum(length - F.col("new_from")), F.lit(0)).alias("new"),
        F.coalesce(F.sum("new_from"), F.lit(0)).alias("context"),
    ), observation


def _ranked(interactions: DataFrame, new: Column, slots: tuple[AuxiliarySlot, ...]) -> DataFrame:
    """Add `rank` (1.. within the user), `new`, the bounds of runs of new ones, and the starts of auxiliary runs."""
    from pyspark.sql import Window as W
    from pyspark.sql import functions as F

    order, known_order = (W.partitionBy("user_id").orderBy(*columns) for columns in (ORDER, KNOWN_ORDER))
    plain = interactions.select(
        "user_id",
        "request_id",
        "item_id",
        F.unix_micros("timestamp").alias("timestamp_us"),
        F.unix_micros("known_at").alias("known_us"),
        "position",
        "actions",
        "watch_s",
        F.coalesce("score", F.lit(float("nan")).cast("float")).alias("score"),
        F.coalesce("version", F.lit(-1)).alias("version"),
        F.coalesce("delta", F.lit(-1).cast("bigint")).alias("delta"),
        F.arrays_zip("action_known_at", "action_masks", "action_values").alias("events"),
        *[slot.column for slot in slots],
        new.alias("new"),
    )
    return plain.withColumns(
        {
            "rank": F.row_number().over(order).cast("int"),
            "first_of_run": F.col("new") & ~F.coalesce(F.lag("new").over(order), F.lit(False)),
            "last_of_run": F.col("new") & ~F.coalesce(F.lead("new").over(order), F.lit(False)),
            **{
                _start_flag(slot): ~F.col(slot.column).eqNullSafe(F.lag(slot.column).over(known_order))
                for slot in slots
            },
        }
    )


def _runs(ranked: DataFrame, context: int, slots: tuple[AuxiliarySlot, ...]) -> DataFrame:
    """user_id, new_from and `part`: the array of a run's interactions after their context, by rank."""
    from pyspark.sql import Window as W
    from pyspark.sql import functions as F

    earliest = F.min(F.when(F.col("new"), F.col("rank"))).over(W.partitionBy("user_id"))
    needed = ranked.withColumn("earliest", earliest).where(F.col("rank") >= F.col("earliest") - context)
    fields = ["rank", *dict.fromkeys([*_MAIN.values(), *[slot.column for slot in slots]])]
    flags = [_start_flag(slot) for slot in slots]
    event = F.struct(*fields, *flags, "events", "first_of_run", "last_of_run")
    users = needed.groupBy("user_id").agg(F.array_sort(F.collect_list(event)).alias("all"))
    starts = F.filter("all", lambda e: e["first_of_run"])["rank"]
    ends = F.filter("all", lambda e: e["last_of_run"])["rank"]
    runs = users.select("user_id", "all", F.explode(F.arrays_zip(starts.alias("s"), ends.alias("e"))).alias("run"))
    offset = F.col("all")[0]["rank"]
    begin = F.greatest(F.col("run")["s"] - context, offset)
    return runs.select(
        "user_id",
        (F.col("run")["s"] - begin).alias("new_from"),
        F.slice("all", begin - offset + 1, F.col("run")["e"] - begin + 1).alias("part"),
    )


def _action_events(part: Column) -> Column:
    """All action events of the interactions, ordered by (known_at, interaction, mask)."""
    from pyspark.sql import functions as F

    def of_one(interaction: Column, index: Column) -> Column:
        return F.transform(
            interaction["events"],
            lambda e: F.struct(
                e["action_known_at"].alias("known_us"),
                index.cast("int").alias("of"),
                e["action_masks"].alias("mask"),
                e["action_values"].alias("value"),
            ),
        )

    return F.array_sort(F.flatten(F.transform(part, of_one)))


def _aux_events(part: Column, slots: tuple[AuxiliarySlot, ...]) -> Column:
    """The first entry of each run of equal values, ordered by (interaction, slot)."""
    from pyspark.sql import functions as F

    def of_one(interaction: Column) -> Column:
        entries = [
            F.when(
                interaction[_start_flag(slot)],
                F.struct(
                    F.lit(slot.number).alias("slot"),
                    interaction[slot.column].alias("value"),
                    interaction["known_us"].alias("known_us"),
                ),
            )
            for slot in slots
        ]
        return F.array_compact(F.array(*entries))

    return F.flatten(F.transform(part, of_one))


def _start_flag(slot: AuxiliarySlot) -> str:
    return f"starts_{slot.column}"
