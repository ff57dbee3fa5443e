"""What changed in an embedding table, as numpy arrays: the table gives and takes it, the parameter log keeps it.

Only numpy is needed here, so that a reader of the log need not load torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from model._native import freshet_table


def _no_ids() -> npt.NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class TableDelta:
    """Erased keys, changed rows and candidates, to be applied in this order; each in ascending order of key.

    keys and tombstones are disjoint. state None: that of new rows; last_update_us None: unknown; counts (occurrences of
    each row in updates) None: 0. candidates: ids that were seen but not admitted yet, as words of hour << 16 | count.
    A server reads nothing but keys, weights and tombstones.
    """

    keys: npt.NDArray[np.int64]  # [n]
    weights: npt.NDArray[np.float32]  # [n, dim]
    state: npt.NDArray[np.float32] | None = None  # [n, state_dim]: optimiser state
    tombstones: npt.NDArray[np.int64] = field(default_factory=_no_ids)  # [m]
    last_update_us: npt.NDArray[np.int64] | None = None  # [n]: event time of a row's newest update, 0 = unknown
    counts: npt.NDArray[np.uint16] | None = None  # [n]
    candidate_keys: npt.NDArray[np.int64] = field(default_factory=_no_ids)  # [c]
    candidates: npt.NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))  # [c]

    @classmethod
    def of(cls, arrays: freshet_table.Delta) -> TableDelta:
        """As the compiled table exports it."""
        keys, weights, state, last_update_us, counts, candidate_keys, candidates, tombstones = arrays
        return cls(keys, weights, state, tombstones, last_update_us, counts, candidate_keys, candidates)
