"""Windows name half-open intervals and survive the way through their key."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.errors import BadInput
from components.windows import Window, from_us, parse_time, to_us

seconds = st.integers(min_value=0, max_value=4_000_000_000)


@given(seconds, st.integers(min_value=1, max_value=10**8))
def test_a_window_is_its_key(start: int, length: int) -> None:
    window = Window.starting(from_us(start * 1_000_000), timedelta(seconds=length))
    assert Window.parse(window.key) == window
    assert window.end_us - window.start_us == length * 1_000_000


@given(st.integers(min_value=-(10**15), max_value=4 * 10**15))
def test_microseconds_survive_exactly(us: int) -> None:
    assert to_us(from_us(us)) == us


def test_a_window_holds_its_start_and_not_its_end() -> None:
    window = Window.parse("20220501T000000Z-20220502T000000Z")
    assert not window.overlaps(Window.starting(window.end, timedelta(days=1)))
    assert window.overlaps(Window.starting(window.start, timedelta(seconds=1)))


@pytest.mark.parametrize("key", ["", "2022-05-01", "20220501T000000Z", "x-y", "20220501T000000Z-2022"])
def test_a_malformed_key_is_refused_with_the_expected_form(key: str) -> None:
    with pytest.raises(BadInput, match="START-END"):
        Window.parse(key)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(BadInput, match="empty"):
        Window.parse("20220502T000000Z-20220501T000000Z")


def test_times_are_read_as_utc() -> None:
    midnight = datetime(2022, 5, 1, tzinfo=UTC)
    for text in ("2022-05-01", "2022-05-01T00:00:00Z", "2022-05-01T02:00:00+02:00", "20220501T000000Z"):
        assert parse_time(text) == midnight
    with pytest.raises(BadInput, match="not a time"):
        parse_time("yesterday")
