"""The embedding table of one slot: full 64-bit ids, no collisions, no fixed vocabulary (csrc/table).

The weights are not torch parameters: the table updates its own rows (`step`), and the parameter log, not
`state_dict`, carries them (`export_delta`, `apply_delta`).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

try:
    from model._native import freshet_table
except ImportError as error:
    raise ImportError(f"the compiled embedding table cannot be loaded ({error}); run `make build`") from error

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
_EPSILON = {"sgd": 1e-10, "adagrad": 1e-10, "rowwise_adagrad": 1e-10, "adam": 1e-8}

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Ids = torch.Tensor | Int64Array
Floats = torch.Tensor | Float32Array


@dataclass(frozen=True, eq=False)
class TableDelta:
    """Changed rows in ascending order of key, and erased keys in ascending order; the two are disjoint."""

    keys: Int64Array  # [n]
    weights: Float32Array  # [n, dim]
    state: Float32Array  # [n, state_dim]: optimiser state
    tombstones: Int64Array  # [m]
    last_update_us: Int64Array  # [n]: event time of each row's newest update, 0 = unknown


@dataclass
class _Forward:
    """The rows one training forward handed out; autograd leaves the gradients in `rows.grad`."""

    ids: Int64Array  # [n]
    rows: torch.Tensor  # [n, dim], leaf


def slot_hash(slot: str) -> int:
    """The stable 64-bit hash that, with the seed and the id, decides a new row's weights."""
    return int.from_bytes(hashlib.blake2b(slot.encode(), digest_size=8).digest(), "little")


