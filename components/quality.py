"""How good a model is on a dataset, under the flat metric names used in logs, gates and MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from components.figures import Curve

if TYPE_CHECKING:
    from components.items import Items
    from components.sequence_data import Part
    from model.dataset import SequenceDataset
    from model.trainer import Trainer

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Quality:
    """Metrics (`auc_click`, `ne_click`, `calibration_click`, ... or `hr_10`, `ndcg_10`, ...) and calibration curves."""

    metrics: dict[str, float]
    curves: dict[str, Curve]


def measure(trainer: Trainer, users: SequenceDataset | None) -> Quality:
    """Evaluate without learning; no users, no metrics. Metrics that are undefined (no positives) are left out."""
    from components.tracking import finite
    from model.metrics import calibration_curve
    from model.ranker import Ranker

    outputs = {} if users is None else trainer.predict(users)
    if not outputs:
        return Quality({}, {})
    curves = {}
    for column, head in enumerate(trainer.model.head_names if isinstance(trainer.model, Ranker) else []):
        curves[head] = calibration_curve(
            outputs["label"][:, column], outputs["probability"][:, column], CALIBRATION_BINS
        )
    return Quality(finite(trainer.model.summarise(outputs)), curves)


def choose_items(trainer: Trainer, items: Items, part: Part) -> None:
    """Let a retriever choose among the items that were there at the time of this data; a ranker needs no such list."""
    from model.retriever import Retriever

    if isinstance(trainer.model, Retriever) and part.event_range is not None:
        trainer.model.set_items(np.union1d(items.available(*part.event_range), part.new["item_id"]))


def baseline(trainer: Trainer, past: Part, part: Part) -> dict[str, float]:
    """Metrics of the item-user rate baseline, without and with page, counted on `past` and frozen.

    Names: `baseline_auc_click`, `baseline_page_auc_click`, ... None for a retriever, nor for an action that always or
    never happened in the past.
    """
    from components.schemas import action_bit
    from components.tracking import finite
    from model.baselines.item_user_rate import ItemUserRate
    from model.metrics import auc, normalised_entropy
    from model.ranker import Ranker

    metrics: dict[str, float] = {}
    if not isinstance(trainer.model, Ranker):
        return metrics
    columns = [{"item": p.new["item_id"], "user": p.new["user_id"], "page": p.new["page"]} for p in (past, part)]
    for head in trainer.model.head_names:
        labels = [(p.new["actions"] & action_bit(head)) > 0 for p in (past, part)]
        if labels[0].all() or not labels[0].any():
            continue
        for name, with_page in (("baseline", False), ("baseline_page", True)):
            rates = ItemUserRate(with_page=with_page)
            rates.update(columns[0], labels[0])
            probability = rates.predict(columns[1])
            metrics[f"{name}_auc_{head}"] = auc(labels[1], probability)
            metrics[f"{name}_ne_{head}"] = normalised_entropy(labels[1], probability)
    return finite(metrics)
