"""Pretrain a model on a sequence dataset and keep a checkpoint.

Learns the dataset's train part for some epochs, measures the model on the eval part (beside the baseline of item and
user rates, and beside the champion as it was before those events), then learns from the eval part too, once and in
event order, so that no event is left out (--no-learn-eval keeps it apart), and writes a checkpoint that `register`
turns into a version. The MLflow run (experiment `pretrain`) holds the settings, loss and speed by step, the learning
curve, the calibration plot, the dataset's manifest and the metrics.

A finished checkpoint with the same settings is returned as it is, without training. A pretraining that was
killed and is run again with the same settings goes on from its newest save (every --save-every-s seconds), in a new
MLflow run, and ends with the same checkpoint as if nothing had happened, on CPUs with as many threads to the bit.

example:
  python -m components.pretrain --model ranker --epochs 4 --dim 32 \\
      --dataset history-20220401T000000Z-20220501T000000Z-0123456789ab
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from components import sequence_data
from components.errors import BadInput
from components.parameters.checkpoint import Checkpoint, checkpoint_folder, find_checkpoint, save_checkpoint
from components.pretrain.config import PretrainConfig
from components.pretrain.resume import delete_saves
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
    delete_saves(storage, folder)
    return PretrainResult(checkpoint=folder, **finished.model_dump(include=set(PretrainResult.model_fields)))


def _train(config: PretrainConfig, storage: Storage, folder: str, tracker: Tracker) -> Checkpoint:
    from components.parameters.bridge import export_all
    from components.pretrain.learn import Pretraining
    from components.registry import CHAMPION, Registry

    if not config.dataset:
        raise BadInput("no dataset given; pass --dataset with the id of a sequence dataset")
    manifest = sequence_data.require_dataset(storage, config.dataset)
    champion = Registry(config.tracking_uri).alias(config.model, CHAMPION)
    work = Pretraining(config, storage, folder, manifest, champion)
    params = config.model_dump(exclude={"root", "tracking_uri"})
    key = f"{EXPERIMENT}:{config.model}:{config.digest()}"
    parent = "" if champion is None else champion
    with tracker.run(EXPERIMENT, key, work.name, params, model=config.model, parent_version=parent) as tracked:
        tracked.dataset(storage, manifest, "training")
        metrics, (first, newest) = work.learn(tracked)
        tracked.metrics(metrics)
        tracked.tags({"checkpoint": folder, "dataset": config.dataset})
        return save_checkpoint(
            storage,
            folder,
            export_all(work.trainer),
            model=config.model,
            digest=config.digest(),
            dataset=config.dataset,
            windows=manifest.windows,
            event_time_min_us=first,
            event_time_max_us=newest,
            run_id=tracked.run_id,
            metrics=metrics,
            config=work.settings,
        )
