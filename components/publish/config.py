"""The interface of publishing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.config import TrackedConfig


class PublishConfig(TrackedConfig):
    """Which version's parameter log begins."""

    model: Literal["ranker", "retriever"] = Field(default="ranker", description="which model")
    version: int = Field(default=1, ge=1, description="registered version")
