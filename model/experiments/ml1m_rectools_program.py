"""Trains and tests one of RecTools' models. Run by ml1m_rectools.py in an environment of its own, by path: nothing of
this repository is to be had there.

    python ml1m_rectools_program.py RATINGS LOG WEIGHTS SETTINGS THREADS

Adds a line per epoch to the log: seconds of training alone, ranks in the validation and, where its NDCG@10 (score) is
the best so far, ranks in the test. Stops by the same rule as our training. Weights and optimiser state are kept after
each epoch and the seed is set for each, so that a run that was interrupted ends as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

TRAINING, VALIDATION, TEST = 0, 1, 2
"""Column `part` of RATINGS."""
DEEPEST = 200
"""Items asked for; a target that is not among them has rank DEEPEST + 1."""
RECOMMEND_BATCH = 32
"""Users; changes no score, and with the library's 256 the same answers took 2.6 times as long."""


class Run:
    """One model, its data, and where it leaves what it found."""

    def __init__(self, ratings: str, log: str, weights: str, settings: dict[str, Any]) -> None:
        import pandas
        from rectools import Columns
        from rectools.dataset import Dataset
        from rectools.models import HSTUModel, SASRecModel

        self.log, self.weights, self.settings = Path(log), Path(weights), settings
        table = pandas.read_csv(ratings)
        table[Columns.Datetime] = pandas.to_datetime(table["microseconds"], unit="us")
        table[Columns.Weight] = 1.0
        part = table["part"]
        table = table.drop(columns=["microseconds", "part"])
        self.columns = Columns
        self.known, self.with_validation = (Dataset.construct(table[part < first]) for first in (VALIDATION, TEST))
        self.validation, self.test = table[part == VALIDATION], table[part == TEST]
        self.seconds = 0.0
        kind = {"hstu": HSTUModel, "sasrec": SASRecModel}[settings["encoder"]]
        arguments = settings["arguments"] | {"recommend_batch_size": RECOMMEND_BATCH}
        self.model = kind(get_trainer_func=self.trainer, **arguments)

    def trainer(self) -> Any:
        """One epoch on the CPU, with a clock."""
        from pytorch_lightning import Callback, Trainer

        run = self

        class Clock(Callback):
            def on_train_epoch_start(self, *_: object) -> None:
                self.start = time.perf_counter()

            def on_train_epoch_end(self, *_: object) -> None:
                run.seconds = time.perf_counter() - self.start

        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(
            max_epochs=1, devices=1, accelerator="cpu", callbacks=[Clock()], enable_checkpointing=False, **quiet
        )

    def save(self, epoch: int) -> None:
        """Weights and optimiser state, all at once."""
        import torch

        module = self.model.lightning_model
        state = {"model": module.state_dict(), "optimizer": module.optimizer.state_dict(), "epoch": epoch}
        new = self.weights.with_suffix(".new")
        torch.save(state, new)
        os.replace(new, self.weights)

    def restore(self) -> int:
        """The state that `save` left; returns its epoch, 0 if there is none."""
        import torch

        if not self.weights.exists():
            return 0
        state = torch.load(self.weights, weights_only=True)
        model, epoch = self.model, int(state["epoch"])
        model._build_model_from_dataset(self.known)
        model.fit_trainer = self.trainer()
        count = model.fit_trainer.fit_loop.epoch_progress.current
        count.ready = count.started = count.processed = count.completed = epoch
        model.lightning_model.load_state_dict(state["model"])
        model.lightning_model.configure_optimizers().load_state_dict(state["optimizer"])
        model.is_fitted = model.lightning_model.is_fitted = True
        return epoch

    def ranks(self, histories: Any, target: Any) -> list[int]:
        """Of the target of each user, beginning at 1, among all items that are not in the user's history."""
        columns = self.columns
        context = target[[columns.User, columns.Datetime, columns.Weight]].copy()
        context = context if self.model.require_recommend_context else None
        users = target[columns.User].to_numpy()
        found = self.model.recommend(users, histories, k=DEEPEST, filter_viewed=True, context=context)
        found = found.merge(target[[columns.User, columns.Item]])
        rank = dict(zip(found[columns.User], found[columns.Rank], strict=True))
        return [int(rank.get(user, DEEPEST + 1)) for user in users]

    def write(self, row: dict[str, Any]) -> None:
        """A line of the log."""
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def best_of(self, epochs: int) -> dict[str, Any]:
        """The best row of the log in these epochs."""
        rows = [json.loads(line) for line in self.log.read_text().splitlines()][1:]
        known = [row for row in rows if row["epoch"] <= epochs]
        return max(known, key=lambda row: float(row["score"]), default={"epoch": 0, "score": -1.0})

    def train(self) -> None:
        """From where it was, until the validation stops getting better."""
        import torch

        done = self.restore()
        best = self.best_of(done)
        for epoch in range(done + 1, self.settings["epochs"] + 1):
            if epoch - 1 - best["epoch"] >= self.settings["patience"]:
                break
            torch.manual_seed(1_000_000 * self.settings["seed"] + epoch)
            self.model.fit_partial(self.known, 1, 1)
            found = self.ranks(self.known, self.validation)
            row: dict[str, Any] = {"epoch": epoch, "seconds": self.seconds, "validation": found}
            row["score"] = sum(1 / math.log2(1 + rank) for rank in found if rank <= 10) / len(found)
            if row["score"] > best["score"]:
                best = row | {"test": self.ranks(self.with_validation, self.test)}
                row = best
            self.write(row)
            self.save(epoch)
        self.write({"parameters": sum(p.numel() for p in self.model.torch_model.parameters())})


def main() -> None:
    """Command line."""
    import torch

    ratings, log, weights, settings, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    Run(ratings, log, weights, json.loads(settings)).train()


if __name__ == "__main__":
    main()
