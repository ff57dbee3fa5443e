"""Losses. Each is a mean or a sum over the predictions given; none depends on how they were batched."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 19
"""Logits at hand at a time (2 MiB of float32: they stay near the core)."""


def catalogue_cross_entropy(vectors: Tensor, items: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of the wanted item among all: softmax over vectors @ items^T / temperature.

    vectors (N, d), items (V, d), wanted (N,) int64 rows of items -> scalar. The (N, V) logits never exist: they are
    made in chunks, and the gradients of a chunk are taken while it is there, so backward costs nothing more.
    """
    if not len(vectors):
        return vectors.sum() * 0.0
    loss: Tensor = _CatalogueCrossEntropy.apply(vectors, items, wanted, 1.0 / temperature)
    return loss


class _CatalogueCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, items: Tensor, wanted: Tensor, scale: float) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad)
        of_vectors = torch.empty_like(vectors)
        of_items = items.new_zeros(items.shape[::-1])  # (d, V): this way round the product is faster
        columns = items.T.contiguous()
        total = vectors.new_zeros((), dtype=torch.float64)
        size = max(16, CHUNK_ELEMENTS // len(items))
        for start in range(0, len(vectors), size):
            part, own = vectors[start : start + size], wanted[start : start + size, None]
            weights = _by_rows(part * scale, items)
            top = weights.amax(1, keepdim=True)
            score = weights.gather(1, own)
            weights.sub_(top).exp_()
            sums = weights.sum(1, keepdim=True)
            total += (sums.log() - (score - top)).sum(dtype=torch.float64)
            if wants_gradient:
                weights.mul_(scale / (len(vectors) * sums))
                weights.scatter_add_(1, own, torch.full_like(top, -scale / len(vectors)))
                of_vectors[start : start + size] = _by_rows(weights, columns)
                of_items += _by_rows(part.T.contiguous(), weights.T)
        if wants_gradient:
            ctx.save_for_backward(of_vectors, of_items)
        return (total / len(vectors)).to(vectors.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_vectors, of_items = ctx.saved_tensors
        return of_vectors * upstream, of_items.T * upstream, None, None


def _by_rows(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (N, K) transposed -> (M, N). oneDNN's product for float32 on the CPU: on AMD processors torch's
    usual one leaves half of the vector width unused."""
    if a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product
    return a @ b.T


def sampled_cross_entropy(
    vectors: Tensor, wanted: Tensor, drawn: Tensor, hits: Tensor, log_q: float, temperature: float
) -> Tensor:
    """Mean cross-entropy of the wanted item among itself and items drawn with probability q each (logQ correction).

    vectors, wanted (N, d): the users and their wanted items; drawn (S, d): shared by all; hits (N, S) bool: this drawn
    item is the wanted one. Log q is taken off the drawn logits, so that they estimate the sum over all other items;
    the wanted item is there with probability one and needs no correction.
    """
    positive = (vectors * wanted).sum(1, keepdim=True) / temperature
    negative = vectors @ drawn.T / temperature - log_q
    logits = torch.cat([positive, negative.masked_fill(hits, float("-inf"))], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device))


def sampled_binary_cross_entropy(logits: Tensor, labels: Tensor, kept: Tensor, rate: float) -> Tensor:
    """Summed binary cross-entropy where negatives are kept with probability `rate` and positives always.

    logits, labels, kept (N, K). Such a sample has log-odds that are log(1 / rate) too high. Training on
    z - log rate, for positives and negatives alike, leaves the true log-odds in z: serve sigmoid(z).
    """
    corrected = logits - math.log(rate)
    return (F.binary_cross_entropy_with_logits(corrected, labels, reduction="none") * kept).sum()


def log_seconds_error(predicted: Tensor, seconds: Tensor) -> Tensor:
    """Summed squared error against log(1 + seconds); values that are not finite and not >= 0 count nothing. (N,)"""
    known = torch.isfinite(seconds) & (seconds >= 0)
    error = predicted - torch.log1p(torch.where(known, seconds, torch.zeros_like(seconds)))
    return (error.square() * known).sum()
