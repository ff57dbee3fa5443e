"""The root URL: local files or S3 behind one small interface.

Two writes exist and both are atomic: `write_bytes` replaces, `create` succeeds for one caller only. A commit in
Freshet is always one `create` of a manifest, after the data it names has been written.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from components.errors import AlreadyExists, BadInput, FreshetError


class Backend(Protocol):
    """What a place to keep files must offer; `path` is relative to the root, '/'-separated."""

    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> None: ...
    def exists(self, path: str) -> bool: ...
    def list(self, prefix: str) -> list[str]: ...
    def delete(self, path: str) -> None: ...


class LocalFiles:
    """Files under a folder. Data reaches the disk (fsync) before its name appears."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        with self._temporary(path, data) as temporary:
            os.replace(temporary, self.folder / path)

    def create(self, path: str, data: bytes) -> None:
        with self._temporary(path, data) as temporary:
            try:
                os.link(temporary, self.folder / path)  # unlike rename, link fails when the name is taken
            except FileExistsError:
                raise AlreadyExists(path) from None

    def exists(self, path: str) -> bool:
        return (self.folder / path).is_file()

    def list(self, prefix: str) -> list[str]:
        found, root = list[str](), len(os.path.join(self.folder, ""))
        for folder, _, names in os.walk(self.folder / prefix, onerror=_unless_gone):
            place = os.path.join(folder, "")[root:]  # texts: a day of a server's events are 40,000 files of each kind
            found += [place + name for name in names if not name.startswith(".")]
        return sorted(found)

    def delete(self, path: str) -> None:
        (self.folder / path).unlink(missing_ok=True)

    @contextmanager
    def _temporary(self, path: str, data: bytes) -> Iterator[Path]:
        """A file with `data` beside `path`, to get its name; gone afterwards, also if the disk is full."""
        target = self.folder / path
        make_folder(target.parent)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        except OSError as error:
            error.filename = error.filename or str(target)  # a failed write does not say of which file
            raise
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)


