"""The interface of pretraining. The model's own settings stay the model's: see model/settings.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.config import TrackedConfig
from model.settings import ModelConfig


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


class PretrainConfig(ModelConfig, _Work):
    """Everything pretraining depends on; equal settings give the same checkpoint."""

    heads: str = Field(default="click,long_view,like", description="Actions predicted, one output each (ranker)")
    bias_slots: str = Field(default="item,user,page", description="Features with an additive logit per action (ranker)")
    bias_lr: float = Field(default=0.2, gt=0, description="Learning rate of the additive logits, pretraining (ranker)")
    continual_bias_lr: float = Field(
        default=0.1, gt=0, description="Learning rate of the additive logits, continual (ranker)"
    )
    bias_accumulator: float = Field(
        default=0.1, ge=0, description="Start of the Adagrad sums of additive logits (ranker)"
    )
    positive_actions: str = Field(
        default="click,long_view,like,rating", description="What makes a positive (retriever)"
    )
    temperature: float = Field(default=0.07, gt=0, le=10, description="Divides the cosine in the softmax (retriever)")
    item_side: bool = Field(
        default=True, description="Add author and category to an item's output embedding (retriever)"
    )
    full_softmax_limit: int = Field(
        default=20_000, ge=1, description="Largest catalogue with an exact softmax (retriever)"
    )
    negatives: int = Field(default=2_048, ge=1, description="Sampled items per batch beyond that limit (retriever)")
