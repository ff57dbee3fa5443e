"""The attention function on CUDA: a torch operator around the Triton kernels of model.triton.

float32 or bfloat16 storage, float32 sums; scores are computed again in the backward pass, nothing of size keys x keys
is ever in memory, and tiles of keys outside the intervals of a tile of rows are not computed. Results are the same to
the bit on each run, and a row's result for any other sequences in the batch. Registered as
`freshet::hstu_attention_triton` with gradients (first order) and fake tensors.

Needs the package `triton`. With TRITON_INTERPRET=1 in the environment before it is first imported, the kernels run on
the CPU in Triton's interpreter, for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from components.errors import BadInput
from model.attention_bias import Bias
from model.attention_visibility import Visibility
from model.operators import (
    WIDEST_TRITON_HEAD,
    Context,
    attention_gradients,
    bias_arguments,
    present,
    save_inputs,
    saved_inputs,
)
from model.triton.launch import (
    block_size,
    common,
    launch_backward_keys,
    launch_backward_rows,
    launch_forward,
    matrix,
    tiles,
)


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, seen: Visibility, *, alpha: float, normaliser: float, bias: Bias | None = None
) -> Tensor:
    """q (R, H, dqk), k (T, H, dqk), v (T, H, dv) -> (R, H, dv). See model.attention.attention, which checks.

    Raises BadInput for heads wider than 256.
    """
    if max(q.shape[2], v.shape[2]) > WIDEST_TRITON_HEAD:
        raise BadInput(
            f"the triton attention kernel takes heads of up to {WIDEST_TRITON_HEAD}, "
            f"got {q.shape[2]} and {v.shape[2]}; use more heads, or kernel='reference'"
        )
    row_tiles, key_tiles = _tiles(seen, len(k), block_size(q.dtype, q.shape[2], v.shape[2]))
    out: Tensor = hstu_attention_triton(
        q, k, v, seen.offsets, seen.first_row, seen.begin, seen.end, seen.prefix, row_tiles, key_tiles,
        alpha, normaliser, *bias_arguments(bias),
    )  # fmt: skip
    return out


def _tiles(seen: Visibility, keys: int, block: int) -> tuple[Tensor, Tensor]:
    """Tiles of the rows and of the keys, made once for all layers that share the visibility."""
    name = f"triton_tiles_{block}"
    if name not in seen.cache:
        rows = tiles(seen.first_row, len(seen.begin), block, later_is_heavier=True)
        seen.cache[name] = rows, tiles(seen.offsets, keys, block, later_is_heavier=False)
    found: tuple[Tensor, Tensor] = seen.cache[name]
    return found


@torch.library.custom_op("freshet::hstu_attention_triton", mutates_args=())
def hstu_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    row_offsets: Tensor,
    begin: Tensor,
    end: Tensor,
    prefix: Tensor | None,
    row_tiles: Tensor,
    key_tiles: Tensor,
    alpha: float,
    normaliser: float,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    query_time: Tensor | None,
    key_time: Tensor | None,
    self_gap: Tensor | None,
) -> Tensor:
    """The operator: the tensors of Visibility and Bias one by one, the tiles as launch.tiles makes them."""
    q, k, v = matrix(q), matrix(k), matrix(v)
    shared = common(
        q, k, v, offsets, row_offsets, begin, end, prefix, alpha, normaliser,
        position_weights, time_weights, query_time, key_time, self_gap,
    )  # fmt: skip
    return launch_forward(q, v, row_tiles, shared)


@torch.library.custom_op("freshet::hstu_attention_triton_backward", mutates_args=())
def hstu_attention_triton_backward(
    y_gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    row_offsets: Tensor,
    begin: Tensor,
    end: Tensor,
    prefix: Tensor | None,
    row_tiles: Tensor,
    key_tiles: Tensor,
    alpha: float,
    normaliser: float,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    query_time: Tensor | None,
    key_time: Tensor | None,
    self_gap: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, position_weights and time_weights; of shape (0,) for weights that are not there."""
    q, k, v, g = matrix(q), matrix(k), matrix(v), matrix(y_gradient)
    shared = common(
        q, k, v, offsets, row_offsets, begin, end, prefix, alpha, normaliser,
        position_weights, time_weights, query_time, key_time, self_gap,
    )  # fmt: skip
    q_gradient, position, time = launch_backward_rows(q, g, row_tiles, shared)
    k_gradient, v_gradient = launch_backward_keys(k, v, g, key_tiles, shared)
    return q_gradient, k_gradient, v_gradient, position, time


@hstu_attention_triton.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(q.shape[0], v.shape[1], v.shape[2])


@hstu_attention_triton_backward.register_fake
def _(y_gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return attention_gradients(q, k, v, rest[9], rest[10])


def _backward(ctx: Context, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
    inputs = saved_inputs(ctx)
    q, k, v, *weights = hstu_attention_triton_backward(y_gradient, *inputs)
    return q, k, v, *[None] * 9, *present(weights, inputs[12:14]), None, None, None


hstu_attention_triton.register_autograd(_backward, setup_context=save_inputs)
