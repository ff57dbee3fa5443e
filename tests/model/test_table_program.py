"""Any program of table operations against a dictionary, with consumers that fail, snapshots and restores in between."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from model.table import OPTIMIZERS, EmbeddingTable, Events
from model.table_snapshot import load_snapshot, save_snapshot
from tests.model.table_model import EXTREME, DictTable, assert_same_table, int64

DIM = 3
SECOND = 1_000_000
Settings = st.SearchStrategy[dict[str, Any]]
COUNTERS = (
    "inserted", "upserted", "updated", "erased", "expired", "expired_candidates", "evicted", "refused_admission",
    "refused_full", "refused_batches",
)  # fmt: skip
KEYS = st.one_of(st.integers(-6, 6), st.sampled_from(EXTREME), st.integers(0, 9).map(lambda i: i << 40))
BATCH = st.lists(KEYS, max_size=10)
TIMES = st.one_of(st.just(0), st.integers(1, 60 * SECOND), st.integers(1, 9).map(lambda hours: hours * 3600 * SECOND))
SEEDS = st.integers(0, 2**32 - 1)
ADMISSION: Settings = st.one_of(
    st.just({}),
    st.integers(2, 4).map(lambda n: {"admission_threshold": n}),
    st.just({"admission_probability": 0.5}),
)
EXPIRY: Settings = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {
            "ttl_us": st.sampled_from([10 * SECOND, 7200 * SECOND]),
            "ttl_on_access": st.booleans(),
            "min_rows": st.sampled_from([0, 3]),
            "sweep_steps": st.integers(1, 3),
        }
    ),
)
BOUND: Settings = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {
            "max_rows": st.integers(1, 8),
            "when_full": st.sampled_from(["refuse", "evict_stalest", "evict_rarest"]),
        }
    ),
)


class Program(RuleBasedStateMachine):
    @initialize(
        optimizer=st.sampled_from(OPTIMIZERS),
        admission=ADMISSION,
        expiry=EXPIRY,
        bound=BOUND,
        accumulator=st.booleans(),
    )
    def begin(self, optimizer: str, admission: dict, expiry: dict, bound: dict, accumulator: bool) -> None:
        self.settings = {"slot": "item", "dim": DIM, "optimizer": optimizer, **admission, **expiry, **bound}
        if accumulator or optimizer == "ftrl":
            self.settings["initial_accumulator"] = 0.5
        self.folder = Path(tempfile.mkdtemp())
        self.table = self.make()
        self.model = DictTable(self.settings)
        self.replicas: dict[str, EmbeddingTable] = {}
        self.snapshots = 0

    def make(self, shards: int = 16) -> EmbeddingTable:
        return EmbeddingTable(**self.settings, shards=shards)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            for name in self.replicas:
                self.sync(name, "acknowledged")
            shutil.rmtree(self.folder)

    @invariant()
    def the_table_is_the_dictionary(self) -> None:
        if hasattr(self, "table"):
            self.model.check(self.table)

    @rule(keys=BATCH, missing=st.sampled_from(["initial", "zeros"]))
    def lookup(self, keys: list[int], missing: str) -> None:
        expected = np.array([self.model.lookup(key, missing) for key in keys], np.float32).reshape(-1, DIM)
        assert self.table.lookup(int64(*keys), missing).numpy().tobytes() == expected.tobytes()

    @rule(keys=BATCH)
    def find_or_insert(self, keys: list[int]) -> None:
        self.model.find_or_insert(keys)
        rows = self.table.find_or_insert(int64(*keys)).numpy()
        assert all((row == self.model.lookup(key)).all() for key, row in zip(keys, rows, strict=True))

    @rule(keys=BATCH, seed=SEEDS, now_us=TIMES, lr=st.sampled_from([0.0625, 0.03, 1.0]))
    def apply_gradients(self, keys: list[int], seed: int, now_us: int, lr: float) -> None:
        grads = np.random.default_rng(seed).normal(size=(len(keys), DIM)).astype(np.float32)
        before = self.model.counts.get("updated", 0)
        self.model.apply_gradients(keys, grads, lr, now_us)
        updated = self.table.apply_gradients(int64(*keys), grads, lr, now_us)
        assert updated == self.model.counts.get("updated", 0) - before

    @rule(
        first=BATCH,
        bag_sizes=st.lists(st.integers(0, 3), max_size=4),
        seed=SEEDS,
        now_us=TIMES,
        mean=st.booleans(),
        with_events=st.booleans(),
    )
    def train(
        self, first: list[int], bag_sizes: list[int], seed: int, now_us: int, mean: bool, with_events: bool
    ) -> None:
        """A forward (some ids may be no events), a pooled forward, one backward and a step, as a module does it."""
        random = np.random.default_rng(seed)
        bags = [random.integers(-6, 6, size).tolist() for size in bag_sizes]
        events = [(int(random.integers(0, 3)), int(random.integers(0, 9 * 3600 * SECOND))) for _ in first]
        given = Events(np.array([n for n, _ in events], np.uint32), int64(*(us for _, us in events)))
        rows = self.table(torch.tensor(first, dtype=torch.int64), events=given if with_events else None)
        offsets = torch.tensor([0, *np.cumsum(bag_sizes)], dtype=torch.int64)
        members = [key for bag in bags for key in bag]
        pooled = self.table(torch.tensor(members, dtype=torch.int64), offsets, "mean" if mean else "sum")
        for bag, out in zip(bags, pooled.detach().numpy(), strict=True):
            total = np.zeros(DIM, np.float32)
            for key in bag:
                total = total + self.model.lookup(key)
            np.testing.assert_allclose(out, total / len(bag) if mean and bag else total, rtol=1e-6, atol=1e-7)
        grads = [torch.from_numpy(random.normal(size=tuple(t.shape)).astype(np.float32)) for t in (rows, pooled)]
        torch.autograd.backward([rows, pooled], grads)
        shares = [np.float32(1 / len(bag) if mean else 1) for bag in bags for _ in bag]
        of_bag = [grads[1][b].numpy() for b, bag in enumerate(bags) for _ in bag]
        scaled = [share * g for share, g in zip(shares, of_bag, strict=True)]
        all_grads = np.array([*grads[0].numpy(), *scaled], np.float32).reshape(-1, DIM)
        pooled_events = [(1, now_us)] * len(members)
        all_events = (events if with_events else [(1, now_us)] * len(first)) + pooled_events
        reads = (first + members, [us if n else 0 for n, us in all_events])
        self.model.apply_gradients(first + members, all_grads, 0.05, now_us, all_events, reads)
        self.table.step(now_us=now_us)

    @rule(keys=BATCH, seed=SEEDS, with_state=st.booleans())
    def upsert(self, keys: list[int], seed: int, with_state: bool) -> None:
        random = np.random.default_rng(seed)
        weights = random.normal(size=(len(keys), DIM)).astype(np.float32)
        state = random.random((len(keys), self.table.state_dim)).astype(np.float32) if with_state else None
        times = random.integers(0, 90 * SECOND, len(keys))
        self.table.upsert(int64(*keys), weights, state, times)
        self.model.upsert(keys, weights, state, times.tolist())

    @rule(keys=BATCH)
    def erase(self, keys: list[int]) -> None:
        assert self.table.erase(int64(*keys)) == len(self.model.rows.keys() & set(keys))
        for key in keys:
            self.model.remove(key, "erased")

    @rule(before_us=TIMES)
    def expire(self, before_us: int) -> None:
        before = -(-before_us // SECOND)
        self.table.expire(before_us)
        self.model.expire(before, max(self.model.clock, before))

    @rule(first=st.integers(-(2**62), 2**62), count=st.integers(1, 200))
    def grow(self, first: int, count: int) -> None:
        keys = list(range(first, first + count))
        weights = np.full((count, DIM), 0.5, np.float32)
        self.table.upsert(int64(*keys), weights)
        self.model.upsert(keys, weights, None, [0] * count)

    @rule(keys=st.lists(KEYS, min_size=1, max_size=5), bad=st.sampled_from([np.nan, np.inf, -np.inf, 1e20]))
    def refuse(self, keys: list[int], bad: float) -> None:
        grads = np.ones((len(keys), DIM), np.float32)
        grads[-1, 1] = bad
        self.model.count("refused_batches")
        try:
            self.table.apply_gradients(int64(*keys), grads)
        except ValueError as error:
            assert "nothing was changed" in str(error)
        else:
            raise AssertionError("a gradient that is not finite was taken")

    @rule(name=st.sampled_from(["server", "backup"]))
    def subscribe(self, name: str) -> None:
        if name not in self.replicas:
            self.replicas[name] = self.make()
            self.table.consumers.subscribe(name)
            self.model.epoch = self.table.epoch()

    @rule(name=st.sampled_from(["server", "backup"]), end=st.sampled_from(["lost", "applied", "acknowledged"]))
    def sync(self, name: str, end: str) -> None:
        """The consumer dies before it has applied the delta, or before it acknowledges, or not at all."""
        if name not in self.replicas:
            return
        with self.table.consumers.held() as (cursors, newcomers):
            since, new = cursors[name], name in newcomers
        delta, epoch = self.table.consumers.export(name)
        self.model.check_delta(delta, 0 if new else since)
        assert delta.tombstones.tolist() == self.model.gone(since)
        self.model.epoch = self.table.epoch()
        if end != "lost":
            self.replicas[name].apply_delta(delta)
        if end == "acknowledged":
            self.table.consumers.acknowledge(name, epoch)
            assert_same_table(self.replicas[name], self.table)

    @rule(shards=st.sampled_from([1, 2, 16, 64]))
    def restart(self, shards: int) -> None:
        """The trainer dies after a snapshot; another one goes on."""
        self.snapshots += 1
        save_snapshot(self.table, self.folder / str(self.snapshots))
        self.table = load_snapshot(self.folder / str(self.snapshots), lambda: self.make(shards))
        self.model.counts = {name: value for name, value in self.table.stats().items() if name in COUNTERS}


TestProgram = Program.TestCase
TestProgram.settings = settings(
    max_examples=100, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
)
