"""Reading the event log: which files of which UTC hours, are they sound, and as DataFrames.

A file of the log is immutable and is its own commit, so the list of files a join has read says what it has seen.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.errors import BadInput
from components.schemas import ACTION_EVENTS, IMPRESSIONS
from components.storage import S3, LocalFiles, Storage
from components.windows import Window, from_us, to_us

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql.types import StructType

SCHEMAS: Final = {"impressions": IMPRESSIONS, "actions": ACTION_EVENTS}
HOUR: Final = timedelta(hours=1)
HOUR_US: Final = HOUR // timedelta(microseconds=1)
_PARTITION = re.compile(r"/dt=(\d{4}-\d{2}-\d{2})/hour=(\d{2})/[^/]+\.parquet$")
_SOURCE = r"(events/(?:impressions|actions)/dt=[^/]*/hour=[^/]*/[^/]*)$"
_GLOB = re.compile(r"([\[\]{}*?\\])")
_SPARK_TYPES = {
    pa.int64(): "bigint",
    pa.int32(): "int",
    pa.float32(): "float",
    pa.float64(): "double",
    pa.string(): "string",
    pa.bool_(): "boolean",
    pa.timestamp("us", tz="UTC"): "timestamp",
    pa.list_(pa.int64()): "array<bigint>",
    pa.list_(pa.int32()): "array<int>",
    pa.list_(pa.float32()): "array<float>",
}


def hour_of(path: str) -> datetime:
    """Start of the UTC hour whose events the file `path` holds; BadInput for a file outside the partitions."""
    match = _PARTITION.search(path)
    if match is None:
        raise BadInput(f"{path} is not in a partition; log files belong into dt=YYYY-MM-DD/hour=HH/, move or remove it")
    return datetime.fromisoformat(f"{match[1]}T{match[2]}:00:00").replace(tzinfo=UTC)


def files_between(storage: Storage, kind: str, start: datetime, end: datetime) -> list[str]:
    """Log files of `kind` (impressions or actions) whose hour touches [start, end), sorted."""
    day = start.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    found: list[str] = []
    while day < end:
        found += [p for p in storage.list(f"events/{kind}/dt={day:%Y-%m-%d}") if p.endswith(".parquet")]
        day += timedelta(days=1)
    return [path for path in found if start - HOUR < hour_of(path) < end]


def check_files(storage: Storage, paths: list[str], schema: pa.Schema) -> int:
    """Read the footer of every file; BadInput names the first that breaks the contract. Returns the number of rows.

    The contract: the columns of the schema, no nulls where it allows none, and events of the hour of the file's folder.
    """
    with ThreadPoolExecutor(1 if isinstance(storage.backend, LocalFiles) else 16) as pool:
        return sum(pool.map(lambda path: _check_file(storage, path, schema), paths))


def read(spark: SparkSession, storage: Storage, paths: list[str], schema: pa.Schema) -> DataFrame:
    """The rows of `paths` as a DataFrame of `schema` (no rows when there are no paths)."""
    if not paths:
        return spark.createDataFrame([], spark_schema(schema))
    reader = spark.read.schema(spark_schema(schema)).option("recursiveFileLookup", "true")
    return reader.parquet(*[_GLOB.sub(r"\\\1", storage.spark_url(path)) for path in paths])  # names, not patterns


def read_events(spark: SparkSession, storage: Storage, kind: str, paths: list[str]) -> DataFrame:
    """Log rows with `source` (path below the root), `timestamp_us` and `received_us` (int64) instead of the times."""
    from pyspark.sql import functions as F

    rows = read(spark, storage, paths, SCHEMAS[kind])
    source = F.regexp_extract(F.col("_metadata.file_path"), _SOURCE, 1) if paths else F.lit("")
    return (
        rows.withColumn("source", source)
        .withColumn("timestamp_us", F.unix_micros("timestamp"))
        .withColumn("received_us", F.unix_micros("received_at"))
        .drop("timestamp", "received_at")
    )


def spark_schema(schema: pa.Schema) -> StructType:
    """The same schema in Spark's types (all columns nullable, as Spark reads them)."""
    from pyspark.sql.types import StructType

    parsed = StructType.fromDDL(", ".join(f"`{field.name}` {_SPARK_TYPES[field.type]}" for field in schema))
    assert isinstance(parsed, StructType)
    return parsed


def in_any(moment_us: Column, windows: list[Window]) -> Column:
    """Whether a time (int64 us) lies in one of the windows."""
    from pyspark.sql import functions as F

    inside = F.lit(False)
    for start, end in merged(windows):
        inside = inside | ((moment_us >= start) & (moment_us < end))
    return inside


