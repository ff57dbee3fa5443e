"""Which ids get a row in a table and how long they keep it: settings by feature -> arguments of the tables."""

from __future__ import annotations

from typing import Any

from components.errors import BadInput
from model.settings import ModelConfig

FEATURES = ("item", "author", "category", "page", "duration", "user")
DAY_US = 86_400_000_000
_MOST_EVENTS = 65_535
_MOST_DAYS = 36_500
_MOST_DAYS_OF_CANDIDATES = 1_000
_MOST_ROWS = 10**12


def feature_of(slot: str) -> str:
    """The feature whose ids a table holds: that of item, item_bias, item_output and context_item is item."""
    return slot.removeprefix("context_").removesuffix("_bias").removesuffix("_output")


def policies(config: ModelConfig, slot: str) -> dict[str, Any]:
    """Admission, expiry and bounds of a slot's table. Raises BadInput for a setting that cannot be read."""

    def number(setting: str, most: int, default: int) -> int:
        return by_feature(getattr(config, setting), setting, most).get(feature_of(slot), default)

    threshold, days = number("table_admission", _MOST_EVENTS, 1), number("table_ttl_days", _MOST_DAYS, 0)
    if threshold > 1 and days > _MOST_DAYS_OF_CANDIDATES:
        raise BadInput(
            f"table_ttl_days keeps {feature_of(slot)} for {days} days; with table_admission of it at most "
            f"{_MOST_DAYS_OF_CANDIDATES} can be told for ids that wait"
        )
    return {
        "admission_threshold": threshold,
        "ttl_us": days * DAY_US,
        "min_rows": number("table_min_rows", _MOST_ROWS, 0),
        "max_rows": number("table_max_rows", _MOST_ROWS, 0),
        "when_full": config.table_when_full,
    }


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
