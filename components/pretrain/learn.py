"""What pretraining does, in order: learn the train part, measure on the eval part, learn that too; or what is left."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from components import sequence_data
from components.errors import BadInput
from components.items import Items
from components.manifests import Manifest
from components.parameters.bridge import build_model, choose_device
from components.pretrain.champion import measure_champion
from components.pretrain.config import PretrainConfig
from components.pretrain.resume import Course, Measured, Saves
from components.quality import baseline, choose_items, measure
from components.sequence_data import Part
from components.storage import Storage
from components.training import draw_losses, fit, log_losses, policy_counts
from model.ranker import RankerConfig
from model.retriever import RetrieverConfig
from model.trainer import Trainer

if TYPE_CHECKING:
    from components.figures import Curve
    from components.tracking import Run
    from model.dataset import SequenceDataset

LEARN_EVAL = "learn_eval_"
"""Prefix of the metrics and the picture of learning from the eval part."""


def model_settings(config: PretrainConfig) -> dict[str, Any]:
    """The settings of the chosen model."""
    chosen = RankerConfig if config.model == "ranker" else RetrieverConfig
    return config.model_dump(include=set(chosen.model_fields))


class Pretraining:
    """One pretraining: its trainer, where a save left it or new, and the data. BadInput when they do not fit."""

    def __init__(
        self, config: PretrainConfig, storage: Storage, folder: str, manifest: Manifest, champion: int | None
    ) -> None:
        self.config, self.storage, self.manifest, self.champion = config, storage, manifest, champion
        self.name = f"{config.model} on {config.dataset}"
        self.settings = model_settings(config)
        self.saves = Saves(storage, folder, config.digest(), config.save_every_s)
        torch.set_num_threads(config.threads)
        found = self.saves.newest()
        self.course = Course(sequence_data.item_files(storage)) if found is None else found.course
        self.resumed_from = None if found is None else found.step
        self.items = self._read_items()
        self.train = sequence_data.read_part(storage, manifest, "train")
        if (users := self.train.users) is None:
            raise BadInput(
                f"the train part of {config.dataset} has no interaction to learn from; build it over more days"
            )
        self.users = users
        self.trainer = Trainer(build_model(config.model, self.settings, self.items.catalogue))
        self.trainer.model.place(choose_device(config.device))
        if found is not None:
            found.restore(self.trainer)

    def _read_items(self) -> Items:
        try:
            return sequence_data.read_items(self.storage, self.course.item_files)
        except FileNotFoundError as error:
            raise BadInput(
                f"{self.name} began with an item file that has gone ({error}); bring it back, or delete "
                f"{self.storage.url(self.saves.folder)} to begin anew with the items of now"
            ) from error

    def learn(self, tracked: Run) -> tuple[dict[str, float], tuple[int, int]]:
        """Do what is left to do.

        Returns the metrics of before the eval part was learned, and the first and newest event time (us) learned from.
        """
        if self.resumed_from is not None:
            print(f"{self.name}: goes on after step {self.resumed_from}", file=sys.stderr, flush=True)
            tracked.tags({"resumed_from_step": self.resumed_from})
        self._learn_train(tracked)
        unseen = self._unseen()
        measured = self.course.measured = self.course.measured or self._measure(unseen)
        tracked.calibration({head: _curve(points) for head, points in measured.curves.items()}, self.name)
        parts = [self.train]
        if self.config.learn_eval and unseen is not None and unseen.users is not None:
            self._fit(unseen.users, tracked, f"{self.name}, eval part", self.course.eval_losses, LEARN_EVAL)
            parts.append(unseen)
        tracked.metrics(policy_counts(self.trainer, self.course.policy_counts))
        times = [time for part in parts if part.event_range is not None for time in part.event_range]
        return measured.metrics, (min(times), max(times))

    def _learn_train(self, tracked: Run) -> None:
        if self.course.measured is None:
            choose_items(self.trainer, self.items, self.train)
            self._fit(self.users, tracked, self.name, self.course.losses)
        else:  # learned and measured before the save; what ends a fit (expiry) must not be done again
            log_losses(tracked, self.course.losses)
            draw_losses(tracked, self.course.losses, self.name)

    def _fit(self, users: SequenceDataset, tracked: Run, title: str, losses: list[float], prefix: str = "") -> None:
        save = partial(self.saves.after_step, self.trainer, self.course)
        fit(
            self.trainer,
            users,
            tracked,
            title,
            continual=prefix == LEARN_EVAL,
            prefix=prefix,
            losses=losses,
            after_step=save,
        )

    def _unseen(self) -> Part | None:
        """The eval part, if there is one; a retriever chooses among its items from here on."""
        if "eval" not in self.manifest.files:
            return None
        unseen = sequence_data.read_part(self.storage, self.manifest, "eval")
        choose_items(self.trainer, self.items, unseen)
        return unseen

    def _measure(self, unseen: Part | None) -> Measured:
        """The model, the baseline and the champion on the eval part."""
        if unseen is None:
            return Measured(metrics={}, curves={})
        quality = measure(self.trainer, unseen.users)
        metrics = quality.metrics | baseline(self.trainer, self.train, unseen)
        if self.champion is not None:
            metrics |= measure_champion(self.storage, self.config.model, self.champion, self.items, unseen)
        curves = {head: (p.tolist(), y.tolist(), n.tolist()) for head, (p, y, n) in quality.curves.items()}
        return Measured(metrics=metrics, curves=curves)


def _curve(points: tuple[list[float], list[float], list[int]]) -> Curve:
    predicted, observed, count = points
    return np.array(predicted), np.array(observed), np.array(count, np.int64)
