"""The published code's own inputs and outputs, if the shared folder is there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(os.environ.get("FRESHET_SHARED", Path(__file__).resolve().parents[3] / "shared"))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def load(name: str) -> dict[str, np.ndarray]:
    path = SHARED / "golden" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"the published vectors are not here: {path}")
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def assert_near(got: torch.Tensor | None, expected: np.ndarray, what: str) -> None:
    """Equal to the tolerance of the dtype, relative to the largest value of the array (at least 1)."""
    assert got is not None, f"{what}: no gradient"
    want = torch.from_numpy(expected)
    scale = max(1.0, float(want.abs().max()))
    error = float((got.detach().double() - want).abs().max()) / scale
    assert error <= TOLERANCE[got.dtype], f"{what}: off by {error:.2e}"
