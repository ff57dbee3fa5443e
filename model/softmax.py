"""Cross-entropy of the wanted item among a whole catalogue: no (N, V) matrix of logits, gradients taken on the way.

On the CPU and in float32 the kernels of csrc/attention/softmax.h do it; everything else takes the chunks of torch
operators below, which are their reference, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from components.errors import BadInput
from model._native import freshet_attention

CHUNK_ELEMENTS = 1 << 19
"""Logits at hand at a time (2 MiB of float32: they stay near the core)."""

Softmax = tuple[Tensor, Tensor, Tensor]
"""Mean loss (), its gradients by vectors (N, d) and items (V, d); these of shape (0,) where they are not asked for."""


def catalogue_cross_entropy(vectors: Tensor, items: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of the wanted item among all: softmax over vectors @ items^T / temperature.

    vectors (N, d), items (V, d), wanted (N,) int64 rows of items -> scalar; 0 where N is 0. The (N, V) logits never
    exist: they are made in parts, and the gradients of a part are taken while it is there, so backward costs nothing
    more. Raises BadInput when shapes or types do not fit together, and ValueError (RuntimeError off the CPU or
    float32) for a wanted row that items does not have.
    """
    shapes = (vectors.dim(), items.dim(), vectors.shape[1:], wanted.shape)
    if shapes != (2, 2, items.shape[1:], vectors.shape[:1]) or wanted.dtype != torch.int64:
        raise BadInput(
            f"the softmax needs vectors (N, d), items (V, d) and wanted (N,) int64, got {tuple(vectors.shape)}, "
            f"{tuple(items.shape)} and {tuple(wanted.shape)} {wanted.dtype}"
        )
    if not len(vectors):
        return vectors.sum() * 0.0
    fused = vectors.device.type == "cpu" and vectors.dtype == items.dtype == torch.float32
    softmax = partial(catalogue_softmax if fused else softmax_reference, wanted=wanted, scale=1.0 / temperature)
    loss: Tensor = CrossEntropy.apply(vectors, items, softmax)
    return loss


class CrossEntropy(torch.autograd.Function):
    """The loss of a softmax(vectors, items, gradients=) that gives its gradients along with it."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, items: Tensor, softmax: Callable[..., Softmax]) -> Tensor:
        loss, of_vectors, of_items = softmax(vectors, items, gradients=any(ctx.needs_input_grad))
        ctx.save_for_backward(of_vectors, of_items)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled():  # once_differentiable would let a graph through that lacks the vectors and items
            raise RuntimeError("a fused softmax has no second derivative; leave out create_graph=True")
        of_vectors, of_items = ctx.saved_tensors
        return of_vectors * upstream, of_items * upstream, None


@torch.library.custom_op("freshet::catalogue_softmax", mutates_args=())
def catalogue_softmax(vectors: Tensor, items: Tensor, wanted: Tensor, scale: float, gradients: bool) -> Softmax:
    """The operator: float32 on the CPU, N > 0; scores are scale * vectors @ items^T."""
    vectors, items, wanted = vectors.contiguous(), items.contiguous(), wanted.contiguous()
    of_vectors, of_items = empty_gradients(vectors, items, gradients)
    inputs = {
        "rows": len(vectors), "items": len(items), "dim": vectors.shape[1], "scale": scale,
        "vectors": vectors.data_ptr(), "item_vectors": items.data_ptr(), "wanted": wanted.data_ptr(),
    }  # fmt: skip
    addresses = {"vectors": of_vectors.data_ptr(), "item_vectors": of_items.data_ptr()}
    loss = freshet_attention.catalogue_softmax(inputs, addresses, torch.get_num_threads())
    return vectors.new_tensor(loss), of_vectors, of_items


@catalogue_softmax.register_fake
def _(vectors: Tensor, items: Tensor, wanted: Tensor, scale: float, gradients: bool) -> Softmax:
    return vectors.new_empty(()), *empty_gradients(vectors, items, gradients)


def empty_gradients(vectors: Tensor, items: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Of the shapes of vectors and items; (0,) unless wanted."""
    if not wanted:
        return vectors.new_empty(0), items.new_empty(0)
    return vectors.new_empty(vectors.shape), items.new_empty(items.shape)


def softmax_reference(vectors: Tensor, items: Tensor, wanted: Tensor, scale: float, gradients: bool) -> Softmax:
    """catalogue_softmax by torch operators, for any device and type, in chunks of positions."""
    of_vectors, of_items = empty_gradients(vectors, items, gradients)
    of_items.zero_()
    total = vectors.new_zeros((), dtype=torch.float64)
    size = max(16, CHUNK_ELEMENTS // len(items))
    for start in range(0, len(vectors), size):
        part, own = vectors[start : start + size], wanted[start : start + size, None]
        weights = part * scale @ items.T
        top = weights.amax(1, keepdim=True)
        score = weights.gather(1, own)
        weights.sub_(top).exp_()
        sums = weights.sum(1, keepdim=True)
        total += (sums.log() - (score - top)).sum(dtype=torch.float64)
        if gradients:
            weights.mul_(scale / (len(vectors) * sums))
            weights.scatter_add_(1, own, torch.full_like(top, -scale / len(vectors)))
            of_vectors[start : start + size] = weights @ items
            of_items += weights.T @ part
    return (total / len(vectors)).to(vectors.dtype), of_vectors, of_items
