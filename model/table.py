"""The embedding table of one slot: full 64-bit ids, no collisions, no fixed vocabulary (csrc/table).

The weights are not torch parameters: the table updates its own rows (`step`), and the parameter log, not
`state_dict`, carries them (`export_delta`, `apply_delta`). Snapshots: model/table_snapshot.py.
"""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np
import torch

from model.table_arrays import (
    Floats,
    Ids,
    Int64Array,
    UInt64Array,
    as_floats,
    as_ids,
    is_mean,
    slot_hash,
    tensor_ids,
)
from model.table_consumers import DeltaConsumers
from model.table_delta import TableDelta
from model.table_gradients import Events, Forward, Gradients

try:
    from model._native import freshet_table
except ImportError as error:
    raise ImportError(f"the compiled embedding table cannot be loaded ({error}); run `make build`") from error

__all__ = ["OPTIMIZERS", "EmbeddingTable", "Events", "slot_hash"]

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl")
MAX_LEARNING_RATE = 1e6
_EPSILON = {"adam": 1e-8}
_PROGRESS = ("updates", "sweep_at", "eviction_at", "clock")


class EmbeddingTable(torch.nn.Module):
    """Embeddings of one slot, float32 [dim] per int64 id (any value), with the optimiser inside.

    Training: forward, backward, then `step` of the table, beside that of the dense parameters' optimiser. Rows are no
    parameters: `state_dict` lacks them (`save_snapshot` and `export_all` have them), and `zero_grad`, `requires_grad_`
    or a cast of a module around the table does not reach them. The table's own `zero_grad` drops their gradients, its
    `requires_grad_(False)` freezes them.

    optimizer: sgd, adagrad, rowwise_adagrad, adam (lazy: a row's steps are its own) or ftrl. With G the sum of the
    gradients of an id's occurrences, adagrad does s += G^2; w -= lr * G / (sqrt(s) + epsilon).
    New rows: uniform in (-init_scale, init_scale), a function of (seed, slot, id, init_scale) alone. A forward reads
    them so before they exist; the first gradient makes them exist.
    initial_accumulator: start of both adagrads' and ftrl's sums. epsilon: None = 1e-10, for adam 1e-8. betas: adam's.
    l1, l2, ftrl_beta: ftrl's.

    Admission: an id gets its row at its admission_threshold-th event in a gradient (counted exactly, 20 bytes per
    candidate), or at each event with admission_probability; gradients before that are dropped and counted.
    Expiry: rows without an event (with ttl_on_access: nor read for one by a training forward) for ttl_us go, a part of
    the table at each step, all with `expire_stale`, never below min_rows. An id is an event wherever it occurs, unless
    the forward says otherwise (`Events`): a negative updates a row, but does not admit it or keep it. With a threshold
    ttl_us is at most 1,000 days.
    max_rows: then when_full says: "refuse" new ids, or evict neighbours in hash order, "evict_stalest" or
    "evict_rarest". `stats` counts whatever was refused or has gone.

    shards: how many threads can write; threads: how many do (None: torch.get_num_threads()). Results depend on neither.

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
        l1: float = 0.0,
        l2: float = 0.0,
        ftrl_beta: float = 1.0,
        admission_threshold: int = 1,
        admission_probability: float = 1.0,
        ttl_us: int = 0,
        ttl_on_access: bool = False,
        min_rows: int = 0,
        sweep_steps: int = 1024,
        max_rows: int = 0,
        when_full: str = "refuse",
        shards: int = 16,
        threads: int | None = None,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.settings = settings  # by argument name, as given
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {optimizer!r}; use one of {', '.join(OPTIMIZERS)}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if admission_threshold != 1 and admission_probability != 1.0:
            raise ValueError("give an admission_threshold or an admission_probability, not both")
        if optimizer != "ftrl" and (l1 or l2):
            raise ValueError(f"{optimizer} has no l1 and l2; use optimizer='ftrl', or leave them 0")
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas}")
        if not 0 <= learning_rate <= MAX_LEARNING_RATE:
            raise ValueError(f"learning_rate must be between 0 and {MAX_LEARNING_RATE:.0e}, got {learning_rate}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, or None, got {threads}")
        self.slot, self.dim, self.optimizer = slot, dim, optimizer
        self.learning_rate, self.init_scale, self.seed = learning_rate, init_scale, seed
        self.ttl_on_access = ttl_on_access
        self.threads = threads
        self._learns = True
        self._pending: list[Forward] = []
        admission = "threshold" if admission_threshold != 1 else "all"
        self._table = freshet_table.Table(
            dim=dim,
            optimizer=optimizer,
            initial_accumulator=initial_accumulator,
            epsilon=_EPSILON.get(optimizer, 1e-10) if epsilon is None else epsilon,
            beta1=betas[0],
            beta2=betas[1],
            l1=l1,
            l2=l2,
            ftrl_beta=ftrl_beta,
            init_scale=init_scale,
            seed=seed,
            slot_hash=slot_hash(slot),
            admission="probability" if admission_probability != 1.0 else admission,
            admission_threshold=admission_threshold,
            admission_probability=admission_probability,
            ttl_us=ttl_us,
            ttl_on_access=ttl_on_access,
            min_rows=min_rows,
            sweep_steps=sweep_steps,
            max_rows=max_rows,
            when_full=when_full,
            shards=shards,
        )
        self.consumers = DeltaConsumers(self._table)  # of its deltas

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

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"the table of slot {self.slot!r} cannot be copied or pickled; use save_snapshot and load_snapshot, "
            "or export_all and the apply_delta of another table"
        )

    def _threads(self) -> int:
        return torch.get_num_threads() if self.threads is None else self.threads

    # Training

    def forward(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor | None = None,
        pooling: str = "sum",
        events: Events | None = None,
    ) -> torch.Tensor:
        """float32 [..., dim] for int64 ids [...]; with offsets [bags + 1], the sum or mean of each bag: [bags, dim].

        Nothing is inserted: an absent id gets the very weights that its row would start with. In training mode with
        gradients enabled, unless the table is frozen, the gradient waits for `step`. events: what the ids stand for;
        None: an event each, at the time of the step. The result is on the device of `ids`.
        """
        flat, mean = tensor_ids(ids), is_mean(pooling, offsets is not None)
        if events is not None:
            events.check(len(flat))
        ends = None if offsets is None else as_ids(offsets, "offsets")
        if ends is None:
            values = self._table.lookup(flat, True, self._threads())
        else:
            values = self._table.lookup_pooled(flat, ends, mean, True, self._threads())
        out = torch.from_numpy(values).to(ids.device)
        shape = out.shape if ends is not None else (*ids.shape, self.dim)
        if not (self.training and self._learns and torch.is_grad_enabled()):
            return out.view(shape)
        out.requires_grad_()
        bags = None if ends is None else ends.copy()  # the caller may reuse its buffers
        own = None if events is None else Events(events.counts.copy(), events.newest_us.copy())
        self._pending.append(Forward(flat.copy(), out, bags, mean, own))
        result: torch.Tensor = torch.ops.aten._unsafe_view(out, shape)  # unlike a leaf and its views, it may be changed
        return result

    def requires_grad_(self, requires_grad: bool = True) -> EmbeddingTable:
        """Whether forwards from now on learn; False freezes the rows, as it does a layer's parameters."""
        self._learns = requires_grad
        return self

    def step(self, lr: float | None = None, now_us: int = 0) -> int:
        """Applies all pending gradients as one batch, forwards in order, each id once; then forgets them.

        lr: None = `learning_rate`. now_us: event time of the update, 0 = unknown. Returns the rows updated.
        ValueError if a gradient is not finite, or now_us is before 1970 or after 2106: then nothing has changed, and
        `discard` drops the gradients.
        MemoryError: rows that were there may have had their step, so the gradients are gone; do not repeat it.
        """
        updated = 0
        try:
            gradients = Gradients.of(self._pending, now_us)
            reads = self._reads(now_us)
            if gradients is not None:
                updated = self._update(gradients, lr, now_us, reads)
            elif reads is not None:
                self._table.touch(*reads)
        except MemoryError:
            self.discard()
            raise
        self.discard()
        return updated

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients computed so far; a forward whose backward is still to come keeps waiting."""
        self._pending = [f for f in self._pending if f.out.grad is None]

    def discard(self) -> None:
        """Forgets all pending forwards and their gradients."""
        self._pending.clear()

    def gradient_squared_norm(self) -> float:
        """Sum of squares of the pending gradients, first summed per id as in a dense table's gradient."""
        gradients = Gradients.of(self._pending)
        return 0.0 if gradients is None else gradients.squared_norm()

    def scale_gradients(self, factor: float) -> None:
        """Multiplies the pending gradients, for clipping by a norm taken over the whole model."""
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"factor must be finite and >= 0, got {factor}; discard() drops the gradients")
        for forward in self._pending:
            if forward.out.grad is not None:
                forward.out.grad = forward.out.grad * factor  # not in place: autograd may share its storage

    def apply_gradients(self, ids: Ids, grads: Floats, lr: float | None = None, now_us: int = 0) -> int:
        """One update per distinct id of ids [n]; grads [n, dim] of repeated ids are summed. See `step`.

        MemoryError: rows that were there are updated, and no id got a new one.
        """
        return self._update(Gradients(as_ids(ids), as_floats(grads, "grads")), lr, now_us)

    def _reads(self, now_us: int) -> tuple[Int64Array, Int64Array] | None:
        """All ids that were read, with their times, where reading keeps a row."""
        if not (self.ttl_on_access and self._pending):
            return None
        ids, times = zip(*(forward.reads_at(now_us) for forward in self._pending), strict=True)
        return np.concatenate(ids), np.concatenate(times)

    def _update(
        self, g: Gradients, lr: float | None, now_us: int, reads: tuple[Int64Array, Int64Array] | None = None
    ) -> int:
        rate = self.learning_rate if lr is None else lr
        counts, newest_us = (None, None) if g.events is None else (g.events.counts, g.events.newest_us)
        read_ids, read_us = reads or (None, None)
        return self._table.apply_gradients(
            g.ids, g.grads, g.row, g.scale, counts, newest_us, read_ids, read_us, rate, now_us, self._threads()
        )

    # Reading and writing rows

    def lookup(self, ids: Ids, missing: str = "initial") -> torch.Tensor:
        """float32 [..., dim] on the CPU, without gradient; inserts nothing. missing: "initial" or "zeros"."""
        if missing not in ("initial", "zeros"):
            raise ValueError(f'missing must be "initial" or "zeros", got {missing!r}')
        rows = self._table.lookup(as_ids(ids), missing == "initial", self._threads())
        return torch.from_numpy(rows).view(*ids.shape, self.dim)

    def find_or_insert(self, ids: Ids) -> torch.Tensor:
        """As `lookup`, after giving every absent id a fresh row, whatever the admission and max_rows."""
        return torch.from_numpy(self._table.find_or_insert(as_ids(ids), self._threads())).view(*ids.shape, self.dim)

    def upsert(self, ids: Ids, weights: Floats, state: Floats | None = None, last_update_us: Ids | None = None) -> int:
        """Makes the rows of ids [n] exactly weights [n, dim], state [n, state_dim] and last_update_us [n].

        state None: that of a new row. last_update_us None: unknown; otherwise kept in whole seconds, rounded up.
        Returns how many rows are new. ValueError for non-finite values or shapes that do not fit: nothing has changed.
        """
        return self._table.upsert(
            as_ids(ids),
            as_floats(weights, "weights"),
            None if state is None else as_floats(state, "state"),
            None if last_update_us is None else as_ids(last_update_us, "last_update_us"),
            None,
            None,
            self._threads(),
        )

    def erase(self, ids: Ids) -> int:
        """Removes rows (and candidates), leaving tombstones; absent ids are ignored. Returns the rows removed."""
        return self._table.erase(as_ids(ids))

    def expire(self, before_us: int) -> int:
        """Erases at once the rows last seen before this event time. Rows of unknown time (0) stay."""
        return self._table.expire(before_us)

    def expire_stale(self) -> int:
        """Erases at once all that has outlived ttl_us at the newest event time seen. Returns the rows removed.

        For a table that is exported or saved: the sweep of the steps may not have come round.
        """
        return self._table.expire_stale()

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
        return TableDelta.of(self._table.export_delta(since_epoch))

    def export_all(self) -> TableDelta:
        """All rows and candidates, no tombstones: to be applied to an empty table."""
        return TableDelta.of(self._table.export_all())

    def apply_delta(self, delta: TableDelta) -> None:
        """Replays an export of a table with the same settings; the changed rows are then equal to the bit.

        ValueError or TypeError for what does not fit: nothing has changed. MemoryError: a part may be done; apply it
        again.
        """
        self._table.apply_delta(
            as_ids(delta.tombstones, "tombstones"),
            as_ids(delta.keys, "keys"),
            as_floats(delta.weights, "weights"),
            None if delta.state is None else as_floats(delta.state, "state"),
            None if delta.last_update_us is None else as_ids(delta.last_update_us, "last_update_us"),
            delta.counts,
            as_ids(delta.candidate_keys, "candidate_keys"),
            delta.candidates,
            self._threads(),
        )

    def drop_tombstones(self, up_to_epoch: int) -> int:
        """Forgets tombstones of closed epochs <= up_to_epoch (all readers have them). Returns how many."""
        if up_to_epoch < 0:
            raise ValueError(f"up_to_epoch must be >= 0, got {up_to_epoch}")
        return self._table.drop_tombstones(up_to_epoch)

    def progress(self) -> UInt64Array:
        """[4]: what training on from here depends on beside rows and candidates. Updates, two cursors, the clock."""
        return np.array([self._table.progress()[name] for name in _PROGRESS], np.uint64)

    def start_from(self, progress: UInt64Array) -> None:
        """As another table's `progress` was, before its rows are replayed. ValueError unless this table is empty."""
        known = dict(zip(_PROGRESS, progress.tolist(), strict=True))
        nothing, never = np.empty(0, np.int64), np.empty(0, np.uint32)
        freshet_table.begin_restore(self._table, {**known, "epoch": 1, "dropped_to": 0}, nothing, never)

    def stats(self) -> dict[str, int]:
        """rows, candidates, tombstones, row_bytes, overhead_bytes, and totals of what was done, refused and removed."""
        return self._table.stats()
