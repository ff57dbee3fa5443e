"""Files to raw tables: CSV, Parquet and JSON lines, with clear refusals and malformed lines set aside."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from components.errors import BadInput
from components.ingest.rows import quarantine_table

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}


@dataclass(frozen=True)
class Raw:
    """One file's rows as they are, and quarantine rows for the lines that are no rows at all."""

    table: pa.Table
    malformed: pa.Table
    source: str


def existing(path: str) -> Path:
    """The path, checked; BadInput says which setting to change."""
    if not path:
        raise BadInput("no path given; set --path to the folder or file to read")
    found = Path(path).expanduser()
    if not found.exists():
        raise BadInput(f"{found} does not exist; set --path to the folder or file to read")
    return found


def pick(folder: Path, patterns: Sequence[str], what: str) -> list[Path]:
    """Files matching any pattern in `folder` or its data/ subfolder, sorted; BadInput when there is none."""
    places = [folder, folder / "data"]
    found = {p for place in places if place.is_dir() for pattern in patterns for p in place.glob(pattern)}
    if not found:
        raise BadInput(f"{folder} has no {' or '.join(patterns)} ({what}); set --path to the folder that holds them")
    return sorted(found)


def data_files(path: Path) -> list[Path]:
    """The file itself, or the Parquet / CSV / JSONL files of a folder, sorted by name."""
    if path.is_file():
        if path.suffix.lower() not in FORMATS:
            raise BadInput(f"{path} is of no known format; readable endings are {', '.join(FORMATS)}")
        return [path]
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in FORMATS)
    if not found:
        raise BadInput(f"{path} holds no file ending in {', '.join(FORMATS)}; set --path to the data")
    return found


def read_any(path: Path) -> Raw:
    readers = {"parquet": read_parquet, "csv": read_csv, "jsonl": read_jsonl}
    return readers[FORMATS[path.suffix.lower()]](path)


def read_parquet(path: Path) -> Raw:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path} is not a readable Parquet file, maybe truncated ({error}); write it again") from error
    return Raw(_checked(table, path), quarantine_table("raw", [], [], path.name), path.name)


def read_csv(
    path: Path,
    separator: str = "",
    names: Sequence[str] = (),
    encoding: str = "utf-8",
    quoted: bool = True,
) -> Raw:
    """All columns as text. `separator` of several characters is allowed; `names` for files without a header."""
    data = path.read_bytes()
    separator = separator or ("\t" if path.suffix.lower() == ".tsv" else ",")
    if len(separator) > 1:
        data, separator = data.replace(separator.encode(), b"\x1f"), "\x1f"
    if not data.strip():
        raise BadInput(f"{path} is empty; give a file with at least one row")
    malformed: list[str] = []

    def set_aside(row: pa_csv.InvalidRow) -> str:
        malformed.append(json.dumps(row.text))
        return "skip"

    header = list(names) or data.split(b"\n", 1)[0].decode(encoding, "replace").strip("\r\ufeff").split(separator)
    try:
        table = pa_csv.read_csv(
            BytesIO(data),
            read_options=pa_csv.ReadOptions(column_names=list(names) or None, encoding=encoding),
            parse_options=pa_csv.ParseOptions(
                delimiter=separator,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,  # else a value of several lines is torn where a block of the file ends
                invalid_row_handler=set_aside,
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types={name.strip('"'): pa.string() for name in header},
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid as error:
        raise BadInput(
            f"{path} is not a readable CSV file ({error}); check its separator, quotes and encoding"
        ) from error
    if quoted:
        _refuse_open_quote(table, data, path)
    malformed.sort()
    return Raw(
        _checked(table, path, malformed),
        quarantine_table("raw", ["malformed_row"] * len(malformed), malformed, path.name),
        path.name,
    )


def _refuse_open_quote(table: pa.Table, data: bytes, path: Path) -> None:
    """A quote that is never closed takes all lines after it for one value: BadInput with how that value begins."""
    last = table.column(table.num_columns - 1)[-1].as_py() if table.num_rows and table.num_columns else None
    if isinstance(last, str) and "\n" in last and not data.rstrip().endswith(b'"'):
        begin = last.split("\n", 1)[0][:80]
        raise BadInput(f"{path} has a quote that is never closed, before {begin!r}; close it or remove it")


def read_jsonl(path: Path) -> Raw:
    """One JSON object per line; every value as text, absent and null alike as null."""
    rows: list[dict[str, str | None]] = []
    malformed = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # strings may hold other line ends
        if not line.strip():
            continue
        if (row := _json_row(line)) is not None:
            rows.append(row)
        else:
            malformed.append(json.dumps(line))
    bad = quarantine_table("raw", ["malformed_row"] * len(malformed), malformed, path.name)
    return Raw(_checked(text_table(rows), path, malformed), bad, path.name)


def _json_row(line: str) -> dict[str, str | None] | None:
    """The values of a JSON object as text; None for what is no row."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            return None
        texts = {name: _text(value) for name, value in row.items()}
        "".join([*texts, *filter(None, texts.values())]).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):  # also numbers of thousands of digits, and brackets nested as deep
        return None
    return texts


def text_table(rows: Sequence[Mapping[str, object]]) -> pa.Table:
    """Dicts to a table of strings; other values keep their JSON text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([_text(row.get(name)) for row in rows], pa.string()) for name in names})


def as_text(table: pa.Table) -> pa.Table:
    """A typed table as strings, times in ISO 8601."""
    return pa.table([c.cast(pa.string()) for c in table.columns], names=table.column_names)


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _checked(table: pa.Table, path: Path, malformed: Sequence[str] = ()) -> pa.Table:
    """The table; BadInput when it is empty or two of its columns have one name."""
    if table.num_rows == 0 and not malformed:
        raise BadInput(f"{path} has no rows; give a file with at least one")
    if twice := [name for name, count in Counter(table.column_names).items() if count > 1]:
        raise BadInput(f"{path} has several columns called {', '.join(map(repr, twice))}; give each a name of its own")
    return table
