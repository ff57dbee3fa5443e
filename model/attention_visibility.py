"""Which keys each row of a jagged batch sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from components.errors import BadInput


@dataclass
class Visibility:
    """Who sees whom, in a jagged batch of B sequences with T keys and R rows (queries). All tensors int64.

    offsets (B+1,): the keys of each sequence. row_offsets (B+1,): its rows, which belong to its LAST keys;
    None = every key is a row. Row i of a sequence sees, of its own keys, [0, prefix_i) and [begin_i, end_i) (their
    union: no key counts twice) and, once, itself. begin, end, prefix (R,) are relative to the sequence's first key;
    prefix None = no prefix.

    Build it once per batch and share it between layers: `cache` keeps what a kernel has derived from it.
    """

    offsets: Tensor
    begin: Tensor
    end: Tensor
    row_offsets: Tensor | None = None
    prefix: Tensor | None = None
    cache: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def first_row(self) -> Tensor:
        """(B+1,) the rows of each sequence, whether or not every key is a row."""
        return self.offsets if self.row_offsets is None else self.row_offsets

    @property
    def own(self) -> Tensor:
        """(R,) position of each row among the keys of its sequence."""
        rows = self.first_row.diff()
        first = self.offsets.diff() - rows - self.first_row[:-1]
        return torch.arange(len(self.begin), device=self.begin.device) + first.repeat_interleave(rows)

    def to(self, device: torch.device) -> Visibility:
        """The same visibility on another device; itself when it is there already."""
        if self.begin.device == device:
            return self
        row_offsets = None if self.row_offsets is None else self.row_offsets.to(device)
        prefix = None if self.prefix is None else self.prefix.to(device)
        return Visibility(self.offsets.to(device), self.begin.to(device), self.end.to(device), row_offsets, prefix)

    def last_rows(self, counts: Tensor) -> tuple[Visibility, Tensor]:
        """Only the last counts (B,) rows of each sequence, over the same keys; and which rows these are (R',)."""
        rows = self.first_row.diff()
        if counts.shape != rows.shape or bool(((counts < 0) | (counts > rows)).any()):
            raise BadInput("last_rows needs, for each sequence, a count between 0 and its number of rows")
        row_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        shift = (self.first_row[1:] - row_offsets[1:]).repeat_interleave(counts)
        keep = torch.arange(int(row_offsets[-1]), device=counts.device) + shift
        prefix = None if self.prefix is None else self.prefix[keep]
        return Visibility(self.offsets, self.begin[keep], self.end[keep], row_offsets, prefix), keep

    def check(self) -> None:
        """Raise BadInput unless the offsets cover the rows and every interval stays inside its sequence."""
        if "checked" in self.cache:
            return
        every = (self.offsets, self.first_row, self.begin, self.end, self.begin if self.prefix is None else self.prefix)
        if any(each.dim() != 1 or each.dtype != torch.int64 for each in every):
            raise BadInput("offsets, begin, end and prefix need one dimension and int64; convert with .long()")
        rows, keys = self.first_row.diff(), self.offsets.diff()
        if rows.shape != keys.shape or bool((rows < 0).any()) or bool((rows > keys).any()):
            raise BadInput("each sequence needs as many keys as rows at least; give offsets and row_offsets (B+1)")
        if int(self.offsets[0]) != 0 or int(self.first_row[0]) != 0 or int(self.first_row[-1]) != len(self.begin):
            raise BadInput("offsets do not cover the rows; give offsets (B+1) from 0 to the number of rows")
        limit = keys.repeat_interleave(rows)
        prefix = self.begin if self.prefix is None else self.prefix
        if not self.begin.shape == self.end.shape == prefix.shape:
            raise BadInput("begin, end and prefix need one value for each row")
        if bool(((self.begin < 0) | (self.end > limit) | (self.begin > self.end)).any()):
            raise BadInput("a visibility interval leaves its sequence; keep 0 <= begin <= end <= length")
        if bool(((prefix < 0) | (prefix > limit)).any()):
            raise BadInput("a visible prefix leaves its sequence; keep 0 <= prefix <= length")
        self.cache["checked"] = True


def causal(
    lengths: Tensor, *, num_targets: Tensor | None = None, max_attn_len: int = 0, contextual_len: int = 0
) -> Visibility:
    """Intervals of the published masks (row index i, sequence length n; the row itself is always seen).

    lengths (B,) int64. Plain: [0, i). num_targets (B,): the last rows are candidates; they see the history and
    themselves, never each other. contextual_len C: a prefix that counts as ONE position; its rows see the whole
    history. max_attn_len W > 0: only the W positions before the row (the prefix, as one of them, is in or out).
    """
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    index = torch.arange(int(offsets[-1]), device=lengths.device) - offsets[:-1].repeat_interleave(lengths)
    history = (lengths if num_targets is None else lengths - num_targets).repeat_interleave(lengths)
    end = torch.minimum(index, history)
    begin = (end - max_attn_len).clamp(min=0) if max_attn_len else torch.zeros_like(end)
    begin = torch.where(begin < contextual_len, 0, begin)
    end = torch.where(index < contextual_len, history, end)
    return Visibility(offsets, begin, end)
