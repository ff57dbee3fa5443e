"""The parts of an HSTU layer around attention, fused on the CPU (csrc/attention/layer.h), with their PyTorch reference.

    project:  [u | v | q | k] = SiLU(norm(x) W + b)          finish:  y = x + f2(dropout(gate(u, norm(a))))

The kernels take float32 on the CPU; everything else, autocast included, takes the composition of torch operators. They
keep nothing but their inputs for the backward pass, and a row's result depends on that row alone, to the bit.
Dropout draws one seed per call from torch's default generator and hashes it with row and column.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.errors import BadInput
from model._native import freshet_attention
from model.operators import Context, present, save_inputs, saved_inputs

GATES = ("product", "concat", "concat_raw")
"""u * n, [u, n, u * n] and [u, a, u * n], with n = norm(a)."""

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def norm_silu_project(
    x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None, sizes: list[int], silu_columns: int
) -> Parts:
    """x (T, D), weight (D, sum of sizes), bias (sum of sizes,) or None -> four tensors (T, sizes[i]).

    SiLU on the first silu_columns outputs. Raises BadInput when the shapes do not fit together.
    """
    columns = sum(sizes)
    if len(sizes) != 4 or x.dim() != 2 or weight.shape != (x.shape[1], columns) or silu_columns > columns:
        raise BadInput(
            f"a projection to parts {sizes} needs x (T, D) and weight (D, {columns}), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}; sequences are jagged, one after the other"
        )
    if norm.normalized_shape != (x.shape[1],) or (bias is not None and bias.shape != (columns,)):
        raise BadInput(f"a projection to parts {sizes} needs a norm over {x.shape[1]} numbers and bias ({columns},)")
    if not _fits(x, weight, bias, *norm.parameters()):
        return project_reference(x, norm, weight, bias, sizes, silu_columns)
    parts: Parts = hstu_project(x, weight, bias, norm.weight, norm.bias, sizes, silu_columns, norm.eps)
    return parts


def norm_gate_project(
    x: Tensor, u: Tensor, a: Tensor, norm: nn.LayerNorm, out: nn.Linear, *, gate: str, dropout: float, training: bool
) -> Tensor:
    """y = x + out(dropout(gate of u and norm(a))): x (R, D), u and a (R, W) -> (R, D). gate: one of GATES.

    Raises BadInput when the shapes do not fit together.
    """
    inputs = u.shape[-1] * (1 if gate == "product" else 3)
    fits = x.dim() == u.dim() == 2 and u.shape == a.shape and len(u) == len(x)
    if gate not in GATES or not fits or out.weight.shape != (x.shape[1], inputs):
        raise BadInput(f"gate {gate!r} (of {GATES}) needs u, a (R, W), x (R, D), out from {inputs} to D numbers")
    if norm.normalized_shape != (u.shape[1],):
        raise BadInput(f"gate {gate!r} needs a norm over {u.shape[1]} numbers, got {norm.normalized_shape}")
    dropout = dropout if training else 0.0
    if not _fits(x, u, a, *norm.parameters(), *out.parameters()):
        return finish_reference(x, u, a, norm, out, gate=gate, dropout=dropout)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    y: Tensor = hstu_finish(
        x, u, a, out.weight, out.bias, norm.weight, norm.bias, GATES.index(gate), norm.eps, dropout, seed
    )
    return y


def project_reference(
    x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None, sizes: list[int], silu_columns: int
) -> Parts:
    """norm_silu_project by torch operators."""
    mixed = norm(x) @ weight
    if bias is not None:
        mixed = mixed + bias.to(mixed.dtype)  # a float32 bias would make attention's input float32 under autocast
    mixed = torch.cat([F.silu(mixed[:, :silu_columns]), mixed[:, silu_columns:]], 1)
    u, v, q, k = mixed.split(sizes, dim=1)
    return u, v, q, k


def finish_reference(
    x: Tensor, u: Tensor, a: Tensor, norm: nn.LayerNorm, out: nn.Linear, *, gate: str, dropout: float,
    factors: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """norm_gate_project by torch operators; with `factors` (R, inputs of out) in the place of dropout."""
    normed = norm(a)
    gated = u * normed
    if gate != "product":
        gated = torch.cat([u, normed if gate == "concat" else a, gated], dim=1)
    gated = F.dropout(gated, dropout) if factors is None else gated * factors
    y: Tensor = x + out(gated)
    return y


def dropout_factors(dropout: float, seed: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) float32: what the kernel multiplies with: 0, or 1 / (1 - dropout)."""
    keys = torch.tensor([_row_key(seed, row) for row in range(rows)], dtype=torch.int64)
    bits = (torch.arange(columns) * 0x9E3779B9 + keys[:, None]) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    bits = (bits ^ (bits >> 16)) >> 8
    return (bits >= int(dropout * 2**24)).float() / (1 - dropout)


