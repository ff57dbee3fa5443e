"""The settings that the ranker and the retriever share: flat scalars with descriptions and bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from model.hstu import HstuConfig


class ModelConfig(BaseModel):
    """Architecture, features and training of one model. Learning rates are per phase: pretrain, continual."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int = Field(default=32, ge=4, description="Width of a token and of its embeddings")
    layers: int = Field(default=2, ge=1, le=32, description="HSTU layers")
    attention_heads: int = Field(default=2, ge=1, description="Attention heads per layer")
    head_dim: int = Field(default=16, ge=1, description="Query, key and value width per attention head")
    window: int = Field(default=128, ge=1, description="Tokens that a token sees at most")
    normaliser: float = Field(default=32.0, gt=0, description="Constant that divides the attention sum")
    positions: int = Field(default=128, ge=0, description="Relative position buckets, 0 = no position bias")
    time_bias: bool = Field(default=True, description="Relative time bias in the attention")
    hour_of_day: bool = Field(default=True, description="Embed the hour of day (UTC) of a request")
    use_aux: bool = Field(default=False, description="Give the auxiliary series tokens of their own")
    slots: str = Field(default="item,author,category,page,duration", description="Embedded features of a token")
    dropout: float = Field(default=0.2, ge=0, lt=1, description="Dropout inside the HSTU layers")
    input_dropout: float = Field(default=0.2, ge=0, lt=1, description="Dropout of the token embeddings")
    init_scale: float = Field(
        default=0.02, ge=0, le=1, description="New table rows are uniform in (-init_scale, init_scale)"
    )
    table_optimizer: str = Field(
        default="adagrad", description="sgd, adagrad, rowwise_adagrad or adam, inside the rows"
    )
    table_accumulator: float = Field(
        default=30.0, ge=0, description="Start of the Adagrad sums: larger = slower for rare ids"
    )
    epochs: int = Field(
        default=2, ge=1, le=1000, description="Passes over the data in pretraining (a window is passed once)"
    )
    batch_tokens: int = Field(default=2048, ge=16, description="Tokens per training batch")
    dense_lr: float = Field(default=1e-3, gt=0, description="Adam learning rate of the dense parameters, pretraining")
    table_lr: float = Field(default=0.05, gt=0, description="Learning rate of the embedding tables, pretraining")
    continual_dense_lr: float = Field(default=5e-4, gt=0, description="Adam learning rate in continual training")
    continual_table_lr: float = Field(
        default=0.05, gt=0, description="Learning rate of the tables in continual training"
    )
    continual_batch_tokens: int = Field(default=4096, ge=16, description="Tokens per batch in continual training")
    warmup: float = Field(default=0.1, ge=0, le=1, description="Share of pretraining steps with a rising learning rate")
    final_lr: float = Field(default=0.1, ge=0, le=1, description="Learning rates at the end of pretraining, relative")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of the dense parameters")
    clip_norm: float = Field(default=1.0, gt=0, description="Gradient norm limit over dense parameters and tables")
    seed: int = Field(default=0, ge=0, description="Seed of the initial weights, dropout and order of batches")

    def hstu(self) -> HstuConfig:
        """The HSTU stack of this model."""
        from model.hstu import HstuConfig  # not at the top: trigger forms read these settings without torch

        return HstuConfig(
            dim=self.dim,
            layers=self.layers,
            heads=self.attention_heads,
            dqk=self.head_dim,
            dv=self.head_dim,
            normaliser=self.normaliser,
            positions=self.positions,
            time_bias=self.time_bias,
            dropout=self.dropout,
        )

    def slot_names(self) -> list[str]:
        """Names of the embedded features."""
        return [name.strip() for name in self.slots.split(",") if name.strip()]
