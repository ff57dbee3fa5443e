"""Fixtures every test may use."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from components.storage import Storage

logging.getLogger("py4j").setLevel(logging.WARNING)  # it logs from finalisers, when pytest has closed the stream

SHARED = Path(os.environ.get("FRESHET_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty local store."""
    return Storage(f"file://{tmp_path}/store")


@pytest.fixture
def shared() -> Path:
    """The folder of real logs and golden files; skips where it is absent, as in a fresh clone."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared folder of real logs and golden files, absent at {SHARED}")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest starts first, so that of several processes none has it left at the end."""
    items.sort(key=lambda item: item.get_closest_marker("end_to_end") is None)
