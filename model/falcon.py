"""M-FALCON (arXiv 2402.17152, algorithm 1): many candidates over one history that is encoded once.

Keys and values of the history are kept layer by layer. Candidates see the history and themselves, never each other, so
they are scored in microbatches over the same keys and values, and the result is that of one forward over everything.
The history is itself extended the same way: new events see the kept ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from components.errors import BadInput
from model.attention import Visibility
from model.hstu import Hstu, HstuLayer

MICROBATCH = 512
"""Candidates at a time."""


@dataclass(frozen=True)
class Rows:
    """Consecutive tokens of one sequence: input x (R, dim); begin, end, prefix and query_time (R,) int64."""

    x: Tensor
    begin: Tensor
    end: Tensor
    query_time: Tensor
    prefix: Tensor | None = None

    def part(self, start: int, stop: int) -> Rows:
        """Some of them."""
        prefix = None if self.prefix is None else self.prefix[start:stop]
        x, begin, end, time = (part[start:stop] for part in (self.x, self.begin, self.end, self.query_time))
        return Rows(x, begin, end, time, prefix)


@dataclass(frozen=True)
class KeyValues:
    """What a history of T tokens is to those that see it: per layer keys (T, H, dqk) and values (T, H, dv), and times.

    key_time (T,) int64 seconds.
    """

    layers: list[tuple[Tensor, Tensor]]
    key_time: Tensor

    def __len__(self) -> int:
        return len(self.key_time)

    @classmethod
    def empty(cls, stack: Hstu, like: Tensor) -> KeyValues:
        """Of no history, in the dtype and on the device of `like`."""
        c = stack.config
        none = [(like.new_zeros(0, c.heads, c.dqk), like.new_zeros(0, c.heads, c.dv)) for _ in range(c.layers)]
        return cls(none, torch.zeros(0, dtype=torch.int64, device=like.device))

    def part(self, start: int, stop: int) -> KeyValues:
        """Some consecutive tokens. Their keys and values are as they were, with all that they have seen."""
        return KeyValues([(k[start:stop], v[start:stop]) for k, v in self.layers], self.key_time[start:stop])

    def join(self, later: KeyValues) -> KeyValues:
        """These tokens and then those."""
        pairs = zip(self.layers, later.layers, strict=True)
        layers = [(torch.cat([k, more_k]), torch.cat([v, more_v])) for (k, v), (more_k, more_v) in pairs]
        return KeyValues(layers, torch.cat([self.key_time, later.key_time]))


def extend(stack: Hstu, kept: KeyValues, new: Rows, key_time: Tensor) -> KeyValues:
    """The history with `new` tokens after the kept ones; positions count from the first kept token.

    key_time (R,) int64 seconds of the new tokens. The last layer's rows are left out: nobody reads them.
    """
    if not len(new.x):
        return kept
    times = torch.cat([kept.key_time, key_time])
    seen = _seen(len(times), new)
    x, layers = new.x, []
    for index, (layer, (keys, values)) in enumerate(zip(_layers(stack), kept.layers, strict=True)):
        u, v, q, k = layer.project(x)
        keys, values = torch.cat([keys, k]), torch.cat([values, v])
        layers.append((keys, values))
        if index + 1 < len(kept.layers):
            x = layer.finish(x, u, layer.attend(q, keys, values, seen, (new.query_time, times, None)))
    return KeyValues(layers, times)


def score_rows(stack: Hstu, kept: KeyValues, candidates: Rows, microbatch: int | None = None) -> Tensor:
    """(C, dim): what the stack gives for candidates that see the history (begin, end, prefix) and themselves.

    microbatch: candidates at a time; None = MICROBATCH. The result does not depend on it. BadInput below 1.
    """
    size = MICROBATCH if microbatch is None else microbatch
    if size < 1:
        raise BadInput(f"microbatch must be at least 1, or None, got {size}")
    parts = [
        _score_microbatch(stack, kept, candidates.part(first, first + size))
        for first in range(0, len(candidates.x), size)
    ]
    return torch.cat(parts) if parts else candidates.x


def _score_microbatch(stack: Hstu, kept: KeyValues, rows: Rows) -> Tensor:
    times = torch.cat([kept.key_time, rows.query_time])
    seen, x = _seen(len(times), rows), rows.x
    for layer, (keys, values) in zip(_layers(stack), kept.layers, strict=True):
        u, v, q, k = layer.project(x)
        a = layer.attend(q, torch.cat([keys, k]), torch.cat([values, v]), seen, (rows.query_time, times, None))
        x = layer.finish(x, u, a)
    return x


def _seen(keys: int, rows: Rows) -> Visibility:
    offsets, row_offsets = (rows.begin.new_tensor([0, count]) for count in (keys, len(rows.begin)))
    return Visibility(offsets, rows.begin, rows.end, row_offsets, rows.prefix)


def _layers(stack: Hstu) -> list[HstuLayer]:
    return [layer for layer in stack.layers if isinstance(layer, HstuLayer)]
