"""Which stretch of the event log `build_sequences` joins."""

from __future__ import annotations

import pytest
from airflow.sdk.exceptions import AirflowFailException

from dags.build_sequences import history_window


def test_the_form_names_the_stretch_to_join() -> None:
    params = {"join_from": "2022-04-01", "join_until": "2022-05-01T00:00:00Z"}
    assert history_window(params) == "20220401T000000Z-20220501T000000Z"


def test_without_a_stretch_nothing_is_joined() -> None:
    assert history_window({"join_from": "", "join_until": ""}) == ""


def test_half_a_stretch_is_refused() -> None:
    with pytest.raises(AirflowFailException, match="join_from and join_until"):
        history_window({"join_from": "2022-04-01", "join_until": ""})
