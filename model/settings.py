"""The settings of the models: flat scalars with descriptions and bounds, readable without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from model.hstu import HstuConfig

Switch = Literal["variant", "off", "on"]
"""A part of the architecture: as the variant has it, or without it, or with it."""
Selection = Literal["weighted", "greedy", "uniform"]
"""Which interactions stochastic length keeps: by age, the newest, any."""


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
    variant: Literal["research", "production"] = Field(
        default="research",
        description="Published network: research (SiLU on u, v, q, k; relative position and time bias) or production "
        "(learned norms, scores / sqrt(d), SiLU on u alone, position and time at the input, one request per sequence)",
    )
    relative_bias: Literal["variant", "both", "position", "time", "none"] = Field(
        default="variant", description="Relative bias in the attention; variant: both in research, none in production"
    )
    softmax: bool = Field(default=False, description="Softmax instead of pointwise SiLU attention (ablation, slow)")
    silu: Literal["variant", "all", "gate"] = Field(default="variant", description="SiLU on u, v, q and k, or on u")
    gate: Literal["variant", "product", "concat"] = Field(
        default="variant", description="What is projected back: u * norm(a), or [u, a, u * norm(a)]"
    )
    learned_norms: Switch = Field(default="variant", description="Learned scale and shift in the layer norms")
    scale_scores: Switch = Field(default="variant", description="Divide attention scores by sqrt(head_dim)")
    projection_bias: Switch = Field(default="variant", description="Bias in the projection to u, v, q and k")
    input_position: Switch = Field(
        default="variant", description="Add an embedding of the distance from the end (needs request examples)"
    )
    input_time: Switch = Field(
        default="variant",
        description="Add an embedding of the age at request time (needs request examples)",
    )
    examples: Literal["variant", "sequence", "request"] = Field(
        default="variant", description="Train on a user's whole sequence at once, or on one sequence per request"
    )
    context: str = Field(
        default="",
        description="Slots with a token of their own before the history: user, page. Unlike in the published network "
        "they do not see the history, so that it can be cut and kept",
    )
    init_scale: float = Field(
        default=0.02, ge=0, le=1, description="New table rows are uniform in (-init_scale, init_scale)"
    )
    table_optimizer: Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl"] = Field(
        default="adagrad", description="Row optimiser of the tables"
    )
    table_accumulator: float = Field(
        default=30.0, ge=0, description="Start of the Adagrad sums: larger = slower for rare ids"
    )
    table_admission: str = Field(
        default="",
        description="Events from which on an id gets a row, by feature, as item=5,user=2; others from the first",
    )
    table_ttl_days: str = Field(
        default="",
        description="Days of event time after which a row without a new event expires, by feature, as user=90",
    )
    table_min_rows: str = Field(
        default="", description="Rows of a table that expiry leaves in any case, by feature, as item=10000"
    )
    table_max_rows: str = Field(default="", description="Rows of a table at most, by feature, as user=1000000")
    table_when_full: Literal["evict_stalest", "evict_rarest", "refuse"] = Field(
        default="evict_stalest", description="With table_max_rows: which rows make room, or that new ids get none"
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
    max_interactions: int = Field(
        default=0, ge=0, description="Newest interactions per user that training reads, 0 = all"
    )
    stochastic_alpha: float = Field(
        default=2.0, gt=1, le=2, description="Stochastic length: mostly max_interactions^(alpha/2) of them, 2 = all"
    )
    stochastic_selection: Selection = Field(
        default="weighted", description="Which interactions stochastic length keeps: by age, the newest, any"
    )
    generative_sampling: bool = Field(
        default=False, description="Request examples: per pass, each of a user's n requests with probability 1/n"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Of the HSTU stack while training; bfloat16 (mixed) where the hardware has it, else float32",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Seed of the initial weights, dropout and order of batches"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stochastic_alpha < 2 and not self.max_interactions:
            raise ValueError("stochastic_alpha below 2 needs max_interactions, the length that it is relative to")
        encodes = self.encodes_position() or self.encodes_time()
        if encodes and not self.per_request():
            raise ValueError(
                "input_position and input_time are relative to one request; set examples=request, or switch them off"
            )
        if self.generative_sampling and not self.per_request():
            raise ValueError("generative_sampling needs examples=request: a sequence is read once per pass anyway")
        if unknown := sorted(set(self.context_slots()) - {"user", "page"}):
            raise ValueError(f"unknown context slots {', '.join(unknown)}; known are user and page")
        if "page" in self.context_slots() and not self.per_request():
            raise ValueError("a context token for page needs examples=request: the page is that of one request")
        if self.context_slots() and self._has_bias("position") and self.positions > self.window + 1:
            raise ValueError("context tokens need positions <= window + 1, so that a cut history changes no score")
        return self

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        for setting in _NAMES:
            names = split_names(getattr(self, setting, ""))
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{setting} names {', '.join(twice)} twice; keep one of them")
        return self

    def hstu(self) -> HstuConfig:
        """The HSTU stack of this model."""
        from model.hstu import HstuConfig  # not at the top: trigger forms read these settings without torch

        production = self.variant == "production"
        return HstuConfig(
            dim=self.dim,
            layers=self.layers,
            heads=self.attention_heads,
            dqk=self.head_dim,
            dv=self.head_dim,
            normaliser=self.normaliser,
            positions=self.positions if self._has_bias("position") else 0,
            time_bias=self.time_bias and self._has_bias("time"),
            softmax=self.softmax,
            dropout=self.dropout,
            gate="concat_raw" if (production if self.gate == "variant" else self.gate == "concat") else "product",
            silu_all=not production if self.silu == "variant" else self.silu == "all",
            scale_scores=self._on(self.scale_scores),
            affine_norm=self._on(self.learned_norms),
            uvqk_bias=self._on(self.projection_bias),
            out_bias=not production,
        )

    def _on(self, switch: str) -> bool:
        """Whether a switch that production has and research has not is on."""
        return self.variant == "production" if switch == "variant" else switch == "on"

    def _has_bias(self, part: str) -> bool:
        wanted = self.relative_bias
        if wanted == "variant":
            wanted = "none" if self.variant == "production" else "both"
        return wanted in (part, "both")

    def encodes_position(self) -> bool:
        """Whether tokens carry their distance from the end of the history."""
        return self._on(self.input_position)

    def encodes_time(self) -> bool:
        """Whether tokens carry their age at request time."""
        return self._on(self.input_time)

    def per_request(self) -> bool:
        """Whether training reads one sequence per request instead of one per user."""
        return self.variant == "production" if self.examples == "variant" else self.examples == "request"

    def reach(self) -> int:
        """How many history tokens before a request can influence its scores, where impressions are known at once.

        One that became known late looks back from its own request, and so may reach further.
        """
        return self.window * self.layers

    def slot_names(self) -> list[str]:
        """Names of the embedded features."""
        return split_names(self.slots)

    def context_slots(self) -> list[str]:
        """Slots of the tokens before the history."""
        return split_names(self.context)


_NAMES = ("slots", "context", "heads", "regression", "bias_slots")
"""Settings that are lists of names; one that is there twice would count twice."""


class RankerConfig(ModelConfig):
    """Settings of the ranker; the defaults are measured (docs/experiments.md)."""

    heads: str = Field(default="click,long_view,like", description="Actions predicted, one output each (ranker)")
    regression: str = Field(default="", description="Values predicted: watch (seconds), or empty (ranker)")
    regression_weight: float = Field(
        default=0.1, gt=0, le=100, description="Weight of the squared error of log(1 + seconds) in the loss (ranker)"
    )
    task_head: Literal["shared_bottom", "mmoe"] = Field(
        default="shared_bottom", description="Outputs: one bottom for all, or experts with a gate per output (ranker)"
    )
    head_hidden: int = Field(
        default=0, ge=0, le=4096, description="Hidden units of the bottom or of each expert, 0 = linear (ranker)"
    )
    experts: int = Field(default=4, ge=1, le=64, description="Experts of mmoe (ranker)")
    negative_rate: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of an action's negatives trained on, log-odds corrected; a regression learns from this "
        "share of all impressions (ranker)",
    )
    bias_slots: str = Field(default="item,user,page", description="Features with an additive logit per action (ranker)")
    bias_lr: float = Field(default=0.2, gt=0, description="Learning rate of the additive logits, pretraining (ranker)")
    continual_bias_lr: float = Field(
        default=0.1, gt=0, description="Learning rate of the additive logits, continual (ranker)"
    )
    bias_accumulator: float = Field(
        default=0.1, ge=0, description="Start of the Adagrad sums of additive logits (ranker)"
    )

    def head_names(self) -> list[str]:
        """Names of the predicted actions."""
        return split_names(self.heads)

    def regression_names(self) -> list[str]:
        """Names of the predicted values."""
        return split_names(self.regression)

    def bias_names(self) -> list[str]:
        """Slots with additive logits."""
        return split_names(self.bias_slots)


class RetrieverConfig(ModelConfig):
    """Settings of the retriever."""

    positive_actions: str = Field(
        default="click,long_view,like,rating", description="An item with any of these is a positive (retriever)"
    )
    temperature: float = Field(default=0.07, gt=0, le=10, description="Divides the cosine in the softmax (retriever)")
    item_side: bool = Field(
        default=True, description="Add author and category to an item's output embedding (retriever)"
    )
    full_softmax_limit: int = Field(
        default=20_000, ge=1, description="Largest catalogue with an exact softmax (retriever)"
    )
    negatives: int = Field(
        default=2_048, ge=1, description="Sampled items per batch beyond that limit, corrected by log q (retriever)"
    )


def split_names(text: str) -> list[str]:
    """'a, b' -> ['a', 'b']; empty names are left out."""
    return [name.strip() for name in text.split(",") if name.strip()]
