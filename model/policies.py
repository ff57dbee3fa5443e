"""Which ids get a row in a table and how long they keep it: settings by feature -> arguments of the tables."""

from __future__ import annotations

from typing import Any

from components.errors import BadInput
from model.settings import ModelConfig

FEATURES = ("item", "author", "category", "page", "duration", "user")
DAY_US = 86_400_000_000
_MOST_OCCURRENCES = 65_535
_MOST_DAYS = 36_500


def feature_of(slot: str) -> str:
    """The feature whose ids a table holds: that of item, item_bias, item_output and context_item is item."""
    return slot.removeprefix("context_").removesuffix("_bias").removesuffix("_output")


def policies(config: ModelConfig, slot: str) -> dict[str, Any]:
    """Admission and expiry of a slot's table. Raises BadInput for a setting that cannot be read."""
    feature = feature_of(slot)
    threshold = by_feature(config.table_admission, "table_admission", _MOST_OCCURRENCES).get(feature, 1)
    days = by_feature(config.table_ttl_days, "table_ttl_days", _MOST_DAYS).get(feature, 0)
    return {"admission_threshold": threshold, "ttl_us": days * DAY_US}


def by_feature(text: str, setting: str, most: int) -> dict[str, int]:
    """'item=5,user=2' -> {'item': 5, 'user': 2}."""
    values: dict[str, int] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        feature, _, number = (piece.strip() for piece in part.partition("="))
        if feature not in FEATURES:
            raise BadInput(f"{setting} names {feature!r}, which is no feature; known are {', '.join(FEATURES)}")
        if not number.isdecimal() or not 1 <= int(number) <= most:
            raise BadInput(f"{setting} has {part!r}; write it like {feature}=5, with a whole number from 1 to {most}")
        if feature in values:
            raise BadInput(f"{setting} names {feature} twice; keep one of them")
        values[feature] = int(number)
    return values
