"""The copy of an embedding table that a server reads: fp32, fp16 or int8 rows, fed by deltas (csrc/table).

Lookups take no lock, also while another thread applies a delta: each row is read as it was at one moment, and a key
that is not being erased is never missed.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch

from model.table import EmbeddingTable, Events
from model.table_arrays import Floats, Ids, as_floats, as_ids, is_mean, slot_hash, tensor_ids
from model.table_delta import TableDelta

try:
    from model._native import freshet_table
except ImportError as error:
    raise ImportError(f"the compiled embedding table cannot be loaded ({error}); run `make build`") from error

PRECISIONS = ("fp32", "fp16", "int8")
FILL_ROWS = 1 << 18
"""Rows per call when a table is filled, which bounds the scratch memory."""
_NO_IDS = np.empty(0, np.int64)


class ServingTable(torch.nn.Module):
    """Read-only embeddings of one slot, float32 [dim] per int64 id, stored in a serving precision.

    precision: how a row of weights w is stored, and so what is served of it:
    fp32: w itself, to the bit. fp16: w rounded to nearest even; magnitudes from 65520 on are refused.
    int8: q * scale with scale = max|w| / 127 of the row, so |served - w| <= scale / 2 (but for float rounding).
    slot, dim, init_scale and seed must be the trainer's: an id without a row is served what the same precision makes of
    the weights it would start training from. Raises ValueError for a setting out of range.
    """

    def __init__(self, slot: str, dim: int, precision: str = "fp32", init_scale: float = 0.05, seed: int = 0) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; use one of {', '.join(PRECISIONS)}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.slot = slot
        self.dim = dim
        self.precision = precision
        self._table = freshet_table.ServingTable(
            dim=dim, precision=precision, init_scale=init_scale, seed=seed, slot_hash=slot_hash(slot)
        )

    def extra_repr(self) -> str:
        return f"slot={self.slot!r}, dim={self.dim}, precision={self.precision!r}, rows={len(self)}"

    def __len__(self) -> int:
        return len(self._table)

    def __bool__(self) -> bool:
        return True  # an empty table is still a table

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"the serving copy of slot {self.slot!r} cannot be copied or pickled; "
            "make another ServingTable and feed it the same deltas"
        )

    # Reading

    def forward(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor | None = None,
        pooling: str = "sum",
        events: Events | None = None,
    ) -> torch.Tensor:
        """As `EmbeddingTable.forward`, without gradient: float32 [..., dim], or with offsets [bags, dim].

        An absent id gets its initial weights. events are of no account here: nothing is admitted and nothing expires.
        RuntimeError in training mode: the rows would never learn.
        """
        if self.training:
            raise RuntimeError(
                f"the serving copy of slot {self.slot!r} cannot be trained; call eval() to serve it, "
                "or train the model that has the EmbeddingTable"
            )
        flat = tensor_ids(ids)
        is_mean(pooling, offsets is not None)  # refused as where it was trained
        if offsets is not None:
            return self.lookup_pooled(flat, offsets, pooling).to(ids.device)
        return self.lookup(flat).view(*ids.shape, self.dim).to(ids.device)

    def lookup(self, ids: Ids, missing: str = "initial") -> torch.Tensor:
        """float32 [..., dim] on the CPU for int64 ids [...]. missing: "initial" or "zeros"."""
        rows = self._table.lookup(as_ids(ids), _initial(missing), torch.get_num_threads())
        return torch.from_numpy(rows).view(*ids.shape, self.dim)

    def lookup_pooled(self, ids: Ids, offsets: Ids, pooling: str = "sum", missing: str = "initial") -> torch.Tensor:
        """float32 [bags, dim] on the CPU: the sum or mean, in float32 and in order, of each bag's rows.

        Bag b holds ids[offsets[b] : offsets[b + 1]]; offsets [bags + 1] rise from 0 to len(ids). An empty bag gives
        zeros. ValueError for other offsets.
        """
        mean, ends = is_mean(pooling), as_ids(offsets, "offsets")
        return torch.from_numpy(
            self._table.lookup_pooled(as_ids(ids), ends, mean, _initial(missing), torch.get_num_threads())
        )

    def stats(self) -> dict[str, int]:
        """rows, row_bytes, overhead_bytes (index), and the totals looked_up, missed (ids), upserted, erased (rows)."""
        return self._table.stats()

    # Feeding

    def update(self, keys: Ids, weights: Floats, tombstones: Ids = _NO_IDS) -> tuple[int, int]:
        """Makes the rows of keys [n] what is served of weights [n, dim], then removes those of tombstones [m].

        Of a repeated key the last occurrence stays; absent tombstones are ignored. One writer at a time, others wait.
        Returns how many rows are new, and how many were removed. ValueError for weights that are not finite or do not
        fit the precision, or for shapes that do not fit: then nothing has changed.
        """
        return self._table.apply(as_ids(keys, "keys"), as_floats(weights, "weights"), as_ids(tombstones, "tombstones"))

    def apply_delta(self, delta: TableDelta) -> tuple[int, int]:
        """`update` with an export of the trainer's table."""
        return self.update(delta.keys, delta.weights, delta.tombstones)

    def upsert(self, ids: Ids, weights: Floats) -> int:
        """`update` without tombstones; returns how many rows are new."""
        return self.update(ids, weights)[0]

    def erase(self, ids: Ids) -> int:
        """`update` with tombstones alone; returns the rows removed."""
        return self.update(_NO_IDS, np.empty((0, self.dim), np.float32), ids)[1]


def served_weights(weights: Floats, precision: str) -> torch.Tensor:
    """What a table of that precision serves of weights [n, dim]: float32 [n, dim], each row by itself.

    So `serving.lookup(ids)` is `served_weights(trained.lookup(ids), precision)` to the bit, present or absent.
    ValueError for weights that are not finite or do not fit.
    """
    return torch.from_numpy(freshet_table.serving_rounding(as_floats(weights, "weights"), precision))


def serving_copy(model: torch.nn.Module, precision: str = "fp32", *, fill: bool = True) -> dict[str, ServingTable]:
    """Replaces, in place, every EmbeddingTable inside a model by a ServingTable of its slot and settings.

    fill: copy the rows; otherwise the new tables are empty. Returns slot -> new table. ValueError if two tables have
    one slot, if a row does not fit the precision, or if the model is itself a table: then the model is as it was.
    """
    if isinstance(model, EmbeddingTable):
        raise ValueError("a table cannot replace itself; pass the model that has it, or make a ServingTable")
    places = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, EmbeddingTable)]
    tables = {id(table): table for _, table in places}
    copies = {key: _copy(table, precision, fill) for key, table in tables.items()}
    by_slot = {copy.slot: copy for copy in copies.values()}
    if len(by_slot) != len(copies):
        raise ValueError(
            f"the model has two tables of one slot; its slots are {sorted(c.slot for c in copies.values())}"
        )
    for path, table in places:
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).register_module(name, copies[id(table)])
    return by_slot


def _copy(table: EmbeddingTable, precision: str, fill: bool) -> ServingTable:
    copy = ServingTable(table.slot, table.dim, precision, table.init_scale, table.seed).train(table.training)
    if fill:
        rows = table.export_all()
        for at in range(0, len(rows.keys), FILL_ROWS):
            copy.update(rows.keys[at : at + FILL_ROWS], rows.weights[at : at + FILL_ROWS])
    return copy


def _initial(missing: str) -> bool:
    if missing not in ("initial", "zeros"):
        raise ValueError(f'missing must be "initial" or "zeros", got {missing!r}')
    return missing == "initial"