def merged(windows: list[Window]) -> list[tuple[int, int]]:
    """The windows as sorted [start_us, end_us) pairs, neighbours joined to one."""
    pairs: list[tuple[int, int]] = []
    for window in sorted(windows):
        if pairs and window.start_us <= pairs[-1][1]:
            pairs[-1] = (pairs[-1][0], max(pairs[-1][1], window.end_us))
        else:
            pairs.append((window.start_us, window.end_us))
    return pairs


@contextmanager
def naming_bad_files() -> Iterator[None]:
    """Turn Spark's report of an unreadable file into BadInput with the file's name."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JJavaError) as error:  # of Connect and of classic sessions
        match = re.search(r"(?:file|s3a):/[^\s'\"]+\.parquet", str(error))
        if match is None or "FAILED_READ_FILE" not in str(error):
            raise
        raise BadInput(f"{unquote(match[0])} cannot be read to its end; write the file again or remove it") from error


def _check_file(storage: Storage, path: str, schema: pa.Schema) -> int:
    try:
        with pq.ParquetFile(_open(storage, path)) as file:
            _check_columns(file, schema, storage.url(path))
            _check_hour(file, path, storage.url(path))
            return int(file.metadata.num_rows)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
            raise  # the disk or S3 failed, a timeout for instance, not the file: Arrow's own errors have no number
        raise BadInput(
            f"{storage.url(path)} is truncated or no Parquet file ({error}); write the file again or remove it"
        ) from error


def _check_columns(file: pq.ParquetFile, schema: pa.Schema, name: str) -> None:
    present = file.schema_arrow
    for field in schema:
        index = present.get_field_index(field.name)
        if index < 0 and field.nullable:
            continue
        if index < 0:
            names = ", ".join(present.names)
            raise BadInput(f"{name}: column {field.name!r} is missing among {names}; ingest it again")
        if (found := present.field(index).type) != field.type:
            raise BadInput(f"{name}: column {field.name!r} is {found}, not {field.type}; ingest it again")
        if not field.nullable and (nulls := sum(_nulls(file, field.name))):
            raise BadInput(f"{name}: {nulls} rows have no {field.name!r}, which every row needs; ingest it again")


def _check_hour(file: pq.ParquetFile, path: str, name: str) -> None:
    """A join reads the hours that it needs: it would never see an event that lies in another one's folder."""
    bounds = [bound for bound in _bounds(file, "timestamp") if bound is not None]
    start = to_us(hour_of(path))
    if any(not start <= bound < start + HOUR_US for bound in bounds):
        raise BadInput(
            f"{name}: its events are from {from_us(min(bounds))} to {from_us(max(bounds))}, not of the UTC hour that "
            "its folder names; ingest it again"
        )


def _nulls(file: pq.ParquetFile, column: str) -> Iterator[int]:
    """Nulls of a flat column, by row group: from the footer's statistics; without statistics the column is read."""
    for group, found in _statistics(file, column):
        known = found is not None and found.has_null_count
        yield found.null_count if known else file.read_row_group(group, [column])[column].null_count


def _bounds(file: pq.ParquetFile, column: str) -> Iterator[int | None]:
    """The smallest and largest values (us) of a column of times, by row group; None of a group without rows."""
    for group, found in _statistics(file, column):
        if found is not None and found.has_min_max:
            yield from (found.min_raw, found.max_raw)
        else:
            values = file.read_row_group(group, [column])[column].cast(pa.int64())
            yield from pc.min_max(values).as_py().values()


def _statistics(file: pq.ParquetFile, column: str) -> Iterator[tuple[int, Any]]:
    """The statistics of a flat column in each row group, or None; leaves of nested columns may have its name."""
    index = next(i for i in range(len(file.schema)) if file.schema.column(i).path == column)
    for group in range(file.num_row_groups):
        yield group, file.metadata.row_group(group).column(index).statistics


def _open(storage: Storage, path: str) -> Any:
    if isinstance(storage.backend, S3):
        return _RangedObject(storage.backend, path)
    assert isinstance(storage.backend, LocalFiles)
    return storage.backend.folder / path


class _RangedObject(io.RawIOBase):
    """An S3 object as a seekable file that fetches only what is read: a footer, not the whole object."""

    def __init__(self, backend: S3, path: str) -> None:
        self.backend, self.path = backend, path
        self.size = backend.client.head_object(Bucket=backend.bucket, Key=backend._key(path))["ContentLength"]
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        end = self.size if size < 0 else min(self.size, self.position + size)
        if end <= self.position:
            return b""
        data = self.backend.read(self.path, span=f"bytes={self.position}-{end - 1}")
        self.position += len(data)
        return data
