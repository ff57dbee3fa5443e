"""RecTools' SASRec and HSTU on the same users, split and candidates, in a throw-away environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model.experiments.ml1m_data import Histories
from model.experiments.ml1m_train import CUTS, Metrics
from model.metrics import hit_rate, ndcg

REQUIREMENT = "rectools[torch]==0.19.*"
EPOCHS = {"hstu": 40, "sasrec": 24, "hstu-large": 2}
"""After which theirs are tested (their figures for these users are known there); the large one is timed alone."""
TIMED_ALONE = 2
PROGRAM = f"""
import json, sys, time
import pandas, torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import HSTUModel, SASRecModel

path, threads, plan = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(threads)
log = pandas.read_csv(path)
log[Columns.Datetime] = pandas.to_datetime(log["microseconds"], unit="us")
log[Columns.Weight] = 1.0
part = log["held_out"]
log = log.drop(columns=["microseconds", "held_out"])
known, tested = Dataset.construct(log[part == 0]), Dataset.construct(log[part != 1])
target = log[part == 1].set_index(Columns.User)
common = dict(n_factors=50, session_max_len=200, dropout_rate=0.2, loss="softmax", batch_size=32, lr=1e-3)
models = {{
    "hstu": lambda epochs: HSTUModel(n_blocks=2, n_heads=1, epochs=epochs, **common),
    "hstu-large": lambda epochs: HSTUModel(n_blocks=8, n_heads=2, epochs=epochs, **common),
    "sasrec": lambda epochs: SASRecModel(n_blocks=2, n_heads=1, epochs=epochs, **common),
}}


def fit(make, epochs):
    start = time.perf_counter()
    model = make(epochs).fit(known)
    return model, time.perf_counter() - start


def ranks(model):
    users = target.index.to_numpy()
    context = target.reset_index()[[Columns.User, Columns.Datetime]]
    context = context if model.require_recommend_context else None
    found = model.recommend(users, tested, k={max(CUTS)}, filter_viewed=True, context=context)
    found = found[found[Columns.Item].to_numpy() == target.loc[found[Columns.User], Columns.Item].to_numpy()]
    rank = dict(zip(found[Columns.User].tolist(), found[Columns.Rank].tolist()))
    return [rank.get(user, {max(CUTS) + 1}) for user in users.tolist()]


for name, epochs in plan.items():
    one = fit(models[name], 1)[1]
    model, all_of_them = fit(models[name], epochs)
    row = {{"name": name, "seconds": (all_of_them - one) / (epochs - 1)}}
    print(json.dumps(row | ({{}} if epochs == {TIMED_ALONE} else {{"ranks": ranks(model)}})), flush=True)
"""
"""Runs in the other environment, where nothing of this repository is. Set-up is out of an epoch's time."""


@dataclass(frozen=True)
class Peer:
    """What one of their models did: seconds per epoch; test metrics after `epochs`, none where it was timed alone."""

    seconds: float
    epochs: int
    test: Metrics | None


def measure(data: Histories, folder: Path, threads: int, names: Iterable[str]) -> dict[str, Peer]:
    """By the name of our config of the same size, for those names that RecTools has a model for.

    As in our test, the validation item is in the history, the target's time is known to HSTU, and the candidates are
    the catalogue minus the user's training and validation items. Installs RecTools and the same torch as ours under
    `folder` once (about 2 GB). What was measured is kept there and read the next time.
    """
    return {name: _peer(data, folder, threads, name) for name in names if name in EPOCHS}


def _peer(data: Histories, folder: Path, threads: int, name: str) -> Peer:
    known = folder / f"rectools-{name}-{EPOCHS[name]}-threads{threads}.json"
    if not known.exists():
        python = _environment(folder / "rectools")
        log = folder / "rectools-log.csv"
        write_log(data, log)
        variables = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        command = [str(python), "-c", PROGRAM, str(log), str(threads), json.dumps({name: EPOCHS[name]})]
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
        known.write_text(next(line for line in done.stdout.splitlines() if line.startswith('{"name"')))
    return read_peer(known, EPOCHS[name])


def read_peer(path: Path, epochs: int) -> Peer:
    """What the other environment printed for one model."""
    row = json.loads(path.read_text())
    if "ranks" not in row:
        return Peer(row["seconds"], epochs, None)
    ranks = np.asarray(row["ranks"])
    test = {f"{n}@{k}": metric(ranks, k) for n, metric in (("hr", hit_rate), ("ndcg", ndcg)) for k in CUTS}
    return Peer(row["seconds"], epochs, test)


def write_log(data: Histories, path: Path) -> None:
    """CSV user_id, item_id, microseconds, held_out: 0 = our models train on it, 2 = validation, 1 = test.

    A microsecond tells equal times apart, in our order.
    """
    counts = [len(items) for items in data.items]
    columns = (
        np.repeat(np.arange(len(data)), counts),
        np.concatenate(data.items),
        np.concatenate([times * 1_000_000 + np.arange(len(times)) for times in data.times]),
        np.concatenate([np.r_[np.zeros(count - 2, np.int64), 2, 1] for count in counts]),
    )
    header = "user_id,item_id,microseconds,held_out"
    np.savetxt(path, np.stack(columns, 1), fmt="%d", delimiter=",", header=header, comments="")


def _environment(folder: Path) -> Path:
    """The interpreter of an environment that has RecTools; an unfinished one is made anew."""
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        same_torch = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([python, "-m", "pip", "install", "-q", same_torch, REQUIREMENT], check=True, stdout=sys.stderr)
        done.touch()
    return python
