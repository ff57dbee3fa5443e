"""RecTools' SASRec and HSTU on the same users, split, candidates and stopping rule, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from model.experiments.ml1m_data import Histories
from model.experiments.ml1m_rectools_program import TEST, TRAINING, VALIDATION
from model.experiments.ml1m_train import CUTS, Metrics, RunConfig, RunResult, conditions
from model.metrics import hit_rate, ndcg

REQUIREMENT = "rectools[torch]==0.19.*"
NAMES = ("hstu", "hstu-large", "sasrec")
"""Those of our configs that RecTools has a model for."""
PROGRAM = Path(__file__).with_name("ml1m_rectools_program.py")


def measure(data: Histories, configs: Mapping[str, RunConfig], folder: Path, threads: int) -> dict[str, RunResult]:
    """Results by name for those of our configs (by name) that RecTools has a model for, trained with their settings.

    As in our test, the validation item is in the history, the target's time is known to HSTU, and the candidates are
    the catalogue minus the user's training and validation items. Theirs know the items among the newest max_length + 1
    training items of any user; another target counts as missed. Installs RecTools and the same torch as ours under
    `folder` once (about 2 GB). Logs and weights lie there, too: what is finished is read, and what is not goes on
    after its last epoch.
    """
    return {name: _result(data, config, folder, name, threads) for name, config in configs.items() if name in NAMES}


def _result(data: Histories, config: RunConfig, folder: Path, name: str, threads: int) -> RunResult:
    log, weights = folder / f"rectools-{name}.jsonl", folder / f"rectools-{name}.pt"
    settings = their_settings(config) | conditions(data, threads)
    if not resume(log, settings):
        weights.unlink(missing_ok=True)
    if not _finished(log):
        ratings = folder / "rectools-ratings.csv"
        write_ratings(data, ratings)
        variables = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        command = [str(_environment(folder / "rectools")), "-W", "ignore", str(PROGRAM)]
        command += [str(ratings), str(log), str(weights), json.dumps(settings), str(threads)]
        subprocess.run(command, env=variables, check=True, stdout=sys.stderr)
    return read_result(log, data, config)


def their_settings(config: RunConfig) -> dict:
    """What the program is given: `arguments` of their model, and when to stop."""
    ours = config.network(1)
    arguments: dict = {"n_factors": ours.dim, "n_blocks": ours.layers, "n_heads": ours.heads}
    arguments |= {"session_max_len": ours.max_length, "dropout_rate": ours.dropout}
    arguments |= {"loss": "softmax", "batch_size": config.batch_users, "lr": config.lr}
    if ours.encoder == "hstu":
        # Its scores are cosines, divided by 1 unless told otherwise: too flat a softmax over thousands of items to
        # learn from. Its authors' tutorial sets .05, too.
        arguments["lightning_module_kwargs"] = {"logits_t": ours.temperature}
    stop = {"epochs": config.epochs, "patience": config.patience, "seed": config.seed}
    return {"encoder": ours.encoder, "arguments": arguments} | stop


def resume(log: Path, settings: dict) -> bool:
    """Whether the log is one of these settings. It is begun anew if not; if it is, a torn last line is cut off."""
    lines = log.read_text().splitlines() if log.exists() else []
    first = json.dumps({"settings": settings})
    same = lines[:1] == [first]
    whole = [line for line in lines if line.endswith("}")] if same else [first]
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(line + "\n" for line in whole))
    return same


def _finished(log: Path) -> bool:
    return "parameters" in json.loads(log.read_text().splitlines()[-1])


def read_result(log: Path, data: Histories, config: RunConfig) -> RunResult:
    """What a finished log tells, its ranks turned into our metrics."""
    *rows, last = [json.loads(line) for line in log.read_text().splitlines()][1:]
    epochs = {row["epoch"]: row for row in rows}  # one that was interrupted is there twice, and the later counts
    best = max(epochs.values(), key=lambda row: row["score"])
    seconds = float(np.median([row["seconds"] for row in epochs.values()]))
    longest = config.network(1).max_length
    return RunResult(
        best_epoch=best["epoch"],
        epochs=len(epochs),
        seconds_per_epoch=seconds,
        events_per_second=sum(min(len(items) - 3, longest) for items in data.items) / seconds,
        parameters=last["parameters"],
        validation=metrics(best["validation"]),
        test=metrics(best["test"]),
    )


def metrics(ranks: list[int]) -> Metrics:
    """hr@k and ndcg@k of ranks that begin at 1."""
    found = np.asarray(ranks)
    return {f"{name}@{k}": measured(found, k) for name, measured in (("hr", hit_rate), ("ndcg", ndcg)) for k in CUTS}


def write_ratings(data: Histories, path: Path) -> None:
    """CSV user_id, item_id, microseconds, part: 0 = our models train on it, 1 = validation, 2 = test.

    A microsecond tells equal times apart, in our order; the library rounds down to seconds.
    """
    counts = [len(items) for items in data.items]
    columns = (
        np.repeat(np.arange(len(data)), counts),
        np.concatenate(data.items),
        np.concatenate([times * 1_000_000 + np.arange(len(times)) for times in data.times]),
        np.concatenate([np.r_[np.full(count - 2, TRAINING), VALIDATION, TEST] for count in counts]),
    )
    header = "user_id,item_id,microseconds,part"
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
