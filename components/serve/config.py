"""Settings of the server."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from components.config import StepConfig, home
from components.errors import BadInput
from components.schemas import action_bit


class ServeConfig(StepConfig):
    """The server: where it listens, what it loads, how it ranks."""

    host: str = Field("127.0.0.1", description="address to listen on; 127.0.0.1 is reachable from this machine only")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    journal: str = Field(
        "",
        description="folder of the write-ahead journal, on a local disk, one per server"
        " (default: inside a file:// root, else $FRESHET_HOME/journal, .freshet/journal here)",
    )
    sync_interval_s: float = Field(1.0, gt=0, le=3600, description="seconds between looks for new parameters")
    history_refresh_s: float = Field(
        10.0, gt=0, le=3600, description="seconds between looks for event files and items that others wrote"
    )
    history_days: int = Field(
        30, ge=0, le=3650, description="days of events read at start, counted back from the newest day in the log"
    )
    history_interactions: int = Field(512, ge=1, le=100_000, description="interactions kept in memory per user")
    history_users: int = Field(
        200_000, ge=1, le=100_000_000, description="users kept in memory; the least recently active leave first"
    )
    attribution_window_s: int = Field(
        3600, ge=1, le=30 * 86400, description="an action counts for its impression for this long (seconds), as in join"
    )
    candidates: int = Field(200, ge=1, le=10_000, description="items the retriever hands to the ranker")
    max_candidates: int = Field(10_000, ge=1, le=100_000, description="largest candidate list /v1/rank takes")
    score_weights: str = Field(
        "click=1,long_view=1,like=2",
        description="ranking score: weighted sum of the heads' probabilities; heads the model lacks are left out",
    )
    exploration: float = Field(
        0.1, ge=0, le=1, description="share of slots with a random available item, so that new items get seen"
    )
    table_precision: Literal["fp32", "fp16", "int8"] = Field(
        "fp32",
        description="how embedding rows are kept in memory: fp32 is the trainer's to the bit, fp16 halves and int8"
        " (one scale per row) quarters them",
    )
    flush_interval_s: float = Field(2.0, gt=0, le=3600, description="seconds between writes to the event log")
    future_tolerance_s: float = Field(5.0, ge=0, le=3600, description="how far ahead a client's clock may run")
    threads: int = Field(2, ge=1, le=256, description="requests scored at the same time; about one per core")

    @field_validator("score_weights")
    @classmethod
    def _known_heads(cls, value: str) -> str:
        try:
            parse_weights(value)
        except BadInput as error:
            raise ValueError(str(error)) from error
        return value

    def weights(self) -> dict[str, float]:
        """Head -> weight of the ranking score."""
        return parse_weights(self.score_weights)

    def journal_folder(self) -> Path:
        """Where the journal lives; a function of root and port, so that a restart finds what a crash left."""
        if self.journal:
            return Path(self.journal)
        parsed = urlsplit(self.root)
        if parsed.scheme == "file":
            return Path(parsed.path) / "serving" / "journal" / f"port-{self.port}"
        digest = hashlib.sha256(self.root.encode()).hexdigest()[:12]
        return home() / "journal" / f"{digest}-port-{self.port}"


def parse_weights(text: str) -> dict[str, float]:
    """'click=1,like=2' -> {'click': 1.0, 'like': 2.0}; BadInput for unknown actions and wrong numbers."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        action_bit(name)
        try:
            weights[name] = float(number)
        except ValueError:
            raise BadInput(f"weight {number!r} of {name} is not a number; write like click=1,like=2") from None
        if not math.isfinite(weights[name]):
            raise BadInput(f"weight of {name} is {number}; it must be finite")
    return weights
