"""A toy world for the server: items of four categories, users who click on one category, a model that learned it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import torch
import uvicorn

from components.parameters import bridge
from components.parameters.reader import LogReader
from components.parameters.writer import LogWriter
from components.rollout import record
from components.rollout.state import Release, RolloutState
from components.schemas import ACTION_EVENTS, IMPRESSIONS, ITEMS
from components.serve.app import create_app
from components.serve.config import ServeConfig
from components.serve.server import Server
from components.serve.user import build_events, split_by_user
from components.storage import Storage
from infra.local.services import free_port
from model.catalogue import ItemCatalogue
from model.dataset import SequenceDataset
from model.inputs import EVENT_DTYPES, UserEvents
from model.ranker import Ranker, RankerConfig
from model.retriever import Retriever, RetrieverConfig
from model.trainer import Trainer

CATEGORIES, PER_CATEGORY = 4, 15
ITEM_IDS = [1001 + i for i in range(CATEGORIES * PER_CATEGORY)]
HOUR_US = 3_600_000_000
START_US = 1_750_000_000_000_000
SMALL: dict[str, Any] = {
    "dim": 16, "layers": 2, "attention_heads": 1, "head_dim": 16, "window": 64, "positions": 0, "time_bias": False,
    "hour_of_day": False, "slots": "category", "dropout": 0.0, "input_dropout": 0.0, "init_scale": 0.2, "epochs": 12,
    "batch_tokens": 256, "continual_batch_tokens": 256, "dense_lr": 0.01, "table_lr": 0.3, "table_accumulator": 0.1,
    "clip_norm": 2.0, "normaliser": 8.0,
}  # fmt: skip
RANKER = RankerConfig(**SMALL, heads="click,like", bias_slots="item,user")
RETRIEVER = RetrieverConfig(**SMALL)


def category(item_id: int) -> int:
    """1..CATEGORIES."""
    return 1 + (item_id - ITEM_IDS[0]) // PER_CATEGORY


def items_of(wanted: int) -> list[int]:
    return [item for item in ITEM_IDS if category(item) == wanted]


def item_rows(item_ids: list[int] = ITEM_IDS, **fixed: Any) -> pa.Table:
    rows = [{"item_id": i, "author_id": 0, "category": category(i), "duration_s": 10.0} | fixed for i in item_ids]
    return pa.Table.from_pylist(rows, ITEMS)


def catalogue() -> ItemCatalogue:
    return ItemCatalogue.from_table(item_rows())


def sessions(users: range, start_us: int, requests: int = 8, seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """Impressions and clicks: user u clicks on items of category 1 + u % CATEGORIES, and on nothing else."""
    random = np.random.default_rng(seed)
    shown, acted = [], []
    for user in users:
        for request in range(requests):
            time_us = start_us + request * 60_000_000 + user * 1000
            for position, item in enumerate(random.choice(ITEM_IDS, 5, replace=False).tolist()):
                key = {"request_id": time_us, "user_id": user, "item_id": item}
                shown.append({**key, "timestamp": time_us, "received_at": time_us, "position": position, "page": 0})
                if category(item) == 1 + user % CATEGORIES:
                    later = time_us + 5_000_000
                    acted.append({**key, "timestamp": later, "received_at": later, "action": "click"})
    return pa.Table.from_pylist(shown, IMPRESSIONS), pa.Table.from_pylist(acted, ACTION_EVENTS)


def dataset(impressions: pa.Table, actions: pa.Table) -> SequenceDataset:
    users = [build_events(user, rows, HOUR_US) for user, rows in split_by_user(impressions, actions)]
    columns = {f.name: [getattr(u, f.name) for u in users] for f in fields(UserEvents)}
    kinds = {name: pa.list_(pa.from_numpy_dtype(dtype)) for name, dtype in EVENT_DTYPES.items()}
    return SequenceDataset(pa.table({name: pa.array(values, kinds.get(name)) for name, values in columns.items()}))


def build(name: str) -> Ranker | Retriever:
    return Ranker(RANKER, catalogue()) if name == "ranker" else Retriever(RETRIEVER, catalogue())


def make_store(root: Path) -> Storage:
    """A store with items, a trained ranker 1 and retriever 1, and the release of both as champion."""
    torch.set_num_threads(1)
    storage = Storage(f"file://{root}")
    storage.write_table("items/toy.parquet", item_rows())
    impressions, actions = sessions(range(80), START_US)
    data = dataset(impressions, actions)
    for name in ("ranker", "retriever"):
        model = build(name)
        trainer = Trainer(model)
        trainer.fit(data)
        publish(storage, name, 1, model, trainer)
    release(storage, champion=Release(ranker=1, retriever=1), stage="promoted")
    return storage


def publish(storage: Storage, name: str, version: int, model: Any, trainer: Trainer) -> None:
    """The trained model as snapshot 0 of a version."""
    LogWriter(storage, name, version).publish_snapshot(
        0, bridge.export_all(trainer), config=model.config.model_dump(), event_range=(START_US, START_US + 1)
    )


def train_delta(storage: Storage, name: str, version: int = 1, users: range = range(20)) -> Any:
    """One step of continual training on fresh events, committed as the next delta; returns the trained model."""
    reader = LogReader(storage, name, version)
    model = build(name)
    trainer = Trainer(model)
    bridge.load_into(trainer, reader.load(with_state=True))
    since, n = bridge.close_epochs(trainer), reader.head() + 1
    trainer.fit(dataset(*sessions(users, START_US + n * HOUR_US, requests=3, seed=n)), continual=True)
    newest = now_us() - 1_000_000
    LogWriter(storage, name, version).publish_delta(
        n, bridge.export_changes(trainer, since, n), windows=[], event_range=(newest - 1, newest), metrics={}
    )
    return model


def release(storage: Storage, **state: Any) -> RolloutState:
    """Append to the rollout record."""
    entry = RolloutState(seq=record.current(storage).seq + 1, **state)
    record.append(storage, entry)
    return entry


class Process:
    """A real server process."""

    def __init__(self, root: Path, port: int, *options: str) -> None:
        command = [sys.executable, "-m", "components.serve", f"--root=file://{root}", f"--port={port}"]
        self.log = root.parent / f"serve-{port}.log"
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                [*command, "--sync-interval-s=0.1", *options],
                stdout=out,
                stderr=out,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def wait_ready(self) -> Process:
        wait_for(lambda: self.answers("/readyz") == 200, explain=lambda: self.log.read_text())
        return self

    def answers(self, path: str) -> int | None:
        assert self.process.poll() is None, f"the server ended: {self.log.read_text()}"
        try:
            return self.client.get(path).status_code
        except httpx.TransportError:
            return None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def serving(root: Path, port: int, *options: str) -> Iterator[Process]:
    server = Process(root, port, *options)
    try:
        yield server.wait_ready()
    finally:
        if server.process.poll() is None:
            server.kill()
        server.client.close()


def wait_for(condition: Any, explain: Any = lambda: "") -> None:
    """Far longer than it takes, so that only what never comes fails, on a busy machine too."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, f"not within two minutes. {explain()}"
        time.sleep(0.05)


