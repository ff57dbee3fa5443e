"""The attention function on the CPU: a torch operator around the fused kernels of csrc/attention.

float32 or bfloat16 storage, float32 sums; nothing of size keys x keys is ever in memory. Results are the same to the
bit for any number of threads, and a row's result for any other sequences in the batch. Registered as
`freshet::hstu_attention` with gradients (first order) and fake tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model._native import freshet_attention
from model.attention_bias import TIME_BOUNDARIES, Bias
from model.attention_visibility import Visibility
from model.operators import Context, attention_gradients, bias_arguments, present, save_inputs, saved_inputs


def attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, seen: Visibility, *, alpha: float, normaliser: float, bias: Bias | None = None
) -> Tensor:
    """q (R, H, dqk), k (T, H, dqk), v (T, H, dv) -> (R, H, dv). See model.attention.attention, which checks."""
    out: Tensor = hstu_attention(
        q, k, v, seen.offsets, seen.first_row, seen.begin, seen.end, seen.prefix,
        alpha, normaliser, *bias_arguments(bias),
    )  # fmt: skip
    return out


@torch.library.custom_op("freshet::hstu_attention", mutates_args=())
def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    row_offsets: Tensor,
    begin: Tensor,
    end: Tensor,
    prefix: Tensor | None,
    alpha: float,
    normaliser: float,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    query_time: Tensor | None,
    key_time: Tensor | None,
    self_gap: Tensor | None,
) -> Tensor:
    """The operator: the tensors of Visibility and Bias one by one; weights float32, the rest as in attention()."""
    y = v.new_empty(len(q), *v.shape[1:])
    with _Arguments() as held:
        inputs = held.inputs(
            q, k, v, offsets, row_offsets, begin, end, prefix, alpha, normaliser,
            position_weights, time_weights, query_time, key_time, self_gap,
        )  # fmt: skip
        freshet_attention.forward(inputs, y.data_ptr(), torch.get_num_threads())
    return y


@torch.library.custom_op("freshet::hstu_attention_backward", mutates_args=())
def hstu_attention_backward(
    y_gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    row_offsets: Tensor,
    begin: Tensor,
    end: Tensor,
    prefix: Tensor | None,
    alpha: float,
    normaliser: float,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    query_time: Tensor | None,
    key_time: Tensor | None,
    self_gap: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, position_weights and time_weights; of shape (0,) for weights that are not there."""
    out = attention_gradients(q, k, v, position_weights, time_weights)
    with _Arguments() as held:
        inputs = held.inputs(
            q, k, v, offsets, row_offsets, begin, end, prefix, alpha, normaliser,
            position_weights, time_weights, query_time, key_time, self_gap,
        )  # fmt: skip
        names = ("q", "k", "v", "position_weights", "time_weights")
        gradients = {name: tensor.data_ptr() for name, tensor in zip(names, out, strict=True)}
        gradients["y"] = held.address(y_gradient)
        freshet_attention.backward(inputs, gradients, torch.get_num_threads())
    return out


class _Arguments:
    """Addresses of tensors for the extension; keeps contiguous copies alive until the call is over."""

    def __init__(self) -> None:
        self.alive: list[Tensor] = []

    def __enter__(self) -> _Arguments:
        return self

    def __exit__(self, *_: object) -> None:
        self.alive.clear()

    def address(self, tensor: Tensor | None) -> int:
        """Address of the tensor's numbers in order; 0 for None."""
        if tensor is None:
            return 0
        self.alive.append(tensor.contiguous())
        return self.alive[-1].data_ptr()

    def rows(self, tensor: Tensor) -> tuple[int, int]:
        """Address and row stride of a tensor (N, H, d); its rows may lie apart, as those of a slice do."""
        _, heads, width = tensor.shape
        if tensor.stride()[1:] != (width, 1) or tensor.stride(0) < heads * width:
            tensor = tensor.contiguous()
        self.alive.append(tensor)
        return tensor.data_ptr(), max(tensor.stride(0), heads * width)

    def inputs(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, row_offsets: Tensor, begin: Tensor, end: Tensor,
        prefix: Tensor | None, alpha: float, normaliser: float, position_weights: Tensor | None,
        time_weights: Tensor | None, query_time: Tensor | None, key_time: Tensor | None, self_gap: Tensor | None,
    ) -> dict[str, int | float | bool]:  # fmt: skip
        """The fields of Inputs in csrc/attention/attention.h."""
        found: dict[str, int | float | bool] = {
            "bfloat16": q.dtype == torch.bfloat16, "sequences": len(offsets) - 1, "rows": len(q), "keys": len(k),
            "heads": v.shape[1], "dqk": q.shape[2], "dv": v.shape[2], "alpha": alpha, "normaliser": normaliser,
            "positions": 0 if position_weights is None else len(position_weights),
        }  # fmt: skip
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            found[name], found[f"{name}_stride"] = self.rows(tensor)
        for name, maybe in (
            ("offsets", offsets), ("row_offsets", row_offsets), ("begin", begin), ("end", end), ("prefix", prefix),
            ("position_weights", position_weights), ("time_weights", time_weights), ("boundaries", TIME_BOUNDARIES),
            ("query_time", query_time), ("key_time", key_time), ("self_gap", self_gap),
        ):  # fmt: skip
            found[name] = self.address(maybe)
        return found


@hstu_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(q.shape[0], v.shape[1], v.shape[2])


@hstu_attention_backward.register_fake
def _(y_gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return attention_gradients(q, k, v, rest[7], rest[8])


def _backward(ctx: Context, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
    inputs = saved_inputs(ctx)
    q, k, v, *weights = hstu_attention_backward(y_gradient, *inputs)
    return q, k, v, *[None] * 7, *present(weights, inputs[10:12]), None, None, None


hstu_attention.register_autograd(_backward, setup_context=save_inputs)