def _unless_gone(error: OSError) -> None:
    """A folder may go while files are listed, as Spark's temporary ones do. What cannot be read is an error."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


_SMALL = 1 << 20
"""Bytes of a Parquet file that is read before other threads have woken up: there are thousands of these."""
_PAUSES = (0.1, 0.2, 0.4, 0.8)
"""Seconds between attempts at what boto3 does not try again: a create that conflicts, an answer that breaks off."""


class S3:
    """Objects under s3://bucket/prefix; credentials and endpoint come from the environment, as boto3 reads them."""

    def __init__(self, bucket: str, prefix: str) -> None:
        import boto3

        self.bucket, self.prefix = bucket, prefix
        self.client = boto3.client("s3")
        self._refuses = False  # whether the store was seen to refuse a second create

    def read(self, path: str, span: str = "") -> bytes:
        """The object, or the bytes of it that `span` names, as the header Range does."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        wanted = {"Bucket": self.bucket, "Key": self._key(path)} | ({"Range": span} if span else {})
        for pause in (*_PAUSES, None):
            try:
                body = self.client.get_object(**wanted)["Body"]
            except self.client.exceptions.NoSuchKey:
                raise FileNotFoundError(f"s3://{self.bucket}/{self._key(path)}") from None
            try:
                data: bytes = body.read()
                break
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                if pause is None:
                    raise
                time.sleep(pause)
        return data

    def write(self, path: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data)

    def create(self, path: str, data: bytes) -> None:
        """Equal bytes under the name are this caller's own: boto3 repeats a PUT whose answer was lost, and the store
        refuses the repeat. Whoever must tell writers apart gives each other bytes, as manifests do.
        """
        for pause in (0, *_PAUSES):
            time.sleep(pause)
            if self._put_if_absent(path, data):
                self._prove_refusal(path, data)
                return
            found = self._read_if_there(path)
            if found == data:
                return
            if found is not None:
                raise AlreadyExists(path)
        raise FreshetError(
            f"s3://{self.bucket}/{self._key(path)}: of several writers at once none wins; run this again"
        )

    def _put_if_absent(self, path: str, data: bytes) -> bool:
        """False if the store refuses: the name is taken, or others write to it at this moment and none has won."""
        from botocore.exceptions import ClientError

        try:
            self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data, IfNoneMatch="*")
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise
            return False
        return True

    def _prove_refusal(self, path: str, data: bytes) -> None:
        """After the first create, create the same again: some S3-compatible stores do it, whatever is there."""
        if not self._refuses and self._put_if_absent(path, data):
            self.delete(path)
            raise BadInput(
                f"the store of s3://{self.bucket} ignores If-None-Match: of two writers both would win, and events be "
                "trained on twice; use a store, or a version of it, that has conditional writes"
            )
        self._refuses = True

    def _read_if_there(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except FileNotFoundError:
            return None

    def exists(self, path: str) -> bool:
        from botocore.exceptions import ClientError

        try:
            self.client.head_object(Bucket=self.bucket, Key=self._key(path))
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                return False
            raise
        return True

    def list(self, prefix: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self._key(f"{prefix.rstrip('/')}/" if prefix else "")
        )
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        cut = len(self._key(""))
        return sorted(key[cut:] for key in keys)

    def delete(self, path: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self._key(path))

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path


class Storage:
    """Everything Freshet keeps, under one root URL (`file:///folder` or `s3://bucket/prefix`)."""

    def __init__(self, root: str) -> None:
        parsed = urlsplit(root)
        self.root = root.rstrip("/")
        self.backend: Backend
        if "?" in root or "#" in root:  # in a URL they end the path, so the rest of the folder's name would be lost
            raise BadInput(f"root {root!r} has a ? or #; choose a folder or prefix without them")
        if parsed.scheme == "file" and not parsed.netloc and parsed.path.startswith("/"):
            self.backend = LocalFiles(Path(parsed.path))
        elif parsed.scheme == "s3" and parsed.netloc:
            self.backend = S3(parsed.netloc, parsed.path.strip("/"))
        else:
            raise BadInput(f"root {root!r} is neither file:///an/absolute/folder nor s3://bucket/prefix")

    def read_bytes(self, path: str) -> bytes:
        """The content of `path`; FileNotFoundError when absent."""
        return self.backend.read(path)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Replace `path` atomically."""
        self.backend.write(path, data)

    def create(self, path: str, data: bytes) -> None:
        """Create `path` atomically; AlreadyExists when somebody else was first."""
        self.backend.create(path, data)

    def exists(self, path: str) -> bool:
        return self.backend.exists(path)

    def list(self, prefix: str) -> list[str]:
        """Paths of all files under the folder `prefix`, sorted; temporary files are never listed."""
        return self.backend.list(prefix)

    def delete(self, path: str) -> None:
        self.backend.delete(path)

    def url(self, path: str) -> str:
        return f"{self.root}/{path}"

    def spark_url(self, path: str) -> str:
        """The same place as Spark names it (S3 through Hadoop's s3a)."""
        return self.url(path).replace("s3://", "s3a://", 1)

    def read_table(self, path: str) -> pa.Table:
        """Read one Parquet file; BadInput names a file that is truncated, damaged or no Parquet."""
        data = pa.BufferReader(self.read_bytes(path))
        try:
            with pq.ParquetFile(data) as file:  # pq.read_table scans a dataset: twice the work for a small file
                table: pa.Table = file.read(use_threads=data.size() > _SMALL)
                return table
        except (pa.ArrowException, OSError) as error:  # OSError: of damaged pages, the bytes are here already
            raise BadInput(f"{self.url(path)} is not a readable Parquet file ({error}); write it again") from error

    def read_table_as(self, path: str, schema: pa.Schema) -> pa.Table:
        """Read the columns of `schema` of one Parquet file; a nullable column that the file lacks is null.

        BadInput names a file that is unreadable, lacks another column, or holds what the schema does not allow.
        """
        table = self.read_table(path)
        lacking = [field for field in schema if field.nullable and field.name not in table.column_names]
        for field in lacking:
            table = table.append_column(field, pa.nulls(len(table), field.type))
        try:
            return table.select(schema.names).cast(schema)
        except (KeyError, ValueError, pa.ArrowException) as error:
            raise BadInput(f"{self.url(path)} does not hold what it must ({error}); write it again") from error

    def write_table(self, path: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write_bytes(path, sink.getvalue().to_pybytes())


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, as far as they are missing, and their names durable."""
    if folder.exists():  # what is in the way of a folder fails whatever is made below it
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: an fsync of a file does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
