"""The step join: what it writes, refuses and leaves alone. The rules themselves: tests/spark_jobs/test_join.py."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from botocore.exceptions import ReadTimeoutError
from botocore.response import StreamingBody

from components.config import cli
from components.errors import BadInput
from components.join import run as step
from components.join import turns
from components.join.config import JoinConfig
from components.manifests import read_part
from components.schemas import IMPRESSIONS, INTERACTIONS, action_mask
from components.sequences import run as sequences
from components.sequences.config import SequencesConfig
from components.storage import Storage
from components.windows import Window
from spark_jobs import event_log
from tests.spark_jobs.log import (
    HOURS,
    MASTER,
    MINUTE,
    TEN,
    action,
    at,
    impression,
    interactions,
    join,
    publish_interactions,
    quarantined,
    table,
    write,
)

HOUR = "events/impressions/dt=2026-03-01/hour=10"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/store")


def test_a_window_is_joined_with_labels_delays_duplicates_and_reasons(storage: Storage) -> None:
    write(storage, "impressions", [impression(1, 5, 10, page=2, version=3, delta=9, track="champion", score=0.5)])
    write(storage, "impressions", [impression(1, 5, 10, delay=4), impression(1, 6, 10, delay=1), impression(2, 5, 55)])
    clicks = [action(1, 5, 12), action(1, 5, 13), action(1, 5, 12, "watch", delay=3, value=7.5), action(2, 5, 62)]
    lost = [action(1, 6, 40), action(1, 6, 9, "like"), action(9, 9, 10), action(9, 8, 58), action(1, 5, 12, "wave")]
    write(storage, "actions", clicks + lost)

    result = join(storage, HOURS[0])

    first, second, third = interactions(storage, HOURS[0])
    assert (first["actions"], first["watch_s"]) == (action_mask("click,watch"), 7.5)
    assert first["events"] == [(at(12), action_mask("click"), 0.0), (at(15), action_mask("watch"), 7.5)]
    served = [first[name] for name in ("page", "version", "delta", "track", "score")]
    assert served == [2, 3, 9, "champion", 0.5]
    assert (second["item_id"], second["actions"], second["known_at"] - second["timestamp"]) == (6, 0, MINUTE)
    assert third["events"] == [(at(62), action_mask("click"), 0.0)], "an action after the window's end still counts"
    reasons = {(json.loads(row["row"])["action"], row["reason"]) for row in quarantined(storage, HOURS[0])}
    assert reasons == {
        ("click", "outside_attribution_window"),
        ("like", "before_impression"),
        ("click", "no_impression"),
        ("wave", "unknown_action"),
    }
    expected = {"impressions": 4, "interactions": 3, "attributed": 3, "duplicates": 2, "pending": 1, "quarantined": 4}
    assert expected.items() <= result.counts.items()
    assert (result.counts["positive_click"], result.counts["positive_watch"]) == (2, 1)
    assert read_part(storage, step.manifest_of(storage, HOURS[0]), "data").schema.names == INTERACTIONS.names

    before = {path: storage.read_bytes(path) for path in storage.list("")}
    assert join(storage, HOURS[0]) == result
    assert {path: storage.read_bytes(path) for path in storage.list("")} == before, "a finished join changes nothing"

    half = Window(TEN, TEN + timedelta(minutes=30))
    with pytest.raises(BadInput, match=f"{half.key} overlaps {HOURS[0].key}"):
        join(storage, half)

    _late_events_go_to_the_next_window(storage)


def _late_events_go_to_the_next_window(storage: Storage) -> None:
    write(
        storage, "impressions", [impression(3, 1, 50, delay=15), impression(4, 1, 20, delay=50), impression(5, 1, 70)]
    )
    write(storage, "actions", [action(3, 1, 52), action(4, 1, 21), action(1, 6, 11, "follow"), action(5, 1, 71)])
    result = join(storage, HOURS[1])
    assert [(row["request_id"], row["late"]) for row in interactions(storage, HOURS[1])] == [(3, True), (5, False)]
    found = {
        (json.loads(row["row"])["request_id"], row["kind"], row["reason"]) for row in quarantined(storage, HOURS[1])
    }
    assert found == {
        (4, "impression", "too_late"),
        (4, "action", "no_impression"),
        (1, "action", "late_action"),
        (9, "action", "no_impression"),
    }
    assert (result.counts["late"], result.counts["attributed"], result.counts["quarantined_too_late"]) == (1, 2, 1)


def test_what_comes_later_than_any_join_looks_back_is_quarantined_by_one_that_looks_further(storage: Storage) -> None:
    """With the limits of a week and more that joins have, reading all that was ever logged would be the price."""
    write(storage, "impressions", [impression(1, 5, 10), impression(2, 5, 130), impression(3, 5, 190)])
    join(storage, HOURS[0])
    write(storage, "impressions", [impression(4, 5, 20, delay=120)])
    write(storage, "actions", [action(4, 5, 21, delay=120)])
    join(storage, HOURS[2], memory_s=0)
    assert quarantined(storage, HOURS[2]) == []
    join(storage, HOURS[3], memory_s=86_400)
    reasons = sorted((row["kind"], row["reason"]) for row in quarantined(storage, HOURS[3]))
    assert reasons == [("action", "no_impression"), ("impression", "too_late")]


def test_an_action_that_waited_is_judged_by_a_next_join_that_allows_less_lateness(storage: Storage) -> None:
    three, next_one = Window(TEN, HOURS[2].end), HOURS[3]
    write(storage, "impressions", [impression(1, 5, 10), impression(2, 5, 190)])
    write(storage, "actions", [action(9, 9, 70)])
    assert join(storage, three, max_lateness_s=3 * 3600).counts["pending"] == 1
    join(storage, next_one, max_lateness_s=0)
    assert [row["reason"] for row in quarantined(storage, next_one)] == ["no_impression"]


def test_a_join_that_died_before_its_manifest_leaves_nothing_and_is_repeated(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(storage, "impressions", [impression(1, 5, 10), impression(1, 6, 10), impression(1, 7, -5)])
    write(storage, "actions", [action(1, 5, 11), action(8, 8, 12)])

    def die(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(turns, "commit", die)
        with pytest.raises(OSError, match="killed"):
            join(storage, HOURS[0])
    assert step.published(storage) == []
    assert storage.list("quarantine") == []
    result = join(storage, HOURS[0])
    assert [row["item_id"] for row in interactions(storage, HOURS[0])] == [5, 6]
    assert [row["reason"] for row in quarantined(storage, HOURS[0])] == ["no_impression"]
    assert result.counts["before_history"] == 1, "what came before the first joined window is left alone"

    storage.delete(result.quarantine)
    join(storage, HOURS[0])
    assert len(quarantined(storage, HOURS[0])) == 1, "a death between manifest and quarantine is healed"


@pytest.mark.parametrize("other", [HOURS[1], HOURS[0]], ids=["another window", "the same"])
def test_a_join_that_another_one_overtook_is_tried_again(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, other: Window
) -> None:
    write(storage, "impressions", [impression(1, 5, 10)])
    original = step._write

    def overtaken(*arguments: Any) -> Any:
        publish_interactions(storage, other, [], turn=0)
        return original(*arguments)

    command = [f"--root={storage.root}", f"--window={HOURS[0].key}", f"--spark={MASTER}"]
    with monkeypatch.context() as patch:
        patch.setattr(step, "_write", overtaken)
        assert cli(JoinConfig, step.run, command) == 1
    assert cli(JoinConfig, step.run, command) == 0


def test_a_join_that_halts_before_its_manifest_is_seen_by_the_next(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the late impression would be in both: each would think itself the first to see it."""
    write(storage, "impressions", [impression(1, 5, 10)])
    join(storage, HOURS[0])
    write(storage, "impressions", [impression(2, 5, 55, delay=10), impression(3, 5, 70), impression(4, 5, 130)])
    publish = turns.publish

    def halted(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(turns, "publish", publish)
            join(storage, HOURS[2], max_lateness_s=10_800)
        return publish(*arguments)

    monkeypatch.setattr(turns, "publish", halted)
    join(storage, HOURS[1], max_lateness_s=10_800)
    rows = [[row["request_id"] for row in interactions(storage, hour)] for hour in HOURS[:3]]
    assert rows == [[1], [2, 3], [4]]


def test_the_join_after_one_that_died_between_turn_and_manifest_publishes_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise OSError("killed")

    write(storage, "impressions", [impression(1, 5, 10), impression(2, 5, 70)])
    with monkeypatch.context() as patch:
        patch.setattr(turns, "publish", die)
        with pytest.raises(OSError, match="killed"):
            join(storage, HOURS[0])
    assert step.published(storage) == []
    join(storage, HOURS[1])
    assert step.published(storage) == list(HOURS[:2])
    assert [row["request_id"] for row in interactions(storage, HOURS[0])] == [1]


def test_a_window_that_was_removed_is_joined_again(storage: Storage) -> None:
    write(storage, "impressions", [impression(1, 5, 10)])
    folder = join(storage, HOURS[0]).folder
    write(storage, "impressions", [impression(2, 5, 20)])
    for path in storage.list(folder):
        storage.delete(path)
    join(storage, HOURS[0])
    assert [row["request_id"] for row in interactions(storage, HOURS[0])] == [1, 2]


def test_too_many_actions_without_impression_fail_with_a_report_that_names_the_reasons(storage: Storage) -> None:
    write(storage, "impressions", [impression(1, item, 10) for item in range(90)])
    write(storage, "actions", [action(7, item, 10) for item in range(40)])
    with pytest.raises(BadInput, match=r"30\.8% of the events are quarantined \(40 no_impression\)"):
        join(storage, HOURS[0], max_quarantine_share=0.3)
    assert step.published(storage) == []
    report = json.loads(storage.read_bytes(f"quality/join/{HOURS[0].key}.json"))
    assert report["counts"]["quarantined_no_impression"] == 40
    assert len(report["failures"]) == 1


def test_a_file_with_damaged_pages_is_named(storage: Storage) -> None:
    (path,) = write(storage, "impressions", [impression(i, i, 10) for i in range(200)])
    data = storage.read_bytes(path)
    storage.write_bytes(path, data[:8] + bytes(300) + data[308:])
    with pytest.raises(BadInput, match=f"{path} cannot be read"):
        join(storage, HOURS[0])


def _truncated(good: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    import pyarrow.parquet as pq

    pq.write_table(good, sink)
    return sink.getvalue().to_pybytes()[:-40]


def _with(name: str, values: list[Any]) -> Callable[[pa.Table], pa.Table]:
    return lambda good: good.set_column(good.schema.get_field_index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_truncated, "is truncated or no Parquet file"),
        (lambda good: good.drop_columns(["user_id"]), "column 'user_id' is missing among request_id, item_id"),
        (_with("item_id", ["a"]), "column 'item_id' is string, not int64"),
        (_with("request_id", [None]), "column 'request_id' is null, not int64"),
        (_with("user_id", pa.array([None], pa.int64())), "1 rows have no 'user_id'"),
    ],
)
def test_a_log_file_that_breaks_the_contract_is_named_before_anything_runs(
    storage: Storage, change: Callable[[pa.Table], Any], message: str
) -> None:
    changed = change(table("impressions", [impression(1, 5, 10)]))
    path = f"{HOUR}/broken.parquet"
    if isinstance(changed, bytes):
        storage.write_bytes(path, changed)
    else:
        storage.write_table(path, changed)
    with pytest.raises(BadInput, match=message) as error:
        join(storage, HOURS[0])
    assert "broken.parquet" in str(error.value)
    assert any(remedy in str(error.value) for remedy in ("ingest it again", "write the file again"))


