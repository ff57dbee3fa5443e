"""One place that opens a Spark session, on whatever runs the jobs.

    local[2]            Spark in this process's own JVM (default; starts in a few seconds)
    sc://host:port      a running Spark Connect server, e.g. `python -m spark_jobs.server` (starts in about two)
    submitted           the session that spark-submit prepared
    k8s://... and others  any Spark master URL

The jobs use the DataFrame API only, so they run the same on all of them.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from components.errors import BadInput, FreshetError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DEFAULT = "local[2]"
OLDEST_JAVA = 17
JVM_PLACES = ("/usr/lib/jvm", "/Library/Java/JavaVirtualMachines", "/opt/java")

SQL_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.compression.codec": "zstd",
    "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
    "spark.sql.sources.parallelPartitionDiscovery.threshold": "10000",
}
"""What the meaning and the form of the output depend on: set on every session."""

QUICK_JVM = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""Halves the CPU time that a JVM takes to start and to run its first jobs; $FRESHET_SPARK_JAVA_OPTIONS replaces it."""
SMALL_JOB_ROWS = 200_000
ROWS_PER_TASK = 250_000


def default() -> str:
    """The Spark that $FRESHET_SPARK names, else local[2]."""
    return os.environ.get("FRESHET_SPARK") or DEFAULT


def session(where: str = "", root: str = "") -> SparkSession:
    """A session on `where` (see the module text; empty = `default()`) that can read and write the storage `root`.

    BadInput as of `java_environment`; FreshetError when no Spark Connect server answers: it may be starting again.
    """
    where = where or default()
    if where.startswith("sc://"):
        return _connect(where)
    from pyspark.sql import SparkSession

    os.environ |= java_environment()
    builder = SparkSession.builder.appName("freshet")
    for key, value in settings(where, root).items():
        builder = builder.config(key, value)
    if where != "submitted":
        builder = builder.master(where)
    spark = builder.getOrCreate()
    _apply(spark)
    return spark


def settings(where: str, root: str) -> dict[str, str]:
    """All settings of a session that has a JVM of its own (also of the Connect server)."""
    chosen = dict(SQL_SETTINGS)
    chosen["spark.hadoop.mapreduce.fileoutputcommitter.marksuccessfuljobs"] = "false"
    chosen["spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version"] = "2"  # safe: a manifest is the commit
    if where.startswith("local"):
        chosen |= {
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.log.level": "ERROR",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.extraJavaOptions": os.environ.get("FRESHET_SPARK_JAVA_OPTIONS", QUICK_JVM),
            "spark.driver.memory": os.environ.get("FRESHET_SPARK_MEMORY", "2g"),
        }
    if root.startswith("s3://"):
        chosen |= s3_settings()
    return chosen


def s3_settings() -> dict[str, str]:
    """Hadoop's s3a from the same environment variables that boto3 reads.

    The hadoop-aws connector is no part of pip's pyspark: images put it among Spark's jars; elsewhere
    $FRESHET_SPARK_PACKAGES names it (org.apache.hadoop:hadoop-aws:<Spark's Hadoop version>) and Spark fetches it.
    """
    chosen = {}
    if packages := os.environ.get("FRESHET_SPARK_PACKAGES"):
        chosen["spark.jars.packages"] = packages
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        chosen["spark.hadoop.fs.s3a.endpoint"] = endpoint
        chosen["spark.hadoop.fs.s3a.path.style.access"] = "true"
        chosen["spark.hadoop.fs.s3a.connection.ssl.enabled"] = str(endpoint.startswith("https")).lower()
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        chosen["spark.hadoop.fs.s3a.endpoint.region"] = region
    return chosen


def tune(spark: SparkSession, rows: int) -> None:
    """Set the session up for a job over about so many input rows.

    A small job takes longer to compile and to re-plan than to interpret: one task per stage, no code generation.
    """
    small = rows < SMALL_JOB_ROWS
    spark.conf.set("spark.sql.shuffle.partitions", str(max(1, -(-rows // ROWS_PER_TASK))))
    spark.conf.set("spark.sql.adaptive.enabled", str(not small).lower())
    spark.conf.set("spark.sql.codegen.wholeStage", str(not small).lower())


def java_environment() -> dict[str, str]:
    """What a JVM must find: its home, and a locale in which it can name all files. BadInput: no JDK 17+, no user."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        raise BadInput(
            f"Java needs a name of the user, and /etc/passwd has none for {os.getuid()}; run as a user that it has "
            "(in the image: 1000)"
        ) from None
    return {"JAVA_HOME": str(java_home()), "LC_ALL": "C.UTF-8"}


def java_home() -> Path:
    """The home of a JDK 17+: $JAVA_HOME, then `java` on the PATH, then the usual folders; else BadInput."""
    found = []
    for home in _java_candidates():
        version = java_version(home)
        if version >= OLDEST_JAVA:
            return home
        found.append(f"{home} ({version})")
    seen = f"found only {', '.join(found)}" if found else "found none"
    raise BadInput(
        f"Spark needs a JDK {OLDEST_JAVA} or newer, {seen}; "
        "install one (apt-get install openjdk-17-jdk-headless) or set JAVA_HOME"
    )


def java_version(home: Path) -> int:
    """Major version of the JDK at `home`, 0 when there is none."""
    release = home / "release"
    if not (home / "bin" / "java").exists():
        return 0
    if release.is_file():
        text = release.read_text(errors="replace")
    else:
        text = subprocess.run([home / "bin" / "java", "-version"], capture_output=True, text=True, check=False).stderr
    match = re.search(r'(?:JAVA_VERSION=|version )"(\d+)', text)
    return int(match.group(1)) if match else 0


def _java_candidates() -> list[Path]:
    candidates = []
    if home := os.environ.get("JAVA_HOME"):
        candidates.append(Path(home))
    if java := shutil.which("java"):
        candidates.append(Path(java).resolve().parent.parent)
    for place in map(Path, JVM_PLACES):
        homes = [*place.glob("*"), *place.glob("*/Contents/Home")] if place.is_dir() else []
        candidates += sorted((h for h in homes if java_version(h)), key=java_version)
    return candidates


def _connect(where: str) -> SparkSession:
    url = urlparse(where.split(";")[0])
    host, port = url.hostname or "127.0.0.1", url.port or 15002
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        raise FreshetError(
            f"no Spark Connect server answers at {where} ({error}); start one with python -m spark_jobs.server, "
            f"or set FRESHET_SPARK={DEFAULT}"
        ) from error
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.remote(where).getOrCreate()
    _apply(spark)
    return spark


def _apply(spark: SparkSession) -> None:
    """Runtime settings, for sessions that existed before or live on a server."""
    for key, value in SQL_SETTINGS.items():
        spark.conf.set(key, value)
