"""HSTU: pointwise self-attention blocks over jagged sequences (arXiv 2402.17152, equations 1 to 3).

    u, v, q, k = SiLU(f1(norm(x)))       a = attention(q, k, v)       y = x + f2(dropout(u * norm(a)))

The switches of HstuConfig give the published production network instead of the paper's; `ModelConfig.hstu` knows which.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from model.attention import TIME_BUCKETS, Bias, Visibility, attention
from model.fused import norm_gate_project, norm_silu_project

Times = tuple[Tensor, Tensor, Tensor | None]
"""query_time of the rows, key_time of the keys (int64 seconds), and each row's gap to itself (None = 0)."""


class HstuConfig(BaseModel):
    """One HSTU stack. The defaults are the paper's research variant; the switches give the production flavour."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int = Field(default=64, ge=1, description="Width of a token")
    layers: int = Field(default=2, ge=1, description="Number of HSTU layers")
    heads: int = Field(default=2, ge=1, description="Attention heads per layer")
    dqk: int = Field(default=16, ge=1, description="Query and key width per head")
    dv: int = Field(default=16, ge=1, description="Value width per head")
    normaliser: float = Field(default=64.0, gt=0, description="Constant that divides the attention sum")
    positions: int = Field(default=128, ge=0, description="Relative position buckets; 0 = no position bias")
    time_bias: bool = Field(default=True, description="Relative time bias (logarithmic buckets of seconds)")
    softmax: bool = Field(default=False, description="Softmax over the seen keys instead of SiLU and the normaliser")
    dropout: float = Field(default=0.2, ge=0, lt=1, description="Dropout before the output projection")
    gate: Literal["product", "concat", "concat_raw"] = Field(
        default="product", description="Project u*norm(a), [u, norm(a), u*norm(a)] or [u, a, u*norm(a)]"
    )
    silu_all: bool = Field(default=True, description="SiLU on u, v, q and k; otherwise on u alone")
    scale_scores: bool = Field(default=False, description="Scale scores by 1/sqrt(dqk)")
    affine_norm: bool = Field(default=False, description="Learned scale and shift in the layer norms")
    uvqk_bias: bool = Field(default=False, description="Bias in the first projection")
    out_bias: bool = Field(default=True, description="Bias in the output projection")


class Projected(NamedTuple):
    """The four parts of f1(norm(x)): u (T, H * dv), v (T, H, dv), q and k (T, H, dqk)."""

    u: Tensor
    v: Tensor
    q: Tensor
    k: Tensor


class HstuLayer(nn.Module):
    """One block. `forward` is `finish(x, u, attend(q, k, v))` of `project(x)`; M-FALCON puts a cache in between."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.config = config
        h, dqk, dv = config.heads, config.dqk, config.dv
        self.sizes = [h * dv, h * dv, h * dqk, h * dqk]  # the order of the published code: u, v, q, k
        self.uvqk = nn.Parameter(torch.empty(config.dim, sum(self.sizes)).normal_(0, 0.02))
        self.uvqk_bias = nn.Parameter(torch.zeros(sum(self.sizes))) if config.uvqk_bias else None
        self.norm_in = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=config.affine_norm)
        self.norm_attention = nn.LayerNorm(h * dv, eps=1e-6, elementwise_affine=config.affine_norm)
        self.out = nn.Linear(h * dv * (1 if config.gate == "product" else 3), config.dim, bias=config.out_bias)
        nn.init.xavier_uniform_(self.out.weight)
        if config.out_bias:
            nn.init.zeros_(self.out.bias)
        count = config.positions
        self.position_weights = nn.Parameter(torch.empty(count).normal_(0, 0.02)) if count else None
        self.time_weights = nn.Parameter(torch.empty(TIME_BUCKETS).normal_(0, 0.02)) if config.time_bias else None

    def forward(self, x: Tensor, seen: Visibility, times: Times) -> Tensor:
        """x (T, dim) -> (T, dim)."""
        u, v, q, k = self.project(x)
        return self.finish(x, u, self.attend(q, k, v, seen, times))

    def project(self, x: Tensor) -> Projected:
        """u, v, q, k of tokens x (T, dim): each row depends on its own token alone."""
        c = self.config
        silu = sum(self.sizes) if c.silu_all else self.sizes[0]
        u, v, q, k = norm_silu_project(x, self.norm_in, self.uvqk, self.uvqk_bias, self.sizes, silu)
        return Projected(
            u, v.unflatten(1, (c.heads, c.dv)), q.unflatten(1, (c.heads, c.dqk)), k.unflatten(1, (c.heads, c.dqk))
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Visibility, times: Times) -> Tensor:
        """q (R, H, dqk) over keys k (T, H, dqk) and values v (T, H, dv) -> (R, H * dv)."""
        c = self.config
        bias = None
        if self.position_weights is not None or self.time_weights is not None:
            bias = Bias(self.position_weights, self.time_weights, times[0], times[1], times[2])
        alpha = c.dqk**-0.5 if c.scale_scores else 1.0
        with torch.autocast(q.device.type, enabled=False):  # the kernels accumulate in float32 by themselves
            a = attention(q, k, v, seen, alpha=alpha, normaliser=c.normaliser, bias=bias, softmax=c.softmax)
        return a.flatten(1)

    def finish(self, x: Tensor, u: Tensor, a: Tensor) -> Tensor:
        """y = x + f2(dropout(gate of u and a)): x (R, dim), u and a (R, H * dv) -> (R, dim)."""
        c = self.config
        norm, out = self.norm_attention, self.out
        return norm_gate_project(x, u, a, norm, out, gate=c.gate, dropout=c.dropout, training=self.training)

    def last_rows(self, x: Tensor, seen: Visibility, times: Times, counts: Tensor) -> Tensor:
        """What `forward` gives for the last counts (B,) rows of each sequence; the others are keys and values only."""
        part, keep = seen.last_rows(counts)
        u, v, q, k = self.project(x)
        gap = None if times[2] is None else times[2][keep]
        return self.finish(x[keep], u[keep], self.attend(q[keep], k, v, part, (times[0][keep], times[1], gap)))


class Hstu(nn.Module):
    """A stack of HstuLayer. Each row reads nothing outside its visibility, layer by layer."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(HstuLayer(config) for _ in range(config.layers))

    def forward(
        self,
        x: Tensor,
        seen: Visibility,
        query_time: Tensor,
        key_time: Tensor,
        self_gap: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """x (T, dim), times (T,) int64 seconds -> (T, dim).

        last (B,) int64: only the last rows of each sequence are wanted; the result has these alone.
        """
        times = (query_time, key_time, self_gap)
        *lower, top = [layer for layer in self.layers if isinstance(layer, HstuLayer)]
        for layer in lower:
            x = layer(x, seen, times)
        return top(x, seen, times) if last is None else top.last_rows(x, seen, times, last)
