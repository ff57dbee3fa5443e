"""Input that is no log is refused with what is wrong and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.config import cli
from components.errors import BadInput
from components.ingest.config import IngestConfig
from components.ingest.run import run
from components.storage import Storage
from tests.components.ingest.cases import LOG, ingest, written


def truncated(path: Path) -> Path:
    written(path, LOG)
    path.write_bytes(path.read_bytes()[:-40])
    return path


def plain(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (lambda d: d / "nowhere", {"source": "kuairand"}, "nowhere does not exist; set --path"),
        (lambda d: "", {"source": "files"}, "no path given; set --path"),
        (lambda d: d, {"source": "kuairand"}, r"has no log_standard_\*\.csv"),
        (lambda d: d, {"source": "movielens"}, r"has no ratings\.dat or u\.data"),
        (lambda d: d, {"source": "files"}, r"holds no file ending in \.parquet"),
        (lambda d: plain(d / "log.xls", "x"), {"source": "files"}, "is of no known format"),
        (lambda d: plain(d / "log.csv", ""), {"source": "files"}, r"log\.csv is empty"),
        (lambda d: plain(d / "log.csv", "user_id,item_id,timestamp\n"), {"source": "files"}, "has no rows"),
        (lambda d: plain(d / "log.jsonl", "\n"), {"source": "files"}, "has no rows"),
        (lambda d: plain(d / "u.data", ""), {"source": "movielens"}, "is empty"),
        (lambda d: plain(d / "u.data", "a,b,c\nd,e,f\n"), {"source": "movielens"}, "holds no line of user, item"),
        (lambda d: truncated(d / "log.parquet"), {"source": "files"}, "not a readable Parquet file, maybe truncated"),
        (lambda d: plain(d / "log.parquet", "no parquet"), {"source": "files"}, "not a readable Parquet file"),
        (
            lambda d: plain(d / "log.csv", "user_id,item_id,timestamp,item_id\n1,2,3,4\n"),
            {"source": "files"},
            r"log\.csv has several columns called 'item_id'; give each a name of its own",
        ),
        (
            lambda d: plain(d / "log.csv", 'user_id,item_id,timestamp,title\n1,2,3,"open\n1,2,3,a\n1,2,3,b\n'),
            {"source": "files"},
            r"log\.csv has a quote that is never closed, before 'open'; close it",
        ),
        (
            lambda d: plain(d / "log.csv", 'user_id,item_id,timestamp,title\n1,2,3,"open\n' + "1,2,3,a\n" * 400_000),
            {"source": "files"},
            r"log\.csv (has a quote that is never|is not a readable CSV file .* check its separator, quotes)",
        ),
        (
            lambda d: plain(d / "log.csv", "uid,item_id\n1,2\n"),
            {"source": "files"},
            "has no column user_id, timestamp; it has uid, item_id",
        ),
        (
            lambda d: plain(d / "log.csv", "uid,sku,user_id,timestamp\n1,2,3,4\n"),
            {"source": "files", "columns": "user_id=userid,item_id=sku"},
            "--columns names userid for user_id, but log.csv has only uid, sku, user_id, timestamp",
        ),
        (
            lambda d: plain(d / "log.csv", "user_id,item_id,timestamp\n1,2,3\n"),
            {"source": "files", "columns": "uid=user_id"},
            "--columns maps uid, but rows of kind feedback have only user_id",
        ),
        (
            lambda d: plain(d / "log.csv", "user_id,item_id,timestamp\n1,2,3\n"),
            {"source": "files", "columns": "user_id"},
            "--columns has 'user_id'; write it as name=name",
        ),
        (
            lambda d: plain(d / "log.csv", "user_id,item_id,timestamp,action\n1,2,1700000000,buy\n"),
            {"source": "files", "action_names": "buy=purchase"},
            "--action-names maps to purchase; known actions are click",
        ),
        (
            lambda d: plain(d / "log.csv", "user_id,item_id,timestamp\n1,2,1700000000\n"),
            {"source": "files", "from_time": "2024-01-01"},
            "no event lies in",
        ),
    ],
)
def test_bad_input_is_refused_with_what_is_wrong_and_what_to_do(
    store: Storage, tmp_path: Path, make: Any, fields: dict[str, str], message: str
) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    with pytest.raises(BadInput, match=message):
        ingest(store, path=str(make(folder)), **fields)
    assert store.list("events") == []


def test_a_time_that_is_none_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(IngestConfig, run, ["--from-time=yesterday"]) == 2
    assert "is not a time; write it like" in capsys.readouterr().err
