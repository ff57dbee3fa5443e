"""HSTU: pointwise self-attention blocks over jagged sequences (arXiv 2402.17152, equations 1 to 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from model.attention import TIME_BUCKETS, Bias, Visibility, attention


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
    dropout: float = Field(default=0.2, ge=0, lt=1, description="Dropout before the output projection")
    concat_ua: bool = Field(default=False, description="Project [u, a, u*a] instead of u*a")
    silu_all: bool = Field(default=True, description="SiLU on u, v, q and k; otherwise on u alone")
    scale_scores: bool = Field(default=False, description="Scale scores by 1/sqrt(dqk)")
    affine_norm: bool = Field(default=False, description="Learned scale and shift in the layer norms")
    uvqk_bias: bool = Field(default=False, description="Bias in the first projection")


class HstuLayer(nn.Module):
    """One block: u,v,q,k = SiLU(f1(norm(x))); a = norm(attention); y = x + f2(dropout(u * a))."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.config = config
        h, dqk, dv = config.heads, config.dqk, config.dv
        self.sizes = [h * dv, h * dv, h * dqk, h * dqk]  # the order of the published code: u, v, q, k
        self.uvqk = nn.Parameter(torch.empty(config.dim, sum(self.sizes)).normal_(0, 0.02))
        self.uvqk_bias = nn.Parameter(torch.zeros(sum(self.sizes))) if config.uvqk_bias else None
        self.norm_in = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=config.affine_norm)
        self.norm_attention = nn.LayerNorm(h * dv, eps=1e-6, elementwise_affine=config.affine_norm)
        self.out = nn.Linear(h * dv * (3 if config.concat_ua else 1), config.dim)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        count = config.positions
        self.position_weights = nn.Parameter(torch.empty(count).normal_(0, 0.02)) if count else None
        self.time_weights = nn.Parameter(torch.empty(TIME_BUCKETS).normal_(0, 0.02)) if config.time_bias else None

    def forward(self, x: Tensor, seen: Visibility, times: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        """x (T, dim) -> (T, dim). times: query_time, key_time (T,) int64 seconds, and the gap to itself (or None)."""
        c = self.config
        mixed = self.norm_in(x) @ self.uvqk
        if self.uvqk_bias is not None:
            mixed = mixed + self.uvqk_bias
        if c.silu_all:
            mixed = F.silu(mixed)
        u, v, q, k = mixed.split(self.sizes, dim=1)
        if not c.silu_all:
            u = F.silu(u)
        bias = None
        if self.position_weights is not None or self.time_weights is not None:
            bias = Bias(self.position_weights, self.time_weights, times[0], times[1], times[2])
        a = attention(
            q.unflatten(1, (c.heads, c.dqk)),
            k.unflatten(1, (c.heads, c.dqk)),
            v.unflatten(1, (c.heads, c.dv)),
            seen,
            alpha=c.dqk**-0.5 if c.scale_scores else 1.0,
            normaliser=c.normaliser,
            bias=bias,
        ).flatten(1)
        normed = self.norm_attention(a)
        gated = u * normed
        if c.concat_ua:
            gated = torch.cat([u, normed, gated], dim=1)
        y: Tensor = x + self.out(F.dropout(gated, c.dropout, self.training))
        return y


class Hstu(nn.Module):
    """A stack of HstuLayer. Each row reads nothing outside its visibility interval, layer by layer."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(HstuLayer(config) for _ in range(config.layers))

    def forward(
        self, x: Tensor, seen: Visibility, query_time: Tensor, key_time: Tensor, self_gap: Tensor | None = None
    ) -> Tensor:
        """x (T, dim), times (T,) int64 seconds -> (T, dim)."""
        for layer in self.layers:
            x = layer(x, seen, (query_time, key_time, self_gap))
        return x
