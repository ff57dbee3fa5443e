"""Scoring of one user's candidates over a history that is kept between requests."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef

from components.errors import BadInput
from model import falcon
from model.falcon import KeyValues, Rows
from model.inputs import Tokens
from model.sequence_model import SequenceModel
from model.serving_table import ServingTable
from model.table import EmbeddingTable

_COLUMNS = (
    "kind", "item", "author", "category", "duration", "page", "action", "value", "user", "query_time", "key_time",
)  # fmt: skip
"""What a history token is; two tokens that agree in these and saw the same have the same keys and values."""


@dataclass
class ScoreCache:
    """One user's history as the layers hold it. Keep it between requests; it serves one request at a time.

    It is checked against the history of each request, so it can be given any history: what it has is used, what is
    missing is added, and what does not fit is made anew. That the parameters or the model have changed is noticed, too;
    only what writes to `parameter.data`, or with a fused optimiser, leaves no trace: begin a new cache after it.
    `reused` and `added` count the history tokens of the last request.
    """

    kept: KeyValues | None = None
    columns: Tensor | None = None  # (T, features)
    seen: Tensor | None = None  # (T, 2) begin and end of what each token saw; below 0: it is no longer kept
    parameters: tuple[object, ...] = ()
    reused: int = 0
    added: int = 0


def score_tokens(model: SequenceModel, tokens: Tokens, cache: ScoreCache | None = None) -> Tensor:
    """(C, outputs) of the candidates at the end of ONE user's tokens, equal to model.encode(tokens).

    Raises BadInput when the tokens are of more than one user, or the candidates are not at their end.
    """
    history, size = len(tokens) - len(tokens.targets), len(tokens)
    if len(tokens.seen.offsets) != 2 or (len(tokens.targets) and int(tokens.targets[0]) != history):
        raise BadInput("cached scoring takes the tokens of one user with the candidates at the end")
    device = model.norm.weight.device
    if cache is None or model.encoding is not None:  # with an encoding, each token's input depends on the request
        x = model.embed(tokens).to(device)
        kept = _extend(model, KeyValues.empty(model.hstu, x), tokens, x[:history], history)
        x = x[history:]
    else:
        kept = _history(model, tokens, history, cache)
        x = model.embed(tokens.rows(history, size)).to(device)
    h = falcon.score_rows(model.hstu, kept, _rows(tokens, x, history, size))
    return model.output(h).cpu()


def _history(model: SequenceModel, tokens: Tokens, count: int, cache: ScoreCache) -> KeyValues:
    """Keys and values of the first `count` tokens, from the cache as far as it goes, which is brought up to date."""
    context = len(model.config.context_slots())
    columns = torch.stack([getattr(tokens, name)[:count] for name in _COLUMNS], dim=1)
    seen, parameters = torch.stack([tokens.seen.begin, tokens.seen.end], dim=1), parameter_state(model)
    first = _first_read(tokens.seen.begin, count, model.config.layers)
    shift = _overlap(cache, columns, seen, context, first) if cache.parameters == parameters else None
    if shift is None or cache.kept is None or cache.seen is None:
        kept, saw = KeyValues.empty(model.hstu, model.norm.weight), seen[:0]
    else:
        kept = cache.kept.part(0, context).join(cache.kept.part(context + shift, shift + count))
        saw = torch.cat([cache.seen[:context], cache.seen[context + shift : shift + count] - shift])
    cache.reused, cache.added = len(kept), count - len(kept)
    if cache.added:
        x = model.embed(tokens.rows(len(kept), count)).to(model.norm.weight.device)
        cache.kept = kept = _extend(model, kept, tokens, x, count)
        cache.seen, cache.columns, cache.parameters = torch.cat([saw, seen[len(saw) : count]]), columns, parameters
    return kept


def _first_read(begin: Tensor, count: int, layers: int) -> int:
    """The first of `count` history tokens whose own attention the candidates' outputs depend on.

    Of tokens before it only the input matters, if anything: those may have seen what the history no longer has.
    """
    first = count
    for _ in range(layers - 1 if len(begin) > count else 0):
        first = min(first, int(begin[first:].min()))  # what the candidates see; then, what that sees
    return first


def _overlap(cache: ScoreCache, columns: Tensor, seen: Tensor, context: int, first: int) -> int | None:
    """How many of the oldest kept tokens the wanted history has lost, if it goes on from the rest; else None.

    Context tokens stay at the front and must be the same. From token `first` on, each must have seen what it is to see.
    """
    if cache.columns is None or cache.seen is None or len(columns) <= context:
        return None
    if not torch.equal(cache.columns[:context], columns[:context]):
        return None
    old, wanted = cache.columns[context:], columns[context:]
    for shift in (old == wanted[0]).all(1).nonzero().flatten().tolist():
        size = min(len(old) - shift, len(wanted))
        read = slice(max(first, context), context + size)
        saw = cache.seen[read.start + shift : read.stop + shift] - shift
        if torch.equal(old[shift : shift + size], wanted[:size]) and torch.equal(saw, seen[read]):
            return int(shift)
    return None


def _extend(model: SequenceModel, kept: KeyValues, tokens: Tokens, x: Tensor, stop: int) -> KeyValues:
    """Kept tokens, and those after them up to `stop`, whose input is x."""
    first = len(kept)
    return falcon.extend(
        model.hstu, kept, _rows(tokens, x, first, stop), tokens.key_time[first:stop].to(kept.key_time.device)
    )


CHANGES = ("inserted", "updated", "upserted", "erased", "expired", "evicted")


def parameter_state(model: SequenceModel) -> tuple[object, ...]:
    """Of one model on one device; changes whenever a parameter or a row of a table, or of a serving copy, changes.

    Numbers of changes alone would not tell models apart that were made in equally many steps, nor parameters that
    others took the place of.
    """
    tables = [m.stats() for m in model.modules() if isinstance(m, EmbeddingTable | ServingTable)]
    counts = (stats.get(name, 0) for stats in tables for name in CHANGES)
    where = str(model.norm.weight.device)
    dense = ((WeakIdRef(parameter), parameter.data_ptr(), parameter._version) for parameter in model.parameters())
    return (weakref.ref(model), where, *dense, *counts)


def _rows(tokens: Tokens, x: Tensor, start: int, stop: int) -> Rows:
    seen, to = tokens.seen, x.device
    prefix = None if seen.prefix is None else seen.prefix[start:stop].to(to)
    begin, end, time = (column[start:stop].to(to) for column in (seen.begin, seen.end, tokens.query_time))
    return Rows(x, begin, end, time, prefix)
