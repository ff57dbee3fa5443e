"""A Spark Connect server in the foreground: one warm JVM that serves the jobs of every window.

    python -m spark_jobs.server                          # 127.0.0.1:15002, local[2]
    FRESHET_SPARK=sc://127.0.0.1:15002 python -m components.join ...

A step that connects to it starts in about two seconds instead of ten. It listens on 127.0.0.1 unless told otherwise,
has no authentication, and ends at SIGTERM or Ctrl-C. No extra jar is needed: pip's pyspark brings the server along.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from components.config import default_root
from spark_jobs.session import java_environment, settings

MAIN_CLASS = "org.apache.spark.sql.connect.service.SparkConnectServer"


def command(host: str, port: int, master: str, memory: str, root: str) -> list[str]:
    """The spark-submit command line of the server."""
    import pyspark

    chosen = settings(master, root) | {
        "spark.connect.grpc.binding.address": host,
        "spark.connect.grpc.binding.port": str(port),
        "spark.driver.memory": memory,
    }
    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    options = [part for key, value in chosen.items() for part in ("--conf", f"{key}={value}")]
    return [str(submit), "--class", MAIN_CLASS, "--master", master, *options, "spark-internal"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spark_jobs.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=15002, help="port to listen on (default 15002)")
    parser.add_argument("--master", default="local[2]", help="Spark master that runs the jobs (default local[2])")
    parser.add_argument("--memory", default=os.environ.get("FRESHET_SPARK_MEMORY", "2g"), help="heap of the JVM")
    parser.add_argument("--root", default=default_root(), help="storage root, for its S3 settings")
    arguments = parser.parse_args()
    line = command(arguments.host, arguments.port, arguments.master, arguments.memory, arguments.root)
    environment = os.environ | java_environment() | {"SPARK_HOME": str(Path(line[0]).parent.parent)}
    print(f"Spark Connect server on sc://{arguments.host}:{arguments.port}, ready in a few seconds", flush=True)
    os.execve(line[0], line, environment)  # the JVM takes over this process, so one signal ends it


if __name__ == "__main__":
    main()
