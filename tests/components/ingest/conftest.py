"""An empty store, and a small KuaiRand."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.storage import Storage
from tests.components.ingest.cases import KUAIRAND_LOG, KUAIRAND_VIDEOS


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/store")


@pytest.fixture
def kuairand(tmp_path: Path) -> Path:
    folder = tmp_path / "KuaiRand-Pure"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "log_standard_4_22_to_5_08_pure.csv").write_text(KUAIRAND_LOG)
    (folder / "data" / "video_features_basic_pure.csv").write_text(KUAIRAND_VIDEOS)
    return folder
