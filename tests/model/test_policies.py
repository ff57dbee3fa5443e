"""Admission and expiry of a model's tables, by feature."""

from __future__ import annotations

import pytest

from components.errors import BadInput
from model.policies import DAY_US, FEATURES, policies
from model.settings import ModelConfig

NONE = {"admission_threshold": 1, "ttl_us": 0, "min_rows": 0, "max_rows": 0, "when_full": "evict_stalest"}


def test_without_settings_every_id_gets_a_row_and_keeps_it() -> None:
    assert policies(ModelConfig(), "item") == NONE


@pytest.mark.parametrize("slot", ["item", "item_bias", "item_output", "context_item"])
def test_a_feature_names_all_tables_of_its_ids(slot: str) -> None:
    config = ModelConfig(
        table_admission=" item = 5 , user=2",
        table_ttl_days="item=90",
        table_min_rows="item=10",
        table_max_rows="item=1000",
    )
    wanted = {"admission_threshold": 5, "ttl_us": 90 * DAY_US, "min_rows": 10, "max_rows": 1000}
    assert policies(config, slot) == {**NONE, **wanted}
    assert policies(config, "author") == NONE


@pytest.mark.parametrize(
    "text", ["itm=5", "item", "item=", "item=0", "item=-1", "item=2.5", "item=99999999", "item=1,item=2"]
)
def test_what_cannot_be_read_is_refused_with_the_setting(text: str) -> None:
    with pytest.raises(BadInput, match="table_ttl_days"):
        policies(ModelConfig(table_ttl_days=text), "item")


def test_ids_that_wait_for_admission_are_not_kept_for_longer_than_they_can_be_dated() -> None:
    for slot in ("item", "user"):
        policies(ModelConfig(table_admission="item=2", table_ttl_days="item=1000,user=2000"), slot)
    with pytest.raises(BadInput, match="keeps item for 1001 days; with table_admission of it at most 1000"):
        policies(ModelConfig(table_admission="item=2", table_ttl_days="item=1001"), "item")


def test_every_embedded_feature_can_be_named() -> None:
    assert set(ModelConfig().slot_names()) <= set(FEATURES)
