"""The interface of pretraining. The model's own settings stay the model's: see model/settings.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.config import TrackedConfig
from model.settings import RankerConfig, RetrieverConfig


class _Work(TrackedConfig):
    """What to train on what; first in the command line and in the form."""

    model: Literal["ranker", "retriever"] = Field(default="ranker", description="which model to train")
    dataset: str = Field(
        default="", description="id of the sequence dataset; its train part is learned, its eval part measured"
    )
    learn_eval: bool = Field(
        default=True, description="after measuring on the eval part, learn from it too, as from a continual window"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where the HSTU stack is trained; auto: a CUDA device if there is one"
    )
    threads: int = Field(default=2, ge=1, le=256, description="CPU threads; another number can change the last bits")
    save_every_s: float = Field(
        default=300.0, ge=0, description="seconds between saves, from which a killed pretraining goes on (0: no saves)"
    )


class PretrainConfig(RankerConfig, RetrieverConfig, _Work):
    """Everything pretraining depends on; equal settings give the same checkpoint, however often it is saved."""