@pytest.mark.parametrize("error", [ReadTimeoutError(endpoint_url="http://s3"), OSError(errno.EIO, "I/O error")])
def test_a_log_file_that_cannot_be_fetched_is_not_called_broken(
    s3_root: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whoever is told that a file is broken removes it; and the join would not be tried again."""
    bucket = Storage(s3_root)
    paths = write(bucket, "impressions", [impression(1, 5, 1)])
    assert event_log.check_files(bucket, paths, IMPRESSIONS) == 1

    def fail(*_: object, **__: object) -> bytes:
        raise error

    monkeypatch.setattr(StreamingBody, "read", fail)
    monkeypatch.setattr("components.storage._PAUSES", ())
    with pytest.raises(type(error), match=re.escape(str(error))):
        event_log.check_files(bucket, paths, IMPRESSIONS)


def test_a_log_file_outside_the_hours_is_named(storage: Storage) -> None:
    storage.write_table("events/impressions/dt=2026-03-01/x.parquet", table("impressions", [impression(1, 5, 10)]))
    with pytest.raises(BadInput, match=r"dt=2026-03-01/x\.parquet is not in a partition"):
        join(storage, HOURS[0])


def test_a_window_without_impressions_is_refused(storage: Storage) -> None:
    write(storage, "actions", [action(1, 5, 11)])
    with pytest.raises(BadInput, match=r"no impressions .* ingest them first"):
        join(storage, HOURS[0])


def test_a_window_in_which_nothing_happened_is_joined_when_that_is_meant_and_built(storage: Storage) -> None:
    assert join(storage, HOURS[0], allow_empty=True).counts["interactions"] == 0, "not even a log yet"
    write(storage, "impressions", [impression(1, 5, 70)])
    write(storage, "actions", [action(1, 5, 71), action(9, 9, 140)])
    assert join(storage, HOURS[1]).counts["positive_click"] == 1
    found = join(storage, HOURS[2], allow_empty=True)
    assert found.counts["interactions"] == 0 and not interactions(storage, HOURS[2])
    assert [row["reason"] for row in quarantined(storage, HOURS[2])] == ["no_impression"]
    built = sequences.run(SequencesConfig(root=storage.root, mode="window", window=HOURS[2].key, spark=MASTER))
    assert (built.counts["train_rows"], built.counts["train_interactions"]) == (0, 0)


def test_a_window_whose_actions_may_still_come_is_joined_only_when_that_is_meant(storage: Storage) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    ended = Window(now - timedelta(hours=1), now)
    write(storage, "actions", [action(1, 5, 11)])
    with pytest.raises(BadInput, match=r"count until .* join it after that, or with --early"):
        join(storage, ended)
    with pytest.raises(BadInput, match="no impressions"):
        join(storage, ended, early=True)
    with pytest.raises(BadInput, match="no impressions"):
        join(storage, Window(ended.start, ended.end - timedelta(seconds=901)))


def test_the_command_line_refuses_a_wrong_window_with_exit_code_2(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--root={storage.root}", "--window=yesterday"]
    assert cli(JoinConfig, step.run, arguments) == 2
    assert "write START-END like" in capsys.readouterr().err
