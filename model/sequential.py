"""Next-item prediction on (item, timestamp) sequences: the published research HSTU (arXiv 2402.17152), and SASRec.

    x_0 = dropout(E[item] * sqrt(D) + P[position])      score = cosine(encoder(x_0)_t, E[item]) / temperature

Each position predicts the item that follows it, by a softmax over the whole catalogue or over sampled negatives. HSTU
knows the time of what it predicts (as the published code does): when a request is made is known when it is answered.
SASRec (arXiv 1808.09781) reads the order of the items alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from components.errors import BadInput
from model.attention import causal
from model.hstu import Hstu, HstuConfig
from model.sampled_softmax import per_position_cross_entropy
from model.softmax import catalogue_cross_entropy

EPSILON = 1e-6


class SequentialConfig(BaseModel):
    """One next-item model. The defaults are the published HSTU for MovieLens-1M."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: Literal["hstu", "sasrec"] = Field(default="hstu", description="Network between embeddings and scores")
    items: int = Field(ge=1, description="Catalogue size; items are 0 .. items - 1")
    max_length: int = Field(default=200, ge=1, description="Newest items of a history that are read")
    dim: int = Field(default=50, ge=1, description="Width of embeddings and layers")
    layers: int = Field(default=2, ge=1, description="Layers")
    heads: int = Field(default=1, ge=1, description="Attention heads per layer")
    head_dim: int = Field(default=50, ge=1, description="Query, key and value width per head (HSTU)")
    normaliser: float = Field(default=211.0, gt=0, description="Constant that divides the attention sum (HSTU)")
    bias: Literal["both", "position", "time", "none"] = Field(default="both", description="Relative bias (HSTU)")
    softmax: bool = Field(default=False, description="Softmax instead of pointwise attention (HSTU, ablation)")
    position_from: Literal["start", "end"] = Field(
        default="start", description="Embed the distance from the oldest or from the newest item read"
    )
    input_dropout: float = Field(default=0.2, ge=0, lt=1, description="Dropout of the input")
    dropout: float = Field(default=0.2, ge=0, lt=1, description="Dropout inside the layers")
    temperature: float = Field(default=0.05, gt=0, description="Divides the cosine in the softmax")
    negatives: int = Field(default=0, ge=0, description="Sampled negatives per position; 0 = the whole catalogue")
    seed: int = Field(default=0, ge=0, description="Seed of the initial weights")

    def hstu(self) -> HstuConfig:
        """The HSTU stack of this model."""
        return HstuConfig(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            dqk=self.head_dim,
            dv=self.head_dim,
            normaliser=self.normaliser,
            positions=self.max_length + 1 if self.bias in ("both", "position") else 0,
            time_bias=self.bias in ("both", "time"),
            softmax=self.softmax,
            dropout=self.dropout,
        )


@dataclass(frozen=True)
class ItemHistories:
    """A jagged batch: item (T,), its time and that of the item after it (T,) int64 seconds, lengths (B,) int64."""

    item: Tensor
    time: Tensor
    next_time: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, items: Sequence[NDArray], times: Sequence[NDArray], next_times: Sequence[NDArray]) -> ItemHistories:
        """From one array per user each; a user's three arrays are of one length, at least 1."""
        counts = np.array([len(row) for row in items], dtype=np.int64)
        for rows in (times, next_times):
            if [len(row) for row in rows] != counts.tolist() or (counts < 1).any():
                raise BadInput("each user needs at least one item, with a time and a next time for each")

        def joined(rows: Sequence[NDArray]) -> Tensor:
            return torch.from_numpy(np.concatenate([*rows, np.zeros(0)]).astype(np.int64))

        return cls(joined(items), joined(times), joined(next_times), torch.from_numpy(counts))

    def last(self) -> Tensor:
        """(B,) row of each user's newest item."""
        return self.lengths.cumsum(0) - 1

    def places(self) -> Tensor:
        """(T,) place in the own history, the oldest item being 0."""
        return torch.arange(len(self.item)) - (self.last() + 1 - self.lengths).repeat_interleave(self.lengths)


