"""Measure a checkpoint, or a version at any of its sync points, on a part of a sequence dataset.

Nothing is learned. Ranker: AUC, normalised entropy (NE) and calibration per head, and on an eval part the same of the
item-user rate baseline, counted on the train part. Retriever: hit rate and NDCG. The metrics go to an MLflow run
(experiment `evaluate`) and to evaluations/; measuring the same again returns the same.

examples:
  python -m components.evaluate --model ranker --checkpoint checkpoints/ranker/0123456789ab \\
      --dataset history-20220401T000000Z-20220501T000000Z-0123456789ab
  python -m components.evaluate --model ranker --version 3 --as-of 0 --part train \\
      --dataset window-20220501T000000Z-20220502T000000Z-0123456789ab
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from components import sequence_data
from components.errors import AlreadyExists, BadInput
from components.evaluate.config import EvaluateConfig
from components.parameters.checkpoint import load_checkpoint, require_checkpoint
from components.parameters.reader import LogReader
from components.storage import Storage
from components.windows import from_us

if TYPE_CHECKING:
    from components.parameters.arrays import Parameters

EXPERIMENT = "evaluate"


class EvaluateResult(BaseModel):
    """What was measured."""

    model: str
    dataset: str
    part: str
    checkpoint: str = Field(description="folder of the checkpoint, or empty")
    version: int | None
    as_of: int | None = Field(description="sync point of the version")
    run_id: str = Field(description="MLflow run of the measurement")
    metrics: dict[str, float] = Field(description="auc_click, ne_click, ... or hr_10, ndcg_10, ...")


def run(config: EvaluateConfig) -> EvaluateResult:
    """Measure, or return what was measured before."""
    storage = Storage(config.root)
    config = _resolved(config, storage)
    path = f"evaluations/{config.model}/{config.digest()}.json"
    if not storage.exists(path):
        result = _measure(config, storage)
        with suppress(AlreadyExists):  # somebody else measured the same meanwhile
            storage.create(path, result.model_dump_json(indent=1).encode())
    return EvaluateResult.model_validate_json(storage.read_bytes(path))


def _resolved(config: EvaluateConfig, storage: Storage) -> EvaluateConfig:
    """Name the version and the sync point that are meant, so that the result has one name for ever."""
    if not config.dataset:
        raise BadInput("no dataset given; pass --dataset with the id of a sequence dataset")
    if config.checkpoint:
        if config.version is not None or config.as_of is not None:
            raise BadInput("a checkpoint and a version were given; choose one of them")
        return config
    from components.registry import Registry

    version = Registry(config.tracking_uri).resolve(config.model, config.version)
    as_of = LogReader(storage, config.model, version).head() if config.as_of is None else config.as_of
    return config.model_copy(update={"version": version, "as_of": as_of})


def _measure(config: EvaluateConfig, storage: Storage) -> EvaluateResult:
    import torch

    from components.parameters.bridge import build_model, load_into
    from components.quality import baseline, choose_items, measure
    from components.tracking import Tracker
    from model.trainer import Trainer

    tracker = Tracker(config.tracking_uri)
    manifest = sequence_data.require_dataset(storage, config.dataset)
    part, items = sequence_data.read_part(storage, manifest, config.part), sequence_data.read_items(storage)
    if part.event_range is None:
        raise BadInput(f"the {config.part} part of {config.dataset} has no interaction to measure on")
    parameters, settings, label, learned_until = _parameters(config, storage)
    if config.part == "eval" and learned_until is not None and part.event_range[0] <= learned_until:
        raise BadInput(
            f"{label} has learned from events up to {from_us(learned_until):%Y-%m-%dT%H:%M:%SZ}, and the eval part of "
            f"{config.dataset} begins before that, which would flatter it; pretrain with --no-learn-eval, or measure "
            "on newer events (the metrics from before learning are in the manifest)"
        )
    torch.set_num_threads(config.threads)
    trainer = Trainer(build_model(config.model, settings, items.catalogue))
    load_into(trainer, parameters)
    choose_items(trainer, items, part)
    params = config.model_dump(exclude={"root", "tracking_uri"})
    name, key = f"{label} on {config.dataset}/{config.part}", f"{EXPERIMENT}:{config.model}:{config.digest()}"
    with tracker.run(EXPERIMENT, key, name, params, model=config.model) as tracked:
        tracked.dataset(storage, manifest, "evaluation")
        quality = measure(trainer, part.users)
        metrics = quality.metrics
        if config.part == "eval":
            metrics |= baseline(trainer, sequence_data.read_part(storage, manifest, "train"), part)
        tracked.metrics(metrics)
        tracked.calibration(quality.curves, name)
        chosen = config.model_dump(include=set(EvaluateResult.model_fields))
        return EvaluateResult(run_id=tracked.run_id, metrics=metrics, **chosen)


def _parameters(config: EvaluateConfig, storage: Storage) -> tuple[Parameters, dict[str, Any], str, int | None]:
    """What to measure: parameters, the model's config, a label, and the newest event time (us) they learned from."""
    if config.checkpoint:
        checkpoint = require_checkpoint(storage, config.checkpoint)
        if checkpoint.model != config.model:
            raise BadInput(f"{config.checkpoint} is a {checkpoint.model}, not a {config.model}; set --model")
        parameters = load_checkpoint(storage, checkpoint, with_state=False)
        return parameters, checkpoint.config, config.checkpoint, checkpoint.event_time_max_us
    assert config.version is not None
    reader = LogReader(storage, config.model, config.version)
    parameters = reader.load(config.as_of)
    manifest = reader.manifest(parameters.n)
    label = f"{config.model} {config.version} at {parameters.n}"
    return parameters, manifest.config, label, manifest.learned_until_us
