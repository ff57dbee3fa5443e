"""Seconds per epoch of RecTools' SASRec and HSTU on the same training data, in a throw-away environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from model.experiments.ml1m_data import Histories

REQUIREMENT = "rectools[torch]==0.19.*"
PROGRAM = """
import json, sys, time
import pandas, torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import HSTUModel, SASRecModel

torch.set_num_threads(int(sys.argv[2]))
log = pandas.read_csv(sys.argv[1])
log[Columns.Datetime] = pandas.to_datetime(log["seconds"], unit="s")
log[Columns.Weight] = 1.0
data = Dataset.construct(log.drop(columns="seconds"))
common = dict(n_factors=50, session_max_len=200, dropout_rate=0.2, loss="softmax", batch_size=32, lr=1e-3)
models = {
    "hstu": lambda epochs: HSTUModel(n_blocks=2, n_heads=1, epochs=epochs, **common),
    "hstu-large": lambda epochs: HSTUModel(n_blocks=8, n_heads=2, epochs=epochs, **common),
    "sasrec": lambda epochs: SASRecModel(n_blocks=2, n_heads=1, epochs=epochs, **common),
}


def fit(make, epochs):
    start = time.perf_counter()
    make(epochs).fit(data)
    return time.perf_counter() - start


for name in sys.argv[3].split(","):
    if name in models:
        print(json.dumps({name: fit(models[name], 2) - fit(models[name], 1)}), flush=True)
"""
"""Runs in the other environment, where nothing of this repository is: two epochs minus one, so that set-up is out."""


def seconds_per_epoch(data: Histories, folder: Path, threads: int, names: Iterable[str]) -> dict[str, float]:
    """By the name of our config of the same size, for those names that RecTools has a model for.

    Installs RecTools and the same torch as ours under `folder` once (about 2 GB).
    """
    python = _environment(folder / "rectools")
    log = folder / "rectools-train.csv"
    write_training_log(data, log)
    variables = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), "-c", PROGRAM, str(log), str(threads), ",".join(names)]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


def write_training_log(data: Histories, path: Path) -> None:
    """CSV user_id, item_id, seconds: what our models train on, in time order."""
    counts = [len(items) - 2 for items in data.items]
    columns = (
        np.repeat(np.arange(len(data)), counts),
        np.concatenate([items[:-2] for items in data.items]),
        np.concatenate([times[:-2] for times in data.times]),
    )
    np.savetxt(path, np.stack(columns, 1), fmt="%d", delimiter=",", header="user_id,item_id,seconds", comments="")


def _environment(folder: Path) -> Path:
    """The interpreter of an environment that has RecTools; an unfinished one is made anew."""
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        same_torch = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([python, "-m", "pip", "install", "-q", same_torch, REQUIREMENT], check=True, stdout=sys.stderr)
        done.touch()
    return python
