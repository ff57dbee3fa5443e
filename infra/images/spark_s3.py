"""Puts the S3 connector among the jars of pip's Spark: hadoop-aws, of the version of Spark's Hadoop, with the AWS SDK.

Spark's own resolver fetches them, from where it looks by itself or from the Maven repository that the environment
variable DEFAULT_ARTIFACT_REPOSITORY names. FRESHET_SPARK_PACKAGES replaces what is fetched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SDK = "software/amazon/awssdk/services/s3/S3Client.class"


def connector(jars: Path) -> str:
    """Maven coordinates of the connector that fits the Hadoop among these jars."""
    (hadoop,) = jars.glob("hadoop-client-api-*.jar")
    return f"org.apache.hadoop:hadoop-aws:{hadoop.stem.removeprefix('hadoop-client-api-')}"


def install(packages: str, spark: Path, target: Path) -> list[str]:
    """Fetch packages (coordinates, separated by commas) and all that they need into `target`; returns the files' names.

    SystemExit when the AWS SDK is not among them; CalledProcessError when Spark finds a package nowhere.
    """
    environment = {name: value for name, value in os.environ.items() if value}
    environment |= {"SPARK_HOME": str(spark), "PYSPARK_PYTHON": sys.executable}
    with tempfile.TemporaryDirectory() as work:
        program = Path(work, "nothing.py")
        program.write_text("")
        settings = ["--master", "local[1]", "--packages", packages, "--conf", f"spark.jars.ivy={work}"]
        subprocess.run([spark / "bin" / "spark-submit", *settings, program], env=environment, check=True)
        found = sorted(Path(work, "jars").glob("*.jar"))
        if not any(SDK in zipfile.ZipFile(jar).namelist() for jar in found):
            raise SystemExit(
                f"{packages} brings no AWS SDK; name it, too, by FRESHET_SPARK_PACKAGES={packages},"
                "software.amazon.awssdk:bundle:VERSION, of the version that the release notes of that Hadoop ask for"
            )
        for jar in found:
            shutil.copy(jar, target)
        return [jar.name for jar in found]


if __name__ == "__main__":
    import pyspark

    home = Path(pyspark.__path__[0])
    wanted = os.environ.get("FRESHET_SPARK_PACKAGES") or connector(home / "jars")
    print("\n".join(install(wanted, home, home / "jars")))
