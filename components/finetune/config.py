"""The interface of continual training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.config import TrackedConfig


class FinetuneConfig(TrackedConfig):
    """Which version learns from which window. Settings left empty are those that the version was pretrained with."""

    model: Literal["ranker", "retriever"] = Field(default="ranker", description="which model learns")
    version: int | None = Field(default=None, ge=1, description="version that learns; empty: the champion")
    dataset: str = Field(default="", description="id of the window's sequence dataset")
    skip_gap: bool = Field(
        default=False,
        description="leave out joined windows before this one that the version has not learned from, for good;"
        " off: learn from them first",
    )
    compare_frozen: bool = Field(
        default=True, description="also measure the version as it was pretrained on the same events"
    )
    continual_dense_lr: float | None = Field(
        default=None, gt=0, le=1, description="Adam learning rate of dense parameters; empty: as pretrained"
    )
    continual_table_lr: float | None = Field(
        default=None, gt=0, le=10, description="learning rate of the embedding tables; empty: as pretrained"
    )
    continual_bias_lr: float | None = Field(
        default=None, gt=0, le=10, description="learning rate of the ranker's biases; empty: as pretrained"
    )
    continual_batch_tokens: int | None = Field(
        default=None, ge=16, le=10_000_000, description="tokens per batch; empty: as pretrained"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where the HSTU stack is trained; auto: a CUDA device if there is one"
    )
    threads: int = Field(default=2, ge=1, le=256, description="CPU threads; another number can change the last bits")

    def overrides(self) -> dict[str, float]:
        """The model settings that are given here; the retriever has no biases."""
        chosen = self.model_dump(include={name for name in type(self).model_fields if name.startswith("continual_")})
        if self.model == "retriever":
            del chosen["continual_bias_lr"]
        return {name: value for name, value in chosen.items() if value is not None}
