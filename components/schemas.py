"""The tables of the event log as Arrow schemas, and the fixed numbering of actions.

All ids are int64 (strings are hashed at the edge by `hash_id`), all times UTC microseconds.
"""

from __future__ import annotations

import hashlib
from typing import Final

import pyarrow as pa

from components.errors import BadInput

ACTIONS: Final = ("click", "like", "long_view", "follow", "comment", "share", "dislike", "watch", "rating")
"""Action names; an action's place is its bit in every action mask, so new names go to the end."""

TIMESTAMP: Final = pa.timestamp("us", tz="UTC")

EARLIEST_US: Final = 631_152_000_000_000
"""1990-01-01: an earlier time is a wrong unit or a default value, never an event."""

IMPRESSIONS: Final = pa.schema(
    [
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("timestamp", TIMESTAMP, nullable=False),
        pa.field("received_at", TIMESTAMP, nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("page", pa.int64(), nullable=False),
        pa.field("version", pa.int32()),
        pa.field("delta", pa.int64()),
        pa.field("track", pa.string()),
        pa.field("score", pa.float32()),
    ]
)

ACTION_EVENTS: Final = pa.schema(
    [
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("timestamp", TIMESTAMP, nullable=False),
        pa.field("received_at", TIMESTAMP, nullable=False),
        pa.field("action", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
    ]
)

ITEMS: Final = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("author_id", pa.int64(), nullable=False),
        pa.field("category", pa.int64(), nullable=False),
        pa.field("duration_s", pa.float32()),
        pa.field("available_from", TIMESTAMP),
        pa.field("available_until", TIMESTAMP),
    ]
)

QUARANTINE: Final = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("row", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)

INTERACTIONS: Final = pa.schema(
    [
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("timestamp", TIMESTAMP, nullable=False),
        pa.field("known_at", TIMESTAMP, nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("page", pa.int64(), nullable=False),
        pa.field("version", pa.int32()),
        pa.field("delta", pa.int64()),
        pa.field("track", pa.string()),
        pa.field("score", pa.float32()),
        pa.field("actions", pa.int32(), nullable=False),
        pa.field("watch_s", pa.float32(), nullable=False),
        pa.field("action_known_at", pa.list_(pa.int64())),
        pa.field("action_masks", pa.list_(pa.int32())),
        pa.field("action_values", pa.list_(pa.float32())),
        pa.field("late", pa.bool_(), nullable=False),
    ]
)


def action_bit(name: str) -> int:
    """The bit (a power of two) of an action name; BadInput names the known ones."""
    try:
        return 1 << ACTIONS.index(name)
    except ValueError:
        raise BadInput(f"unknown action {name!r}; known actions are {', '.join(ACTIONS)}") from None


def action_mask(names: str) -> int:
    """The mask of comma-separated action names, e.g. 'click,long_view'."""
    mask = 0
    for name in names.split(","):
        mask |= action_bit(name.strip())
    return mask


def hash_id(text: str) -> int:
    """A stable signed 64-bit id of a string.

    Among n distinct strings some pair collides with probability about n^2 / 2^65: 2.7 % at a billion ids.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