class Live:
    """A server in this process, on a real socket, so that a test can look inside."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.port = free_port()
        settings = {"sync_interval_s": 0.1, "flush_interval_s": 0.5, "exploration": 0.0} | options
        self.server = Server(ServeConfig(root=f"file://{root}", port=self.port, **settings))
        self.storage = self.server.storage
        config = uvicorn.Config(create_app(self.server), port=self.port, log_config=None, access_log=False)
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def __enter__(self) -> Live:
        self._thread.start()
        wait_for(lambda: self._uvicorn.started and self.server.engine.tracks is not None)
        return self

    def __exit__(self, *_: object) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()
        self.client.close()

    def recommend(self, user_id: int, **body: Any) -> dict[str, Any]:
        return answer(self.client.post("/v1/recommend", json={"user_id": user_id, **body}))

    def rank(self, user_id: int, candidates: list[int], **body: Any) -> dict[str, Any]:
        return answer(self.client.post("/v1/rank", json={"user_id": user_id, "candidates": candidates, **body}))

    def events(self, **body: Any) -> dict[str, Any]:
        return answer(self.client.post("/v1/events", json=body))

    def status(self) -> dict[str, Any]:
        return answer(self.client.get("/v1/status"))

    def seq(self) -> int:
        """The rollout record that the server follows."""
        tracks = self.server.engine.tracks
        return -1 if tracks is None else tracks.state.seq

    def metric(self, sample: str) -> float:
        """The value of one sample as written in /metrics, e.g. 'x_total{a="b"}'; 0 when it is not there."""
        lines = (line.rpartition(" ") for line in self.client.get("/metrics").text.splitlines())
        return next((float(value) for name, _, value in lines if name == sample), 0.0)

    def wait_for_delta(self, n: int, model: str = "ranker") -> None:
        wait_for(lambda: self.status()["tracks"]["champion"][model]["delta"] == n, explain=self.status)


def answer(response: httpx.Response) -> dict[str, Any]:
    assert response.is_success, response.text
    return dict(response.json())


def now_us() -> int:
    return time.time_ns() // 1000


def clicks(user_id: int, item_ids: list[int], request_id: int) -> dict[str, list[dict[str, Any]]]:
    """The body of five impressions of one request, each clicked."""
    now = now_us()
    keys = [{"request_id": request_id, "user_id": user_id, "item_id": item} for item in item_ids]
    return {
        "impressions": [key | {"timestamp_us": now - 1000, "position": i} for i, key in enumerate(keys)],
        "actions": [key | {"timestamp_us": now, "action": "click"} for key in keys],
    }


def shown(served: dict[str, Any], page: int = 0) -> list[dict[str, Any]]:
    """Impressions as a client logs them, from an answer."""
    common = {
        "request_id": served["request_id"], "user_id": served["user_id"], "timestamp_us": served["timestamp_us"],
        "version": served["version"], "delta": served["delta"], "track": served["track"], "page": page,
    }  # fmt: skip
    return [
        common | {"item_id": item["item_id"], "position": item["position"], "score": item["score"]}
        for item in served["items"]
    ]


def read_log(storage: Storage, prefix: str) -> list[dict[str, Any]]:
    """All rows below a folder, times as int microseconds."""
    rows = []
    for path in storage.list(prefix):
        if not path.endswith(".parquet"):
            continue
        table = storage.read_table(path)
        for i, field in enumerate(table.schema):
            if pa.types.is_timestamp(field.type):
                table = table.set_column(i, field.name, table[field.name].cast(pa.int64()))
        rows += table.to_pylist()
    return rows