class NextItem(nn.Module):
    """Embeddings, encoder, loss and scores. The initial weights are a function of the config alone."""

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.items = nn.Parameter(nn.init.trunc_normal_(torch.empty(config.items, config.dim), std=0.02))
            self.positions = nn.Parameter(
                nn.init.trunc_normal_(torch.empty(config.max_length, config.dim), std=config.dim**-0.5)
            )
            self.encoder = HstuEncoder(config) if config.encoder == "hstu" else SasRecEncoder(config)
        self.input_dropout = nn.Dropout(config.input_dropout)

    def forward(self, batch: ItemHistories) -> Tensor:
        """(T, dim) vectors of length one: where each position looks for the next item. Raises BadInput if too long."""
        c = self.config
        place = batch.places()
        if int(batch.lengths.max()) > c.max_length:
            raise BadInput(f"a history is longer than max_length ({c.max_length}); keep the newest items")
        if c.position_from == "end":
            place = (batch.lengths - 1).repeat_interleave(batch.lengths) - place
        x = F.embedding(batch.item, self.items) * c.dim**0.5 + F.embedding(place, self.positions)
        return F.normalize(self.encoder(self.input_dropout(x), batch), dim=1, eps=EPSILON)

    def item_vectors(self) -> Tensor:
        """(items, dim), of length one."""
        return F.normalize(self.items, dim=1, eps=EPSILON)

    def loss(self, batch: ItemHistories, wanted: Tensor) -> Tensor:
        """Mean cross-entropy of the items that follow, wanted (T,)."""
        c = self.config
        vectors = self(batch)
        if not c.negatives:
            return catalogue_cross_entropy(vectors, self.item_vectors(), wanted, c.temperature)
        drawn = torch.randint(c.items, (len(wanted), c.negatives))
        return per_position_cross_entropy(vectors, self.item_vectors(), wanted, drawn, c.temperature)

    @torch.no_grad()
    def scores(self, batch: ItemHistories) -> Tensor:
        """(B, items) cosines after each user's newest item."""
        scores: Tensor = self(batch)[batch.last()] @ self.item_vectors().T
        return scores


class HstuEncoder(nn.Module):
    """Attention over all earlier items, itself included; the time of a row is that of what it predicts."""

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        self.stack = Hstu(config.hstu())

    def forward(self, x: Tensor, batch: ItemHistories) -> Tensor:
        """(T, dim) -> (T, dim)."""
        gap = batch.next_time - batch.time
        y: Tensor = self.stack(x, causal(batch.lengths), batch.next_time, batch.time, gap)
        return y


class SasRecEncoder(nn.Module):
    """Transformer layers as SASRec has them: the residual of the attention is its normalised input."""

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SasRecLayer(config.dim, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, eps=1e-8)

    def forward(self, x: Tensor, batch: ItemHistories) -> Tensor:
        """(T, dim) -> (T, dim). Padding stands after a history, where no row before it looks."""
        inside = torch.arange(int(batch.lengths.max())) < batch.lengths[:, None]
        rows = inside.flatten().nonzero().squeeze(1)
        padded = x.new_zeros(inside.numel(), x.shape[1]).index_copy(0, rows, x).unflatten(0, inside.shape)
        for layer in self.layers:
            padded = layer(padded)
        y: Tensor = self.norm(padded.flatten(0, 1)[rows])
        return y


class SasRecLayer(nn.Module):
    """Causal softmax attention and a position-wise network of two layers, (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        if dim % heads:
            raise BadInput(f"{heads} heads do not divide the width {dim}")
        self.heads, self.rate = heads, dropout
        self.norm_attention, self.norm_network = nn.LayerNorm(dim, eps=1e-8), nn.LayerNorm(dim, eps=1e-8)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.network = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        asked = self.norm_attention(x)
        q, k, v = (self._split(part) for part in (self.query(asked), *self.key_value(x).chunk(2, dim=-1)))
        rate = self.rate if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        x = self.norm_network(asked + self.out(seen.transpose(1, 2).flatten(2)))
        y: Tensor = x + self.network(x)
        return y

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, heads, N, dim / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
