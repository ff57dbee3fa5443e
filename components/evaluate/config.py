"""The interface of evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.config import TrackedConfig


class EvaluateConfig(TrackedConfig):
    """Which parameters to measure on which data."""

    model: Literal["ranker", "retriever"] = Field(default="ranker", description="which model to measure")
    dataset: str = Field(default="", description="id of the sequence dataset to measure on")
    part: Literal["eval", "train"] = Field(default="eval", description="part of the dataset")
    checkpoint: str = Field(default="", description="folder of a checkpoint; empty: a version is measured")
    version: int | None = Field(default=None, ge=1, description="version to measure; empty: the champion")
    as_of: int | None = Field(default=None, ge=0, description="sync point of the version; empty: the newest")
    threads: int = Field(default=2, ge=1, le=256, description="CPU threads")
