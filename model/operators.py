"""What our torch operators share: inputs kept for the backward pass, arguments and gradients of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.attention_bias import TIME_BUCKETS, Bias

WIDEST_TRITON_HEAD = 256
Context = torch.autograd.function.FunctionCtx
BiasArguments = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def save_inputs(ctx: Context, inputs: tuple, output: object) -> None:
    """setup_context of an operator whose backward pass wants all inputs; tensors are saved as torch demands."""
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.layout = [None if isinstance(value, Tensor) else (value,) for value in inputs]  # type: ignore[attr-defined]


def saved_inputs(ctx: Context) -> list[Any]:
    """The inputs of the forward pass, in order."""
    tensors = iter(ctx.saved_tensors)  # type: ignore[attr-defined]
    return [next(tensors) if known is None else known[0] for known in ctx.layout]  # type: ignore[attr-defined]


def present(gradients: Sequence[Tensor], inputs: Sequence[object]) -> list[Tensor | None]:
    """The gradients, None for an input that is None: operators return an empty tensor in its place."""
    return [None if given is None else gradient for gradient, given in zip(gradients, inputs, strict=True)]


def bias_arguments(bias: Bias | None) -> BiasArguments:
    """position_weights, time_weights (both float32), query_time, key_time, self_gap; None for what plays no part."""
    if bias is None:
        return None, None, None, None, None
    position = None if bias.position_weights is None else bias.position_weights.float()
    if bias.time_weights is None:
        return position, None, None, None, None
    return position, bias.time_weights.float(), bias.query_time, bias.key_time, bias.self_gap


def attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, position_weights: object, time_weights: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty gradients of the five, those of weights float32 and of shape (0,) where there are none."""
    positions = len(position_weights) if isinstance(position_weights, Tensor) else 0
    buckets = TIME_BUCKETS if isinstance(time_weights, Tensor) else 0
    of_weights = (q.new_empty(size, dtype=torch.float32) for size in (positions, buckets))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *of_weights  # type: ignore[return-value]
