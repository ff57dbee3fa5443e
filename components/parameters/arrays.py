"""Parameters as numpy arrays, their safetensors form, and the replay of deltas.

Only numpy is needed here, so that a reader of the log need not load torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from model.table_delta import TableDelta

Array = npt.NDArray[np.generic]
Files = dict[str, dict[str, Array]]
"""The three files of an entry: tables, state, dense -> array name -> array."""

FILES = ("tables", "state", "dense")
ROW_PARTS = ("keys", "weights", "tombstones")
STATE_PARTS = ("state", "last_update_us")
LATER_PARTS = ("counts", "candidate_keys", "candidates")
"""Logs of before these were kept have none."""
_OPTIMIZER = "optimizer/"


@dataclass(frozen=True, eq=False)
class Parameters:
    """All parameters of a model after sync point n; `optimizer` is empty when the state was not read."""

    dense: dict[str, Array]
    tables: dict[str, TableDelta]
    optimizer: dict[str, Array] = field(default_factory=dict)
    n: int = 0


ParameterDelta = Parameters
"""The same form holds a delta: all dense parameters, and per slot the changed rows and the erased keys since n - 1."""


def fold(parts: Sequence[Parameters]) -> Parameters:
    """Apply deltas to a snapshot, in order: the last word on each key wins. Keys come out ascending, no tombstones.

    All parts must have the same slots (see `difference`).
    """
    newest = parts[-1]
    tables = {slot: _fold_slot([part.tables[slot] for part in parts]) for slot in newest.tables}
    return Parameters(newest.dense, tables, newest.optimizer, newest.n)


def _fold_slot(parts: Sequence[TableDelta]) -> TableDelta:
    """In order, the last word on each key: a row (its number), gone (-1), or a candidate (-2 - its number)."""
    keys, words, rows, candidates = [], [], 0, 0
    for part in parts:
        keys += [part.tombstones, part.keys, part.candidate_keys]
        words += [
            np.full(len(part.tombstones), -1),
            np.arange(rows, rows + len(part.keys)),
            -2 - np.arange(candidates, candidates + len(part.candidate_keys)),
        ]
        rows, candidates = rows + len(part.keys), candidates + len(part.candidate_keys)
    all_keys, all_words = np.concatenate(keys), np.concatenate(words)
    order = np.argsort(all_keys, kind="stable")
    is_last = np.append(np.diff(all_keys[order]) != 0, True)[: len(order)]
    key, word = all_keys[order][is_last], all_words[order][is_last]
    chosen, waiting = word[word >= 0], -2 - word[word < -1]
    counted = any(part.counts is not None for part in parts)
    counts = [np.zeros(len(part.keys), np.uint16) if part.counts is None else part.counts for part in parts]
    return TableDelta(
        keys=key[word >= 0],
        weights=np.concatenate([part.weights for part in parts])[chosen],
        state=_gather([part.state for part in parts], chosen),
        last_update_us=_gather([part.last_update_us for part in parts], chosen),
        counts=np.concatenate(counts)[chosen] if counted else None,
        candidate_keys=key[word < -1],
        candidates=np.concatenate([part.candidates for part in parts])[waiting],
    )


def _gather(arrays: Sequence[Any], chosen: npt.NDArray[np.int64]) -> Any:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present)[chosen] if present else None


def difference(one: Parameters, other: Parameters) -> str | None:
    """Why two parts cannot belong to one model (other slots, widths, dense names or shapes), or None."""
    if one.tables.keys() != other.tables.keys():
        return f"slots {sorted(one.tables)} and {sorted(other.tables)}"
    for slot, table in one.tables.items():
        widths = table.weights.shape[1], other.tables[slot].weights.shape[1]
        if widths[0] != widths[1]:
            return f"rows of slot {slot} are {widths[0]} and {widths[1]} wide"
    shapes = [{name: array.shape for name, array in part.dense.items()} for part in (one, other)]
    if shapes[0] != shapes[1]:
        wrong = sorted(
            name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
        )
        return f"dense parameters differ in name or shape: {', '.join(wrong)}"
    return None


def defect(parameters: Parameters) -> str | None:
    """What is wrong with the arrays (dtype, shape, repeated keys), or None."""
    for slot, table in parameters.tables.items():
        n = len(table.keys)
        if table.keys.dtype != np.int64 or table.tombstones.dtype != np.int64:
            return f"keys of slot {slot} are not int64"
        if table.keys.ndim != 1 or table.tombstones.ndim != 1:
            return f"keys of slot {slot} are not a vector"
        for name, rows in (("weights", table.weights), ("state", table.state)):
            if rows is not None and (rows.dtype != np.float32 or rows.ndim != 2 or len(rows) != n):
                return f"{name} of slot {slot} are {rows.dtype}{list(rows.shape)}, not float32[{n}, width]"
        updated = table.last_update_us
        if updated is not None and (updated.dtype != np.int64 or updated.shape != (n,)):
            return f"last_update_us of slot {slot} is {updated.dtype}{list(updated.shape)}, not int64[{n}]"
        if len(np.unique(table.keys)) != n:
            return f"slot {slot} names a key twice"
    return None


def to_files(parameters: Parameters) -> Files:
    """The arrays of each of the three files; the weights a server reads lie apart from the trainer's state."""
    files: Files = {"tables": {}, "state": {}, "dense": dict(parameters.dense)}
    for slot, table in parameters.tables.items():
        files["tables"] |= {f"{slot}.{name}": getattr(table, name) for name in ROW_PARTS}
        for name in (*STATE_PARTS, *LATER_PARTS):
            if (array := getattr(table, name)) is not None:
                files["state"][f"{slot}.{name}"] = array
    files["state"] |= {_OPTIMIZER + name: array for name, array in parameters.optimizer.items()}
    return files


def from_files(files: Mapping[str, Mapping[str, Array]], n: int) -> Parameters:
    """The inverse of `to_files`; without a "state" file the state stays None. KeyError names a missing array."""
    rows, state = files["tables"], files.get("state", {})
    tables = {}
    for slot in sorted({name.rpartition(".")[0] for name in rows}):
        parts: dict[str, Any] = {name: rows[f"{slot}.{name}"] for name in ROW_PARTS}
        if "state" in files:
            parts |= {name: state[f"{slot}.{name}"] for name in STATE_PARTS}
            parts |= {name: state[f"{slot}.{name}"] for name in LATER_PARTS if f"{slot}.{name}" in state}
        tables[slot] = TableDelta(**parts)
    optimizer = {name[len(_OPTIMIZER) :]: a for name, a in state.items() if name.startswith(_OPTIMIZER)}
    return Parameters(dict(files["dense"]), tables, optimizer, n)


def encode(arrays: Mapping[str, Array]) -> bytes:
    """safetensors bytes; equal arrays give equal bytes."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()})


def decode(data: bytes) -> dict[str, Array]:
    """Inverse of `encode`; ValueError when the bytes are no safetensors file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
