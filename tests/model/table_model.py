"""What an embedding table should be: a dictionary, with every rule written out one id at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from model.table import EmbeddingTable, slot_hash
from model.table_delta import TableDelta

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
INT64 = np.iinfo(np.int64)
EXTREME = (0, -1, 1, INT64.min, INT64.max, INT64.min + 1, 2**62, -(2**62))
F = np.float32


def int64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def hash_id(key: int) -> int:
    return mix64((key + GOLDEN) & MASK)


def id_of_hash(wanted: int) -> int:
    """The id with that hash: mix64 backwards."""
    x = unshift(wanted, 31) * pow(0x94D049BB133111EB, -1, MASK + 1) & MASK
    x = unshift(x, 27) * pow(0xBF58476D1CE4E5B9, -1, MASK + 1) & MASK
    key = (unshift(x, 30) - GOLDEN) & MASK
    return key - (MASK + 1) if key > MASK // 2 else key


def unshift(mixed: int, bits: int) -> int:
    """The x with x ^ (x >> bits) == mixed."""
    x = mixed
    while x ^ (x >> bits) != mixed:
        x = mixed ^ (x >> bits)
    return x


def table_key(seed: int, slot: str) -> int:
    return mix64(mix64((seed + GOLDEN) & MASK) ^ slot_hash(slot))


def initial_weights(seed: int, slot: str, key: int, dim: int, scale: float) -> np.ndarray:
    row_key = mix64(table_key(seed, slot) ^ hash_id(key))
    draws = [mix64((row_key + (j + 1) * GOLDEN) & MASK) >> 40 for j in range(dim)]
    return np.array([(2 * k + 1 - 2**24) / 2**24 for k in draws], F) * F(scale)


def initial_state(optimizer: str, dim: int, accumulator: float) -> np.ndarray:
    sums, zeros = np.full(dim, accumulator, F), np.zeros(dim, F)
    return {
        "sgd": np.zeros(0, F),
        "adagrad": sums,
        "rowwise_adagrad": sums[:1],
        "adam": np.zeros(2 * dim + 1, F),
        "ftrl": np.concatenate([zeros, sums]),
    }[optimizer].copy()


def update(optimizer: str, w: np.ndarray, s: np.ndarray, g: np.ndarray, lr: float) -> None:
    """One step of the optimiser with its default settings, in float32, in place."""
    dim, rate = len(w), F(lr)
    if optimizer == "sgd":
        w -= rate * g
    elif optimizer == "adagrad":
        s += g * g
        w -= rate * (g / (np.sqrt(s) + F(1e-10)))
    elif optimizer == "rowwise_adagrad":
        s += F(sum(float(x) * float(x) for x in g) / dim)
        w -= rate * (g / (np.sqrt(s) + F(1e-10)))
    elif optimizer == "adam":
        b1, b2, m, v = F(0.9), F(0.999), s[:dim], s[dim : 2 * dim]
        s[-1] += 1
        m[:] = b1 * m + (1 - b1) * g
        v[:] = b2 * v + (1 - b2) * g * g
        c1, c2 = (F(1.0 - _power(float(b), int(s[-1]))) for b in (b1, b2))
        w -= rate * (m / c1) / (np.sqrt(v / c2) + F(1e-8))
    else:
        z, n = s[:dim], s[dim:]
        n += g * g
        r = (1 + np.sqrt(n)) / rate
        z[:] = g + np.where(w == 0, z, -r * w)
        w[:] = -z / r


def _power(base: float, n: int) -> float:
    result = 1.0
    while n:
        result, base, n = result * base if n & 1 else result, base * base, n >> 1
    return result


def column(delta: TableDelta, name: str) -> np.ndarray:
    """A column that every export has."""
    values = getattr(delta, name)
    assert isinstance(values, np.ndarray)
    return values


def seconds(us: int) -> int:
    return -(-us // 1_000_000)


def hour_of(s: int) -> int:
    """Of fewer than 2^16 hours; 0 = unknown."""
    return max(1, s // 3600) if s else 0


@dataclass
class Row:
    weights: np.ndarray
    state: np.ndarray
    seen: int = 0  # seconds
    count: int = 0
    changed: int = 0  # epoch


@dataclass
class Candidate:
    count: int = 0
    hour: int = 0
    changed: int = 0

    def word(self) -> int:
        return self.hour % 2**16 << 16 | self.count


@dataclass
class DictTable:
    """A table of fewer than 2,048 rows with these settings of EmbeddingTable."""

    settings: dict[str, Any]
    rows: dict[int, Row] = field(default_factory=dict)
    candidates: dict[int, Candidate] = field(default_factory=dict)
    tombstones: dict[int, int] = field(default_factory=dict)  # key -> epoch of its last erasure
    epoch: int = 1
    clock: int = 0
    updates: int = 0
    sweep_at: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # as in stats

    def get(self, name: str, default: Any) -> Any:
        return self.settings.get(name, default)

    def count(self, name: str, more: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + more

    def fresh(self, key: int) -> Row:
        s, optimizer = self.settings, self.get("optimizer", "adagrad")
        weights = initial_weights(self.get("seed", 0), s["slot"], key, s["dim"], self.get("init_scale", 0.05))
        return Row(weights, initial_state(optimizer, s["dim"], self.get("initial_accumulator", 0.0)))

    def lookup(self, key: int, missing: str = "initial") -> np.ndarray:
        if key in self.rows:
            return self.rows[key].weights
        return self.fresh(key).weights if missing == "initial" else np.zeros(self.settings["dim"], F)

    # Writing

    def insert(self, key: int) -> Row:
        row = self.fresh(key)
        row.changed = self.epoch
        if (candidate := self.candidates.pop(key, None)) is not None:
            row.count = candidate.count
        self.rows[key] = row
        self.count("inserted")
        return row

    def find_or_insert(self, keys: list[int]) -> None:
        for key in keys:
            if key not in self.rows:
                self.insert(key)

    def upsert(self, keys: list[int], weights: np.ndarray, state: np.ndarray | None, times_us: list[int]) -> None:
        for i, key in enumerate(keys):
            row = self.rows.get(key) or self.insert(key)
            row.weights = weights[i].copy()
            row.state = self.fresh(key).state if state is None else state[i].copy()
            row.seen, row.count, row.changed = seconds(times_us[i]), 0, self.epoch
        self.count("upserted", len(keys))

    def apply_gradients(
        self,
        keys: list[int],
        grads: np.ndarray,
        lr: float,
        now_us: int,
        events: list[tuple[int, int]] | None = None,
        reads: tuple[list[int], list[int]] = ([], []),
    ) -> None:
        """events: of each key, how many and the time of the newest; None: one at now_us. reads: as for `touch`."""
        now = seconds(now_us)
        events = events or [(1, now_us)] * len(keys)
        many = {key: sum(n for k, (n, _) in zip(keys, events, strict=True) if k == key) for key in keys}
        seen = dict.fromkeys(keys, 0)
        for key, (n, us) in zip(keys, events, strict=True):
            seen[key] = max(seen[key], seconds(us)) if n else seen[key]
        sums: dict[int, np.ndarray] = {}
        for key, g in zip(keys, grads, strict=True):
            sums[key] = sums[key] + g if key in sums else g.copy()
        newcomers = [key for key in sums if key not in self.rows]
        for key in newcomers:
            self.admit(key, many[key], seen[key])
            if not many[key]:
                seen[key] = now  # a row that no event made is as old as its first update
        for key, g in sums.items():
            if key in self.rows:
                row = self.rows[key]
                update(self.get("optimizer", "adagrad"), row.weights, row.state, g, lr)
                row.seen, row.changed = max(row.seen, seen[key]), self.epoch
                row.count = min(row.count + many[key], 2**16 - 1)
                self.count("updated")
        self.updates += 1
        self.clock = max(self.clock, now, *(seconds(us) for n, us in events if n))
        self.touch(*reads)
        self.sweep()
        self.evict()

    def admit(self, key: int, events: int, seen: int) -> None:
        threshold, probability = self.get("admission_threshold", 1), self.get("admission_probability", 1.0)
        candidate = self.candidates.get(key)
        if not events and (threshold > 1 or probability < 1 or self.get("ttl_us", 0)):
            self.count("refused_admission")
        elif threshold > 1 and (candidate.count if candidate else 0) + events < threshold:
            before = candidate or Candidate()
            self.candidates[key] = Candidate(before.count + events, max(before.hour, hour_of(seen)), self.epoch)
            self.count("refused_admission")
        elif probability < 1 and not self.lucky(key, events, probability):
            self.count("refused_admission")
        elif self.get("when_full", "refuse") == "refuse" and 0 < self.get("max_rows", 0) <= len(self.rows):
            self.count("refused_full")
        else:
            self.insert(key)

    def lucky(self, key: int, events: int, probability: float) -> bool:
        start = mix64(table_key(self.get("seed", 0), self.settings["slot"]) ^ hash_id(key))
        draw = mix64((start + self.updates * GOLDEN) & MASK)
        return (draw >> 11) / 2.0**53 < 1.0 - (1.0 - probability) ** events

    def touch(self, keys: list[int], times_us: list[int]) -> None:
        if not self.get("ttl_on_access", False):
            return
        for key, us in zip(keys, times_us, strict=True):
            if key in self.rows and self.rows[key].seen < seconds(us):
                self.rows[key].seen, self.rows[key].changed = seconds(us), self.epoch
            self.clock = max(self.clock, seconds(us))

    # Removing

    def remove(self, key: int, counter: str) -> None:
        if self.rows.pop(key, None) is not None:
            self.count(counter)
        elif self.candidates.pop(key, None) is None:
            return
        self.tombstones[key] = self.epoch

    def expire(self, before: int, now: int, hashes: range = range(2**64)) -> None:
        inside = [key for key in self.rows if hash_id(key) in hashes and 0 < self.rows[key].seen < before]
        inside.sort(key=lambda key: (self.rows[key].seen, hash_id(key)))
        for key in inside[: max(0, len(self.rows) - self.get("min_rows", 0))]:
            self.remove(key, "expired")
        for key, candidate in list(self.candidates.items()):
            age = hour_of(now) - candidate.hour
            if candidate.hour and hash_id(key) in hashes and age * 3600 > now - before + 3600:
                self.remove(key, "")
                self.count("expired_candidates")

    def sweep(self) -> None:
        ttl, steps = seconds(self.get("ttl_us", 0)), self.get("sweep_steps", 1024)
        if not 0 < ttl < self.clock:
            return
        last = min(self.sweep_at + MASK // steps, MASK)
        self.expire(self.clock - ttl, self.clock, range(self.sweep_at, last + 1))
        self.sweep_at = (last + 1) & MASK

    def evict(self) -> None:
        how, most = self.get("when_full", "refuse"), self.get("max_rows", 0)
        while how != "refuse" and most and len(self.rows) > most:

            def score(item: tuple[int, Row]) -> tuple[int, int, int]:
                rarest, stalest = item[1].count, item[1].seen
                first = (rarest, stalest) if how == "evict_rarest" else (stalest, rarest)
                return (*first, hash_id(item[0]))

            ordered = sorted(self.rows.items(), key=score)
            for key, _ in ordered[: min(len(ordered) - most, -(-len(ordered) // 8))]:
                self.remove(key, "evicted")

    # Comparing

    def check(self, table: EmbeddingTable) -> None:
        """Everything that the table shows is as it is here."""
        self.check_delta(table.export_all(), 0)
        stats = table.stats()
        assert len(table) == stats["rows"] == len(self.rows)
        assert stats["candidates"] == len(self.candidates)
        for name, value in self.counts.items():
            assert name == "" or stats[name] == value, name

    def check_delta(self, delta: TableDelta, since: int) -> None:
        keys = sorted(key for key, row in self.rows.items() if row.changed > since)
        assert delta.keys.tolist() == keys
        rows = [self.rows[key] for key in keys]
        assert column(delta, "last_update_us").tolist() == [row.seen * 1_000_000 for row in rows]
        assert column(delta, "counts").tolist() == [row.count for row in rows]
        for name in ("weights", "state"):
            expected = np.array([getattr(row, name) for row in rows], F)
            assert getattr(delta, name).tobytes() == expected.tobytes(), name
        words = dict(zip(delta.candidate_keys.tolist(), delta.candidates.tolist(), strict=True))
        assert words.items() <= {key: c.word() for key, c in self.candidates.items()}.items()
        assert words.keys() >= {key for key, c in self.candidates.items() if c.changed > since}
        assert delta.candidate_keys.tolist() == sorted(words)

    def gone(self, since: int) -> list[int]:
        return sorted(key for key, epoch in self.tombstones.items() if epoch > since and key not in self.rows)


def assert_same_table(a: EmbeddingTable, b: EmbeddingTable) -> None:
    """Rows, optimiser state, bookkeeping and candidates are equal to the bit."""
    x, y = a.export_all(), b.export_all()
    for name in ("keys", "weights", "state", "last_update_us", "counts", "candidate_keys", "candidates"):
        assert getattr(x, name).tobytes() == getattr(y, name).tobytes(), name