def _row_key(seed: int, row: int) -> int:
    mask = 2**64 - 1
    x = (seed + (row + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 32


def _fits(*tensors: Tensor | None) -> bool:
    """Whether the kernels take them; the torch operators know what to say of a mixture of types or devices."""
    here = all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors)
    return here and not torch.is_autocast_enabled("cpu")


def _addresses(tensors: dict[str, Tensor | None]) -> tuple[dict[str, int], list[Tensor]]:
    """Addresses of the tensors' numbers in order, 0 for None; and the tensors to keep alive meanwhile."""
    alive = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    return {name: alive[name].data_ptr() if name in alive else 0 for name in tensors}, list(alive.values())


def _like(*tensors: Tensor | None) -> list[Tensor]:
    """New contiguous tensors of these shapes; of shape (0,) for None."""
    return [torch.empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]


@torch.library.custom_op("freshet::hstu_project", mutates_args=())
def hstu_project(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    sizes: list[int], silu_columns: int, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator of norm_silu_project."""
    u, v, q, k = (x.new_empty(len(x), size) for size in sizes)
    inputs, alive = _project_inputs(x, weight, bias, norm_weight, norm_bias, sizes, silu_columns, epsilon)
    freshet_attention.project_forward(inputs, [part.data_ptr() for part in (u, v, q, k)], torch.get_num_threads())
    del alive
    return u, v, q, k


def _project_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    sizes: list[int], silu_columns: int, epsilon: float,
) -> tuple[dict, list[Tensor]]:  # fmt: skip
    tensors = {"x": x, "weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    addresses, alive = _addresses(tensors)
    numbers = {"rows": len(x), "dim": x.shape[1], "sizes": sizes, "silu_columns": silu_columns, "epsilon": epsilon}
    return addresses | numbers, alive


@torch.library.custom_op("freshet::hstu_project_backward", mutates_args=())
def hstu_project_backward(
    u: Tensor, v: Tensor, q: Tensor, k: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, sizes: list[int], silu_columns: int, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """From the gradients of u, v, q, k those of x, weight, bias, norm_weight, norm_bias ((0,) where there is none)."""
    out = _like(x, weight, bias, norm_weight, norm_bias)
    inputs, alive = _project_inputs(x, weight, bias, norm_weight, norm_bias, sizes, silu_columns, epsilon)
    parts, also_alive = _addresses({"u": u, "v": v, "q": q, "k": k})
    names = ("x", "weight", "bias", "norm_weight", "norm_bias")
    gradients = {name: tensor.data_ptr() for name, tensor in zip(names, out, strict=True)}
    freshet_attention.project_backward(inputs, list(parts.values()), gradients, torch.get_num_threads())
    del alive, also_alive
    return out[0], out[1], out[2], out[3], out[4]


@torch.library.custom_op("freshet::hstu_finish", mutates_args=())
def hstu_finish(
    x: Tensor, u: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, gate: int, epsilon: float, dropout: float, seed: int,
) -> Tensor:  # fmt: skip
    """The operator of norm_gate_project; gate: index into GATES."""
    y = x.new_empty(x.shape)
    inputs, alive = _finish_inputs(x, u, a, weight, bias, norm_weight, norm_bias, gate, epsilon, dropout, seed)
    freshet_attention.finish_forward(inputs, y.data_ptr(), torch.get_num_threads())
    del alive
    return y


def _finish_inputs(
    x: Tensor, u: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, gate: int, epsilon: float, dropout: float, seed: int,
) -> tuple[dict, list[Tensor]]:  # fmt: skip
    addresses, alive = _addresses({
        "x": x, "u": u, "a": a, "weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias,
    })  # fmt: skip
    sizes = {"rows": len(x), "dim": x.shape[1], "width": u.shape[1]}
    return addresses | sizes | {"gate": gate, "epsilon": epsilon, "dropout": dropout, "seed": seed}, alive


@torch.library.custom_op("freshet::hstu_finish_backward", mutates_args=())
def hstu_finish_backward(
    y: Tensor, x: Tensor, u: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, gate: int, epsilon: float, dropout: float, seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """From y's gradient those of u, a, weight, bias, norm_weight, norm_bias ((0,) where there is none); x's is y's."""
    out = _like(u, a, weight, bias, norm_weight, norm_bias)
    inputs, alive = _finish_inputs(x, u, a, weight, bias, norm_weight, norm_bias, gate, epsilon, dropout, seed)
    names = ("u", "a", "weight", "bias", "norm_weight", "norm_bias")
    gradients = {name: tensor.data_ptr() for name, tensor in zip(names, out, strict=True)}
    alive.append(y.contiguous())
    freshet_attention.finish_backward(inputs, gradients | {"y": alive[-1].data_ptr()}, torch.get_num_threads())
    del alive
    return out[0], out[1], out[2], out[3], out[4], out[5]


@hstu_project.register_fake
def _(x: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, ...]:
    sizes = rest[3]
    assert isinstance(sizes, list)
    return tuple(x.new_empty(x.shape[0], size) for size in sizes)


@hstu_project_backward.register_fake
def _(u: Tensor, v: Tensor, q: Tensor, k: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(_like(*inputs[:5]))


@hstu_finish.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@hstu_finish_backward.register_fake
def _(y: Tensor, x: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(_like(*inputs[:6]))


def _project_backward(ctx: Context, *parts: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = saved_inputs(ctx)
    x, sizes = inputs[0], inputs[5]
    given = [x.new_zeros(len(x), n) if part is None else part for part, n in zip(parts, sizes, strict=True)]
    return *present(hstu_project_backward(*given, *inputs), inputs[:5]), None, None, None


def _finish_backward(ctx: Context, y: Tensor) -> tuple[Tensor | None, ...]:
    inputs = saved_inputs(ctx)
    return y, *present(hstu_finish_backward(y, *inputs), inputs[1:7]), None, None, None, None


hstu_project.register_autograd(_project_backward, setup_context=save_inputs)
hstu_finish.register_autograd(_finish_backward, setup_context=save_inputs)