class EmbeddingTable(torch.nn.Module):
    """Embeddings of one slot, float32 [dim] per int64 id (any value), with the optimiser inside.

    optimizer: sgd, adagrad, rowwise_adagrad or adam (lazy: a row's steps are its own). With G the sum of the
    gradients of an id's occurrences, adagrad does s += G^2; w -= lr * G / (sqrt(s) + epsilon).
    New rows: uniform in (-init_scale, init_scale), a function of (seed, slot, id, init_scale) alone.
    initial_accumulator: start of both adagrads' sums. epsilon: None = 1e-10, for adam 1e-8.
    Raises ValueError for a setting out of range.
    """

    def __init__(
        self,
        slot: str,
        dim: int,
        optimizer: str = "adagrad",
        learning_rate: float = 0.05,
        init_scale: float = 0.05,
        seed: int = 0,
        initial_accumulator: float = 0.0,
        epsilon: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {optimizer!r}; use one of {', '.join(OPTIMIZERS)}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.slot = slot
        self.dim = dim
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self._pending: list[_Forward] = []
        self._table = freshet_table.Table(
            dim=dim,
            optimizer=optimizer,
            init_scale=init_scale,
            seed=seed,
            slot_hash=slot_hash(slot),
            initial_accumulator=initial_accumulator,
            epsilon=_EPSILON[optimizer] if epsilon is None else epsilon,
            beta1=betas[0],
            beta2=betas[1],
        )

    def extra_repr(self) -> str:
        return f"slot={self.slot!r}, dim={self.dim}, optimizer={self.optimizer!r}, rows={len(self)}"

    @property
    def state_dim(self) -> int:
        """Floats of optimiser state per row."""
        return self._table.state_dim

    def __len__(self) -> int:
        return len(self._table)

    def __bool__(self) -> bool:
        return True  # an empty table is still a table

    # Training

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 [..., dim] for int64 ids [...].

        In training mode with gradients enabled, absent ids get a row and the gradient waits for `step`.
        Otherwise nothing is inserted, and an absent id gets the very weights that it would be inserted with.
        """
        if not isinstance(ids, torch.Tensor):
            raise TypeError(f"ids must be a torch tensor, got {type(ids).__name__}; use torch.as_tensor(ids)")
        flat = _ids(ids)
        shape = (*ids.shape, self.dim)
        if not (self.training and torch.is_grad_enabled()):
            return torch.from_numpy(self._table.lookup(flat, True)).to(ids.device).view(shape)
        flat = flat.copy()  # the caller may reuse its buffer before `step`
        rows = torch.from_numpy(self._table.find_or_insert(flat)).to(ids.device).requires_grad_()
        self._pending.append(_Forward(flat, rows))
        return rows.view(shape)

    def step(self, lr: float | None = None, now_us: int = 0) -> int:
        """Applies all pending gradients as one batch, forwards in order, each id once; then forgets them.

        lr: None = `learning_rate`. now_us: event time of the update, 0 = unknown. Returns the ids updated.
        ValueError if a gradient is not finite: then nothing has changed, and `discard` drops the gradients.
        """
        gradients = [(f.ids, f.rows.grad) for f in self._pending if f.rows.grad is not None]
        updated = 0
        if gradients:
            ids = np.concatenate([i for i, _ in gradients])
            grads = np.concatenate([_floats(g, "gradient") for _, g in gradients])
            updated = self.apply_gradients(ids, grads, lr, now_us)
        self.discard()
        return updated

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients computed so far; a forward whose backward is still to come keeps waiting."""
        self._pending = [f for f in self._pending if f.rows.grad is None]

    def discard(self) -> None:
        """Forgets all pending forwards and their gradients."""
        self._pending.clear()

    def gradient_squared_norm(self) -> float:
        """Sum of squares of the pending gradients, first summed per id as in a dense table's gradient."""
        with_grad = [f for f in self._pending if f.rows.grad is not None]
        if not with_grad:
            return 0.0
        ids, inverse = np.unique(np.concatenate([f.ids for f in with_grad]), return_inverse=True)
        grads = torch.cat([f.rows.grad.detach().cpu() for f in with_grad if f.rows.grad is not None]).double()
        summed = torch.zeros(len(ids), self.dim, dtype=torch.float64)
        summed.index_add_(0, torch.from_numpy(inverse.reshape(-1)), grads)
        return float(summed.square().sum())

    def scale_gradients(self, factor: float) -> None:
        """Multiplies the pending gradients, for clipping by a norm taken over the whole model."""
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"factor must be finite and >= 0, got {factor}; discard() drops the gradients")
        for forward in self._pending:
            if forward.rows.grad is not None:
                forward.rows.grad = forward.rows.grad * factor  # not in place: autograd may share its storage

    def apply_gradients(self, ids: Ids, grads: Floats, lr: float | None = None, now_us: int = 0) -> int:
        """One update per distinct id of ids [n]; grads [n, dim] of repeated ids are summed. See `step`."""
        rate = self.learning_rate if lr is None else lr
        return self._table.apply_gradients(_ids(ids), _floats(grads, "grads"), rate, now_us)

    # Reading and writing rows

    def lookup(self, ids: Ids, missing: str = "initial") -> torch.Tensor:
        """float32 [..., dim] on the CPU, without gradient; inserts nothing. missing: "initial" or "zeros"."""
        if missing not in ("initial", "zeros"):
            raise ValueError(f'missing must be "initial" or "zeros", got {missing!r}')
        rows = self._table.lookup(_ids(ids), missing == "initial")
        return torch.from_numpy(rows).view(*ids.shape, self.dim)

    def upsert(self, ids: Ids, weights: Floats, state: Floats | None = None, last_update_us: Ids | None = None) -> int:
        """Makes the rows of ids [n] exactly weights [n, dim], state [n, state_dim] and last_update_us [n].

        state None: that of a new row. last_update_us None: unknown. Returns how many rows are new.
        ValueError for non-finite values or shapes that do not fit: then nothing has changed.
        """
        return self._table.upsert(
            _ids(ids),
            _floats(weights, "weights"),
            None if state is None else _floats(state, "state"),
            None if last_update_us is None else _ids(last_update_us, "last_update_us"),
        )

    def erase(self, ids: Ids) -> int:
        """Removes rows, leaving tombstones; absent ids are ignored. Returns the rows removed."""
        return self._table.erase(_ids(ids))

    def expire(self, before_us: int) -> int:
        """Erases the rows whose newest update is before this event time. Rows of unknown time (0) stay."""
        return self._table.expire(before_us)

    # Deltas

    def epoch(self) -> int:
        """The open epoch."""
        return self._table.epoch()

    def advance_epoch(self) -> int:
        """Closes the open epoch and returns it: pass it to the next `export_delta`. The first is 1."""
        return self._table.advance_epoch()

    def export_delta(self, since_epoch: int) -> TableDelta:
        """All that changed in epochs > since_epoch, the open one included; 0 = since ever.

        ValueError if that epoch is not closed, or if tombstones after it were dropped (use `export_all`).
        """
        if since_epoch < 0:
            raise ValueError(f"since_epoch must be >= 0, got {since_epoch}")
        return _delta(self._table.export_delta(since_epoch))

    def export_all(self) -> TableDelta:
        """All rows and no tombstones: a snapshot, to be applied to an empty table."""
        return _delta(self._table.export_all())

    def apply_delta(self, delta: TableDelta) -> None:
        """Replays an export of a table with the same settings; the changed rows are then equal to the bit."""
        tombstones = _ids(delta.tombstones, "tombstones")
        self.upsert(delta.keys, delta.weights, delta.state, delta.last_update_us)
        self.erase(tombstones)

    def drop_tombstones(self, up_to_epoch: int) -> int:
        """Forgets tombstones of closed epochs <= up_to_epoch (all readers have them). Returns how many."""
        if up_to_epoch < 0:
            raise ValueError(f"up_to_epoch must be >= 0, got {up_to_epoch}")
        return self._table.drop_tombstones(up_to_epoch)

    def stats(self) -> dict[str, int]:
        """rows, tombstones, epoch, memory_bytes and totals (looked_up, missed, inserted, updated ...)."""
        return self._table.stats()


def _delta(arrays: freshet_table.Delta) -> TableDelta:
    keys, weights, state, last_update_us, tombstones = arrays
    return TableDelta(keys, weights, state, tombstones, last_update_us)


def _ids(ids: Ids, name: str = "ids") -> Int64Array:
    """ids as a flat, contiguous array; TypeError unless they are int64 already (a cast could merge ids)."""
    array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else ids
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be an int64 tensor or array, got {type(ids).__name__}")
    if array.dtype != np.int64:
        raise TypeError(f"{name} must be int64, got {array.dtype}; convert with .long() or .astype(np.int64)")
    return np.require(array.reshape(-1), np.int64, ["C_CONTIGUOUS", "ALIGNED"])


def _floats(values: Floats, name: str) -> Float32Array:
    """values [n, width] as a contiguous array; TypeError unless they are float32 already."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a float32 tensor or array, got {type(values).__name__}")
    if array.dtype != np.float32:
        raise TypeError(f"{name} must be float32, got {array.dtype}; use .float() or .astype(np.float32)")
    return np.require(array, np.float32, ["C_CONTIGUOUS", "ALIGNED"])
