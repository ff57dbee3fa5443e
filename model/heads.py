"""From the token's vector to the outputs: one bottom that all tasks share, or experts with a gate per task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.settings import RankerConfig


def make_head(config: RankerConfig, outputs: int) -> nn.Module:
    """(N, dim) -> (N, outputs), by the settings task_head, head_hidden and experts."""
    if config.task_head == "mmoe":
        return Mmoe(config.dim, config.head_hidden or config.dim, config.experts, outputs)
    return shared_bottom(config.dim, config.head_hidden, outputs)


def linear(dim: int, outputs: int) -> nn.Linear:
    """A linear head that starts at probability one half."""
    layer = nn.Linear(dim, outputs)
    nn.init.zeros_(layer.bias)
    return layer


def shared_bottom(dim: int, hidden: int, outputs: int) -> nn.Module:
    """One hidden layer for all tasks; hidden 0: the HSTU stack itself is the shared bottom."""
    if not hidden:
        return linear(dim, outputs)
    return nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), linear(hidden, outputs))


class Mmoe(nn.Module):
    """Multi-gate mixture of experts (Ma et al. 2018): each task mixes the same experts by a softmax gate of its own."""

    def __init__(self, dim: int, hidden: int, experts: int, outputs: int) -> None:
        super().__init__()
        self.experts, self.outputs = experts, outputs
        self.expert = nn.Linear(dim, experts * hidden)
        self.gate = nn.Linear(dim, outputs * experts)
        self.tower = nn.Parameter(torch.empty(outputs, hidden).normal_(0, hidden**-0.5))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim) -> (N, outputs)."""
        experts = F.silu(self.expert(x)).unflatten(1, (self.experts, -1))  # (N, E, hidden)
        gates = self.gates(x)  # (N, outputs, E)
        return ((gates @ experts) * self.tower).sum(2) + self.bias

    def gates(self, x: Tensor) -> Tensor:
        """(N, dim) -> (N, outputs, experts): each task's shares of the experts, summing to one."""
        return torch.softmax(self.gate(x).unflatten(1, (self.outputs, self.experts)), dim=2)
