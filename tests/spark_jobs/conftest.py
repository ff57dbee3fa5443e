from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from components.storage import Storage
from spark_jobs.session import session
from tests.spark_jobs.log import MASTER

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(scope="session")
def spark() -> SparkSession:
    """The one Spark session of the test run; the steps under test find it and use it too."""
    return session(MASTER)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/store")
