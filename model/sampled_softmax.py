"""Cross-entropy of the wanted item among itself and items drawn for each position: the published sampled softmax.

On the CPU and in float32 the kernels of csrc/attention/sampled_softmax.h do it, without the (N, S, d) vectors of what
was drawn; everything else takes torch's operators, which are their reference, too.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from components.errors import BadInput
from model._native import freshet_attention
from model.softmax import CrossEntropy, Softmax, empty_gradients


def per_position_cross_entropy(
    vectors: Tensor, items: Tensor, wanted: Tensor, drawn: Tensor, temperature: float
) -> Tensor:
    """Each position has negatives of its own, without a correction for sampling; one that is the wanted item is out.

    vectors (N, d), items (V, d), wanted (N,) and drawn (N, S) int64 rows of items -> scalar, the mean; 0 where N is 0.
    Raises BadInput when shapes or types do not fit together, and ValueError (IndexError off the CPU or float32) for a
    row that items does not have.
    """
    shapes = (vectors.dim(), items.dim(), vectors.shape[1:], wanted.shape, drawn.dim(), drawn.shape[:1])
    expected = (2, 2, items.shape[1:], vectors.shape[:1], 2, vectors.shape[:1])
    if shapes != expected or {wanted.dtype, drawn.dtype} != {torch.int64}:
        raise BadInput(
            f"the sampled softmax needs vectors (N, d), items (V, d), wanted (N,) and drawn (N, S) int64, got "
            f"{tuple(vectors.shape)}, {tuple(items.shape)}, {tuple(wanted.shape)} {wanted.dtype} and "
            f"{tuple(drawn.shape)} {drawn.dtype}"
        )
    if not len(vectors):
        return vectors.sum() * 0.0
    if vectors.device.type != "cpu" or not vectors.dtype == items.dtype == torch.float32:
        return per_position_reference(vectors, items, wanted, drawn, temperature)
    softmax = partial(sampled_softmax, wanted=wanted, drawn=drawn, scale=1.0 / temperature)
    loss: Tensor = CrossEntropy.apply(vectors, items, softmax)
    return loss


def per_position_reference(vectors: Tensor, items: Tensor, wanted: Tensor, drawn: Tensor, temperature: float) -> Tensor:
    """per_position_cross_entropy by torch's operators, as it was published: a gather of (N, S, d) vectors."""
    positive = (vectors * F.embedding(wanted, items)).sum(1, keepdim=True)
    negative = torch.einsum("nd,nsd->ns", vectors, F.embedding(drawn, items))
    negative = negative.masked_fill(drawn == wanted[:, None], float("-inf"))
    logits = torch.cat([positive, negative], dim=1) / temperature
    return F.cross_entropy(logits, wanted.new_zeros(len(wanted)))


@torch.library.custom_op("freshet::sampled_softmax", mutates_args=())
def sampled_softmax(
    vectors: Tensor, items: Tensor, wanted: Tensor, drawn: Tensor, scale: float, gradients: bool
) -> Softmax:
    """The operator: float32 on the CPU, N > 0; scores are scale * vectors @ items^T."""
    vectors, items, wanted, drawn = (x.contiguous() for x in (vectors, items, wanted, drawn))
    of_vectors, of_items = empty_gradients(vectors, items, gradients)
    inputs = {
        "rows": len(vectors), "items": len(items), "dim": vectors.shape[1], "samples": drawn.shape[1], "scale": scale,
        "vectors": vectors.data_ptr(), "item_vectors": items.data_ptr(), "wanted": wanted.data_ptr(),
        "drawn": drawn.data_ptr(),
    }  # fmt: skip
    addresses = {"vectors": of_vectors.data_ptr(), "item_vectors": of_items.data_ptr()}
    loss = freshet_attention.sampled_softmax(inputs, addresses, torch.get_num_threads())
    return vectors.new_tensor(loss), of_vectors, of_items


@sampled_softmax.register_fake
def _(vectors: Tensor, items: Tensor, wanted: Tensor, drawn: Tensor, scale: float, gradients: bool) -> Softmax:
    return vectors.new_empty(()), *empty_gradients(vectors, items, gradients)
