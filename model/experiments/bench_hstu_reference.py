"""The published research HSTU in plain PyTorch, as its authors' code computes it: the yardstick of bench_hstu.

Attention pads every sequence to the declared maximum of N items, makes the relative bias as a (B, N, N) tensor in every
layer and applies a dense causal mask; the projections and the loss run over the items that are there, as published. It
reads the parameters of a NextItem, so that both sides can be compared before they are timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import TIME_BUCKETS
from model.hstu import Hstu, HstuLayer
from model.sampled_softmax import per_position_cross_entropy, per_position_reference
from model.sequential import EPSILON, HstuEncoder, ItemHistories, NextItem
from model.softmax import catalogue_cross_entropy


@dataclass(frozen=True)
class PaddedBatch:
    """inside (B, N) bool: where an item is; times of the items and of those after them (B, N) int64 seconds.

    log_dtype: in which the logarithm of a gap is taken; the published float32 misses the edge of some buckets.
    """

    inside: Tensor
    time: Tensor
    next_time: Tensor
    log_dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, batch: ItemHistories, size: int, log_dtype: torch.dtype) -> PaddedBatch:
        """Left-aligned, padded to `size`."""
        inside = torch.arange(size) < batch.lengths[:, None]
        empty = torch.zeros(inside.shape, dtype=torch.int64)
        time, next_time = (empty.index_put((inside,), column) for column in (batch.time, batch.next_time))
        return cls(inside, time, next_time, log_dtype)

    def pad(self, jagged: Tensor) -> Tensor:
        """(T, d) -> (B, N, d)."""
        return jagged.new_zeros(*self.inside.shape, jagged.shape[1]).index_put((self.inside,), jagged)


def reference_loss(
    model: NextItem,
    batch: ItemHistories,
    wanted: Tensor,
    drawn: Tensor | None,
    log_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mean loss of the next items, wanted (T,): sampled with drawn (T, S) negatives per position, full with None."""
    vectors, items = reference_vectors(model, batch, log_dtype), F.normalize(model.items, dim=1, eps=EPSILON)
    if drawn is None:
        return F.cross_entropy(vectors @ items.T / model.config.temperature, wanted)
    return per_position_reference(vectors, items, wanted, drawn, model.config.temperature)


def our_loss(model: NextItem, batch: ItemHistories, wanted: Tensor, drawn: Tensor | None) -> Tensor:
    """The same by the kernels."""
    vectors, items = model(batch), model.item_vectors()
    if drawn is None:
        return catalogue_cross_entropy(vectors, items, wanted, model.config.temperature)
    return per_position_cross_entropy(vectors, items, wanted, drawn, model.config.temperature)


def gathered_loss(model: NextItem, batch: ItemHistories, wanted: Tensor, drawn: Tensor | None) -> Tensor:
    """Our model with the published sampled loss."""
    assert drawn is not None
    return per_position_reference(model(batch), model.item_vectors(), wanted, drawn, model.config.temperature)


def reference_vectors(model: NextItem, batch: ItemHistories, log_dtype: torch.dtype = torch.float32) -> Tensor:
    """(T, dim): what model(batch) is."""
    c, encoder = model.config, model.encoder
    assert isinstance(encoder, HstuEncoder) and isinstance(encoder.stack, Hstu)
    padded = PaddedBatch.of(batch, int(c.normaliser), log_dtype)
    x = F.embedding(batch.item, model.items) * c.dim**0.5 + F.embedding(batch.places(), model.positions)
    x = F.dropout(x, c.input_dropout, model.training)
    for layer in encoder.stack.layers:
        assert isinstance(layer, HstuLayer)
        x = _layer(layer, x, padded, model.training)
    return F.normalize(x, dim=1, eps=EPSILON)


def _layer(layer: HstuLayer, x: Tensor, padded: PaddedBatch, training: bool) -> Tensor:
    c = layer.config
    mixed = F.silu(F.layer_norm(x, [c.dim], eps=1e-6) @ layer.uvqk)
    u, v, q, k = mixed.split(layer.sizes, dim=1)
    a = F.layer_norm(_attention(layer, q, k, v, padded), [c.heads * c.dv], eps=1e-6)
    y: Tensor = x + layer.out(F.dropout(u * a, c.dropout, training))
    return y


def _attention(layer: HstuLayer, q: Tensor, k: Tensor, v: Tensor, padded: PaddedBatch) -> Tensor:
    """(T, heads * dqk) and (T, heads * dv) -> (T, heads * dv)."""
    heads, n = layer.config.heads, padded.inside.shape[1]
    q, k, v = (padded.pad(x).unflatten(2, (heads, -1)) for x in (q, k, v))
    score = torch.einsum("bnhd,bmhd->bhnm", q, k) + _bias(layer, padded)[:, None]
    weight = F.silu(score) / n * torch.tril(torch.ones(n, n))
    return torch.einsum("bhnm,bmhd->bnhd", weight, v).flatten(2)[padded.inside]


def _bias(layer: HstuLayer, padded: PaddedBatch) -> Tensor:
    """(B, N, N): w_pos[j - i + N - 1] + w_ts[bucket(ts[i + 1] - ts[j])], both made anew, as published."""
    assert layer.position_weights is not None and layer.time_weights is not None
    n = padded.inside.shape[1]
    weights = F.pad(layer.position_weights, [0, n - len(layer.position_weights)]).flip(0)  # index j - i + N - 1
    weights = F.pad(weights, [0, n - 1])  # the future, which the mask hides
    position = F.pad(weights, [0, n]).repeat(n)[:-n].reshape(n, 3 * n - 2)[:, n - 1 : 2 * n - 1]
    gap = padded.next_time[:, :, None] - padded.time[:, None]
    bucket = (torch.log(gap.abs().clamp(min=1).to(padded.log_dtype)) / 0.301).long().clamp(0, TIME_BUCKETS - 1)
    return position + torch.index_select(layer.time_weights, 0, bucket.view(-1)).view(bucket.shape)
