"""Pretrain a model on a sequence dataset and keep a checkpoint.

Learns the dataset's train part for some epochs, measures the model on the eval part (beside the baseline of item and
user rates, and beside the champion as it was before those events), then learns from the eval part too, once and in
event order, so that no event is left out (--no-learn-eval keeps it apart), and writes a checkpoint that `register`
turns into a version. The MLflow run (experiment `pretrain`) holds the settings, loss and speed by step, the learning
curve, the calibration plot, the dataset's manifest and the metrics.

A finished checkpoint with the same settings is returned as it is, without training.

example:
  python -m components.pretrain --model ranker --dataset full-20220501 --epochs 4 --dim 32
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from components import sequence_data
from components.errors import BadInput
from components.parameters.checkpoint import Checkpoint, checkpoint_folder, find_checkpoint, save_checkpoint
from components.pretrain.champion import measure_champion
from components.pretrain.config import PretrainConfig
from components.storage import Storage

if TYPE_CHECKING:
    from components.tracking import Tracker

EXPERIMENT = "pretrain"


class PretrainResult(BaseModel):
    """What pretraining made."""

    model: str
    checkpoint: str = Field(description="folder of the checkpoint, relative to the storage root")
    run_id: str = Field(description="MLflow run")
    dataset: str
    metrics: dict[str, float] = Field(description="on the eval part, before learning it: auc_click, ... or hr_10, ...")
    rows: dict[str, int] = Field(description="embedding rows, by slot")


def run(config: PretrainConfig) -> PretrainResult:
    """Train, or return what an earlier run with the same settings made."""
    from components.tracking import Tracker

    storage = Storage(config.root)
    folder = checkpoint_folder(config.model, config.digest())
    finished = find_checkpoint(storage, folder)
    if finished is None:
        finished = _train(config, storage, folder, Tracker(config.tracking_uri))
    else:
        Tracker(config.tracking_uri).finish(finished.run_id)
    return PretrainResult(checkpoint=folder, **finished.model_dump(include=set(PretrainResult.model_fields)))


def model_settings(config: PretrainConfig) -> dict[str, Any]:
    """The settings of the chosen model."""
    from model.ranker import RankerConfig
    from model.retriever import RetrieverConfig

    chosen = RankerConfig if config.model == "ranker" else RetrieverConfig
    return config.model_dump(include=set(chosen.model_fields))


def _train(config: PretrainConfig, storage: Storage, folder: str, tracker: Tracker) -> Checkpoint:
    import torch

    from components.parameters.bridge import build_model, choose_device, export_all
    from components.quality import baseline, choose_items, measure
    from components.registry import CHAMPION, Registry
    from components.training import fit
    from model.trainer import Trainer

    if not config.dataset:
        raise BadInput("no dataset given; pass --dataset with the id of a sequence dataset")
    manifest = sequence_data.require_dataset(storage, config.dataset)
    learn, items = sequence_data.read_part(storage, manifest, "train"), sequence_data.read_items(storage)
    if learn.users is None:
        raise BadInput(f"the train part of {config.dataset} has no interaction to learn from; build it over more days")
    torch.set_num_threads(config.threads)
    settings = model_settings(config)
    trainer = Trainer(build_model(config.model, settings, items.catalogue))
    trainer.model.place(choose_device(config.device))
    choose_items(trainer, items, learn)
    champion = Registry(config.tracking_uri).alias(config.model, CHAMPION)
    params = config.model_dump(exclude={"root", "tracking_uri"})
    name = f"{config.model} on {config.dataset}"
    key = f"{EXPERIMENT}:{config.model}:{config.digest()}"
    parent = "" if champion is None else champion
    with tracker.run(EXPERIMENT, key, name, params, model=config.model, parent_version=parent) as tracked:
        tracked.dataset(storage, manifest, sequence_data.manifest_path(config.dataset), "training")
        fit(trainer, learn.users, tracked, name)
        metrics: dict[str, float] = {}
        times = [learn.event_range]
        if "eval" in manifest.files:
            unseen = sequence_data.read_part(storage, manifest, "eval")
            choose_items(trainer, items, unseen)
            quality = measure(trainer, unseen.users)
            metrics = quality.metrics | baseline(trainer, learn, unseen)
            if champion is not None:
                metrics |= measure_champion(storage, config.model, champion, items, unseen)
            tracked.calibration(quality.curves, name)
            if config.learn_eval and unseen.users is not None:
                trainer.fit(unseen.users, continual=True)
                times.append(unseen.event_range)
        tracked.metrics(metrics)
        tracked.tags({"checkpoint": folder, "dataset": config.dataset})
        bounds = [bound for time in times if time is not None for bound in time]
        return save_checkpoint(
            storage,
            folder,
            export_all(trainer),
            model=config.model,
            digest=config.digest(),
            dataset=config.dataset,
            windows=manifest.windows,
            event_time_min_us=min(bounds),
            event_time_max_us=max(bounds),
            run_id=tracked.run_id,
            metrics=metrics,
            config=settings,
        )
