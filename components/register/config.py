"""The interface of registering."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.config import TrackedConfig


class RegisterConfig(TrackedConfig):
    """Which checkpoint becomes a version."""

    model: Literal["ranker", "retriever"] = Field(default="ranker", description="which model the checkpoint is of")
    checkpoint: str = Field(default="", description="folder of the checkpoint, relative to the storage root")
