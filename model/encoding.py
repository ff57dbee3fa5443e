"""Where and when a token stands relative to its request: the input of the published production network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.errors import BadInput
from model.inputs import Tokens
from model.settings import ModelConfig

MAX_POSITIONS, AGES = 8192, 2049


class RequestEncoding(nn.Module):
    """x * sqrt(dim) + position[distance from the end of the history] + age[floor(sqrt(age / 60 s))].

    Candidates have distance 0; context tokens have positions of their own, before the others. All of it is relative to
    the sequence's request, so a sequence may hold one request only.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.context = len(config.context_slots())
        rows = min(MAX_POSITIONS, config.reach() + self.context + 1)
        self.position = _uniform(rows, config.dim) if config.encodes_position() else None
        self.age = _uniform(AGES, config.dim) if config.encodes_time() else None

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """x (T, dim) -> (T, dim). Raises BadInput when a sequence has not exactly one request time."""
        lengths = tokens.seen.offsets.diff()
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        asked = torch.bincount(owner[tokens.targets], minlength=len(lengths))
        last = tokens.seen.offsets[1:][owner] - 1
        request = tokens.query_time[last]
        if bool((tokens.query_time[tokens.targets] != request[tokens.targets]).any()) or bool((asked == 0).any()):
            raise BadInput(
                "position and time at the input need sequences of one request; use RequestDataset or Queries"
            )
        x = x * x.shape[1] ** 0.5
        if self.position is not None:
            index = torch.arange(len(owner)) - tokens.seen.offsets[owner]
            place = (lengths - asked)[owner] - index
            place = torch.where(index < self.context, index, place.clamp(min=0) + self.context)
            x = x + F.embedding(place.clamp(max=len(self.position) - 1), self.position)
        if self.age is not None:
            x = x + F.embedding(age_bucket(request - tokens.query_time), self.age)
        return x


def age_bucket(seconds: Tensor) -> Tensor:
    """Bucket 0..2048 of an age in int64 seconds: floor(sqrt(age / 60)), exact for whole seconds."""
    minutes = torch.div(seconds.clamp(min=0), 60, rounding_mode="floor").clamp(max=(AGES - 1) ** 2)
    return minutes.double().sqrt().long()


def _uniform(rows: int, dim: int) -> nn.Parameter:
    limit = rows**-0.5
    return nn.Parameter(torch.empty(rows, dim).uniform_(-limit, limit))
