"""Training of a next-item model with early stopping on the validation items, and its test on the test items."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from model.experiments.ml1m_data import Histories, questions, training_batches
from model.metrics import hit_rate, ndcg, ranks_of
from model.sequential import NextItem, SequentialConfig

CUTS = (10, 50, 200)
EVALUATION_USERS = 128
Metrics = dict[str, float]


class RunConfig(BaseModel):
    """How one model is trained; `model` holds fields of SequentialConfig, the number of items aside."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: dict[str, str | bool | int | float] = Field(default_factory=dict, description="Settings of the network")
    batch_users: int = Field(default=128, ge=1, description="Users per step")
    lr: float = Field(default=1e-3, gt=0, description="AdamW learning rate, betas .9 and .98")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay")
    epochs: int = Field(default=100, ge=1, description="Passes over the users at most")
    patience: int = Field(default=10, ge=1, description="Stop after so many passes without a better validation NDCG@10")
    seed: int = Field(default=0, ge=0, description="Seed of weights, order and dropout")

    def network(self, items: int) -> SequentialConfig:
        """The network for a catalogue of this size."""
        return SequentialConfig.model_validate(self.model | {"items": items, "seed": self.seed})


class RunResult(BaseModel):
    """What one run found. Seconds per epoch: the median of training alone, without evaluation."""

    best_epoch: int
    epochs: int
    seconds_per_epoch: float
    events_per_second: float
    parameters: int
    validation: Metrics
    test: Metrics


def evaluate(model: NextItem, data: Histories, *, held_out: int) -> Metrics:
    """hr@k and ndcg@k over the whole catalogue minus what the user has seen; equal scores count against the target."""
    model.eval()
    ranks = []
    for question in questions(data, EVALUATION_USERS, model.config.max_length, held_out=held_out):
        scores = model.scores(question.histories)
        own = scores.gather(1, question.wanted[:, None])
        scores[question.seen] = float("-inf")
        scores.scatter_(1, question.wanted[:, None], own)  # a target seen before is still an answer
        ranks.append(ranks_of(scores.numpy(), own.squeeze(1).numpy()))
    found = np.concatenate(ranks)
    return {f"{name}@{k}": measure(found, k) for name, measure in (("hr", hit_rate), ("ndcg", ndcg)) for k in CUTS}


def train_epoch(
    model: NextItem, optimizer: torch.optim.Optimizer, data: Histories, config: RunConfig, epoch: int
) -> tuple[float, int]:
    """One pass: mean loss over the predictions, and their number."""
    model.train()
    total, count = 0.0, 0
    for batch in training_batches(data, config.batch_users, model.config.max_length, config.seed, epoch):
        loss = model.loss(batch.histories, batch.wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + float(loss.detach()) * len(batch.wanted), count + len(batch.wanted)
    return total / count, count


def run(data: Histories, config: RunConfig, log: Callable[[dict], None] = lambda row: None) -> RunResult:
    """Train until the validation stops getting better; test the best epoch's weights once."""
    torch.manual_seed(config.seed)
    model = NextItem(config.network(len(data.catalogue)))
    optimizer = make_optimizer(model, config)
    best, best_epoch, seconds, events = {"ndcg@10": -1.0}, 0, [], 0
    weights = copy.deepcopy(model.state_dict())
    for epoch in range(1, config.epochs + 1):
        start = time.perf_counter()
        loss, events = train_epoch(model, optimizer, data, config, epoch)
        seconds.append(time.perf_counter() - start)
        found = evaluate(model, data, held_out=2)
        log({"epoch": epoch, "loss": round(loss, 4), "seconds": round(seconds[-1], 2)} | rounded(found))
        if found["ndcg@10"] > best["ndcg@10"]:
            best, best_epoch, weights = found, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= config.patience:
            break
    model.load_state_dict(weights)
    return RunResult(
        best_epoch=best_epoch,
        epochs=len(seconds),
        seconds_per_epoch=float(np.median(seconds)),
        events_per_second=events / float(np.median(seconds)),
        parameters=sum(p.numel() for p in model.parameters()),
        validation=best,
        test=evaluate(model, data, held_out=1),
    )


def make_optimizer(model: NextItem, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW as the published code has it."""
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)


def rounded(metrics: Metrics) -> Metrics:
    """Five digits."""
    return {name: round(value, 5) for name, value in metrics.items()}


def logged_run(data: Histories, config: RunConfig, path: Path) -> RunResult:
    """`run` with a log of JSON lines: the settings, one line per epoch, the result.

    A log of the same settings, data and threads that has its result is read instead; any other is begun anew.
    """
    settings = {"settings": config.model_dump()} | conditions(data, torch.get_num_threads())
    if (known := _finished(path, settings)) is not None:
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:

        def write(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        write(settings)
        result = run(data, config, write)
        write({"result": result.model_dump()})
    return result


def conditions(data: Histories, threads: int) -> dict[str, int]:
    """What a result depends on beside the settings: the data by their sizes; its seconds on the threads."""
    return {"users": len(data), "items": len(data.catalogue), "threads": threads}


def _finished(path: Path, settings: dict) -> RunResult | None:
    if not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    if not lines or lines[0] != settings or "result" not in lines[-1]:
        return None
    return RunResult.model_validate(lines[-1]["result"])
