"""The files under configs/: TOML, one per model of a benchmark, each read into the type that the benchmark has."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from components.errors import BadInput

ALL_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
Entry = TypeVar("Entry", bound=BaseModel)


def read_config(path: Path, kind: type[Entry]) -> Entry:
    """Raises BadInput for a file that is absent or not of this kind."""
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.toml")))
        raise BadInput(f"no config {path}; known are {known or 'none'}") from error
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise BadInput(f"{path} is no config of a run: {error}") from error
