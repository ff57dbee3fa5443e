"""Tokens -> vectors: open vocabularies come from embedding tables, small closed ones from dense parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.errors import BadInput
from components.schemas import ACTIONS
from model.inputs import ACTION, CONTEXT, IMPRESSION, KINDS, REQUEST, VALUE_BUCKETS, Tokens
from model.policies import FEATURES, policies
from model.settings import ModelConfig
from model.table import EmbeddingTable, Events


def make_table(config: ModelConfig, slot: str, dim: int, *, init_scale: float | None = None) -> EmbeddingTable:
    """A table with the model's row optimiser, policies and seed."""
    return EmbeddingTable(
        slot,
        dim,
        optimizer=config.table_optimizer,
        learning_rate=config.table_lr,
        init_scale=config.init_scale if init_scale is None else init_scale,
        seed=config.seed,
        initial_accumulator=config.table_accumulator,
        **policies(config, slot),
    )


class TokenEmbedding(nn.Module):
    """Sum of the embeddings of a token's features; a feature that a kind of token lacks adds nothing."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        names = config.slot_names()
        if unknown := sorted(set(names) - set(FEATURES)):
            raise BadInput(f"unknown slots {', '.join(unknown)}; known are {', '.join(FEATURES)}")
        self.tables = nn.ModuleDict({name: make_table(config, name, config.dim) for name in names})
        self.context = nn.ModuleDict(
            {name: make_table(config, f"context_{name}", config.dim) for name in config.context_slots()}
        )
        self.kind = _small(KINDS + bool(self.context), config.dim)
        self.action = _small(len(ACTIONS), config.dim)
        self.value = _small(VALUE_BUCKETS, config.dim)
        self.hour = _small(24, config.dim) if config.hour_of_day else None

    def forward(self, tokens: Tokens) -> Tensor:
        """(T,) tokens -> (T, dim)."""
        kind = tokens.kind
        has_item = (kind == IMPRESSION) | (kind == ACTION)
        asks = (kind == IMPRESSION) | (kind == REQUEST)
        acted = (kind == ACTION).nonzero().squeeze(1)
        x = F.embedding(kind, self.kind)  # unlike self.kind[kind], whose gradient's order of sums threads race for
        where = {"page": (kind != ACTION) & (kind != CONTEXT), "user": asks}
        for name, table in self.tables.items():
            rows = where.get(name, has_item).nonzero().squeeze(1)
            x = x.index_add(0, rows, look_up(table, getattr(tokens, name)[rows], tokens.event_us[rows]))
        bits = (tokens.action[acted, None] >> torch.arange(len(ACTIONS))) & 1
        values = F.embedding(tokens.value[acted], self.value)
        x = x.index_add(0, acted, bits.to(x.dtype) @ self.action + values)
        if self.hour is not None:
            rows = asks.nonzero().squeeze(1)
            x = x.index_add(0, rows, F.embedding((tokens.query_time[rows] // 3600) % 24, self.hour))
        if self.context:
            places = (kind == CONTEXT).nonzero().view(-1, len(self.context))  # (B, slots): the first rows of each user
            for rows, (name, table) in zip(places.T, self.context.items(), strict=True):
                x = x.index_add(0, rows, look_up(table, getattr(tokens, name)[rows], tokens.event_us[rows]))
        return x


def look_up(table: nn.Module, ids: Tensor, event_us: Tensor) -> Tensor:
    """int64 [n] -> (n, dim); in training each id for its event at event_us [n] (below 0: it is none)."""
    vectors: Tensor = table(ids, events=Events.at(event_us)) if table.training else table(ids)
    return vectors


def _small(rows: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, dim).normal_(0, 0.02))
