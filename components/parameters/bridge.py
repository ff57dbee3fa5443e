"""Between a model with its trainer and the arrays of the parameter log. The only part of the log that needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from components.errors import BadInput
from components.parameters.arrays import Array, ParameterDelta, Parameters
from components.parameters.log import MODELS

if TYPE_CHECKING:
    import torch

    from model.catalogue import ItemCatalogue
    from model.sequence_model import SequenceModel
    from model.table import EmbeddingTable
    from model.table_delta import TableDelta
    from model.trainer import Trainer


def choose_device(wanted: str) -> torch.device:
    """'auto' is a CUDA device if there is one, else the CPU; BadInput when 'cuda' is wanted and absent."""
    import torch

    present = torch.cuda.is_available()
    if wanted == "cuda" and not present:
        raise BadInput("device cuda was asked for, but torch finds none; use auto or cpu, or run where there is a GPU")
    return torch.device("cuda" if present and wanted != "cpu" else "cpu")


def build_model(name: str, config: Mapping[str, Any], catalogue: ItemCatalogue) -> SequenceModel:
    """A fresh model; its initial weights depend on the config alone. BadInput when the config does not fit."""
    import torch

    from model.ranker import Ranker, RankerConfig
    from model.retriever import Retriever, RetrieverConfig

    if name not in MODELS:
        raise BadInput(f"unknown model {name!r}; models are {' and '.join(MODELS)}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(config.get("seed", 0)))
            if name == "ranker":
                return Ranker(RankerConfig(**config), catalogue)
            return Retriever(RetrieverConfig(**config), catalogue)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BadInput(
            f"the config does not fit this {name} ({problems}); correct it, or train a new version"
        ) from error


def load_into(trainer: Trainer, parameters: Parameters) -> None:
    """Set a fresh model (empty tables) to `parameters`, with the optimiser state if it was read.

    BadInput when the parameters belong to a model of another config.
    """
    tables: dict[str, EmbeddingTable] = trainer.model.tables()
    if tables.keys() != parameters.tables.keys():
        raise BadInput(
            f"the parameters have slots {', '.join(sorted(parameters.tables))}, the model has "
            f"{', '.join(sorted(tables))}; load them with the config they were made with"
        )
    trainer.load_dense(_tensors(parameters.dense))
    if parameters.optimizer:
        trainer.load_optimizer_state(_tensors(parameters.optimizer))
    for slot, table in tables.items():
        table.apply_delta(parameters.tables[slot])


def export_all(trainer: Trainer) -> Parameters:
    """Everything that training depends on."""
    return _export(trainer, {slot: table.export_all() for slot, table in trainer.model.tables().items()}, 0)


def close_epochs(trainer: Trainer) -> dict[str, int]:
    """Close each table's epoch; `export_changes` then gives what changes from here on."""
    return {slot: table.advance_epoch() for slot, table in trainer.model.tables().items()}


def export_changes(trainer: Trainer, since: Mapping[str, int], n: int) -> ParameterDelta:
    """Rows changed and keys erased since `close_epochs`, as delta n."""
    tables = trainer.model.tables()
    return _export(trainer, {slot: table.export_delta(since[slot]) for slot, table in tables.items()}, n)


def _export(trainer: Trainer, tables: Mapping[str, TableDelta], n: int) -> Parameters:
    return Parameters(_arrays(trainer.dense()), dict(tables), _arrays(trainer.optimizer_state()), n)


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _tensors(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
