"""Training of either model: dense parameters by Adam, tables by their row optimisers; exact resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.errors import BadInput, FreshetError
from model.dataset import SequenceDataset
from model.inputs import MICROSECONDS, NO_EVENT, UserEvents
from model.precision import training_precision
from model.sequence_model import SequenceModel
from model.stochastic_length import StochasticLength
from model.table import EmbeddingTable
from model.table_delta import TableDelta

PROGRESS = "/table_progress"
CONTINUAL = -1
"""The epoch of a continual pass, for what is drawn per epoch."""
ROW_PARTS = ("keys", "weights", "state", "last_update_us", "counts", "candidate_keys", "candidates")


@dataclass(frozen=True)
class Step:
    """Report of one training step. `done` and `total` count batches of this call of fit; no targets, no loss (NaN)."""

    epoch: int
    done: int
    total: int
    loss: float
    targets: int
    gradient_norm: float
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens that went through the model, over the time of the step."""
        return self.tokens / max(self.seconds, 1e-9)


class Trainer:
    """Trains and evaluates one model. All state that training depends on is in `export_state`."""

    def __init__(self, model: SequenceModel) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        c = model.config
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=c.dense_lr, betas=(0.9, 0.98), weight_decay=c.weight_decay
        )
        self.lengths = StochasticLength.of(c)
        self.step = 0

    def fit(
        self,
        dataset: SequenceDataset,
        *,
        continual: bool = False,
        epochs: int | None = None,
        on_step: Callable[[Step], None] | None = None,
        start: int = 0,
    ) -> dict[str, float]:
        """Train; returns the mean loss of what this call did of the last epoch, and the counts of steps and targets.

        An event counts towards admission in the first epoch that reads it, and in no other; but of users whom
        stochastic length shortens, each epoch counts what it drew. At the end no table has rows that have outlived its
        time to live.

        continual: one pass in event order at the continual learning rates. epochs: instead of the config's.
        start: number of batches of this call already done (resume after export_state, same dataset and settings).
        """
        c = self.model.config
        dataset = self.model.examples(dataset)
        plan = self._plan(dataset, continual, epochs)
        reports: list[Step] = []
        for done, (epoch, rows, counted) in enumerate(plan):
            if done < start:
                continue
            pace = 1.0 if continual else self._pace(done, len(plan))
            for group in self.optimizer.param_groups:
                group["lr"] = (c.continual_dense_lr if continual else c.dense_lr) * pace
            batch = self._shorten(dataset.users(rows), CONTINUAL if continual else epoch)
            report = self._train_batch(batch, counted, continual, pace, (epoch, done + 1, len(plan)))
            reports.append(report)
            if on_step is not None:
                on_step(report)
        for table in self.model.tables().values():
            table.expire_stale()
        last = [report for report in reports if report.targets and report.epoch == plan[-1][0]]
        seen = sum(report.targets for report in last)
        loss = sum(report.loss * report.targets for report in last) / seen if seen else float("nan")
        return {"loss": loss, "steps": float(len(reports)), "targets": float(sum(r.targets for r in reports))}

    def _plan(
        self, dataset: SequenceDataset, continual: bool, epochs: int | None
    ) -> list[tuple[int, NDArray[np.int64], NDArray[np.bool_]]]:
        """Batches: epoch, rows of the dataset, and for each whether an earlier epoch has counted its events."""
        c = self.model.config
        counted = np.zeros(len(dataset), dtype=bool)
        if continual:
            batches = dataset.in_event_order(c.continual_batch_tokens, self.lengths, CONTINUAL)
            return [(0, rows, counted[rows]) for rows in batches]
        plan = []
        for e in range(c.epochs if epochs is None else epochs):
            batches = dataset.shuffled(c.batch_tokens, c.seed, e, self.lengths, c.generative_sampling)
            plan += [(e, rows, counted[rows]) for rows in batches]
            counted |= self._counts_in(dataset, e)
        return plan

    def _counts_in(self, dataset: SequenceDataset, epoch: int) -> NDArray[np.bool_]:
        """(rows,) those whose events all count in this epoch, if they did not before."""
        if self.model.config.generative_sampling:
            return dataset.emitted(self.model.config.seed, epoch)
        if self.lengths is None or self.model.config.per_request():
            return np.ones(len(dataset), dtype=bool)
        return ~self.lengths.shortens(dataset.counts())

    def _shorten(self, users: list[UserEvents], epoch: int) -> list[UserEvents]:
        """Stochastic length; a continual pass and request examples keep every target."""
        if self.lengths is None:
            return users
        keep_new = epoch == CONTINUAL or self.model.config.per_request()
        return self.lengths.cut_all(users, epoch, keep_new=keep_new)

    def _pace(self, done: int, total: int) -> float:
        """Factor of the learning rates in pretraining: linear warm-up, then linear decay to final_lr."""
        c = self.model.config
        decay = 1.0 - (1.0 - c.final_lr) * done / max(total, 1)
        return min(decay, (done + 1) / max(c.warmup * total, 1.0))

    def _train_batch(
        self,
        users: list[UserEvents],
        counted: NDArray[np.bool_],
        continual: bool,
        pace: float,
        place: tuple[int, int, int],
    ) -> Step:
        started = time.perf_counter()
        self.model.train()  # in each step: on_step may have called eval()
        tokens = self.model.tokens(users)
        tokens.event_us[torch.from_numpy(counted).repeat_interleave(tokens.seen.offsets.diff())] = NO_EVENT
        tables = self.model.tables()
        for table in tables.values():
            table.discard()  # a step that was interrupted may have left its gradients
        with torch.random.fork_rng(devices=[]), training_precision(self.model):
            torch.manual_seed((self.model.config.seed << 32) + self.step)  # dropout is a function of the step
            loss, targets = self.model.loss(tokens)
        self.optimizer.zero_grad()
        loss.backward()
        norm = self._clip(tables)
        if targets:  # or moments would move the parameters, those of rows too, though nothing was learned
            self.optimizer.step()
        event_time = int(tokens.query_time.max()) * MICROSECONDS if len(tokens) else 0
        for slot, table in tables.items():
            table.scale_gradients(float(targets))  # a row learns from the sum over its events, whatever the batch
            table.step(self.model.table_lr(slot, continual) * pace if targets else 0.0, event_time)  # events count
        self.step += 1
        seconds, mean = time.perf_counter() - started, float(loss.detach()) if targets else float("nan")
        return Step(*place, mean, targets, norm, len(tokens), seconds)

    def _clip(self, tables: dict[str, EmbeddingTable]) -> float:
        """Scale all gradients, dense and of tables, so that their joint norm is at most clip_norm."""
        squares = sum(float(p.grad.double().square().sum()) for p in self.parameters.values() if p.grad is not None)
        norm = float(np.sqrt(squares + sum(table.gradient_squared_norm() for table in tables.values())))
        if not np.isfinite(norm):
            for table in tables.values():
                table.discard()
            raise FreshetError(
                f"training diverged at step {self.step}: the gradient is {norm}; lower the learning rates"
            )
        limit = self.model.config.clip_norm
        if norm > limit:
            for p in self.parameters.values():
                if p.grad is not None:
                    p.grad.mul_(limit / norm)
            for table in tables.values():
                table.scale_gradients(limit / norm)
        return norm

    def predict(self, dataset: SequenceDataset) -> dict[str, NDArray]:
        """What the model's `evaluate_batch` tells of every target, concatenated; nothing for a dataset without any."""
        dataset = self.model.examples(dataset)
        parts: list[dict[str, NDArray]] = []
        with self.model.inference():
            for users in dataset.in_event_order(self.model.config.batch_tokens):
                tokens = self.model.tokens(dataset.users(users))
                parts.append(self.model.evaluate_batch(tokens))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def evaluate(self, dataset: SequenceDataset) -> dict[str, float]:
        """Metrics over the dataset's targets; nothing is learned and no row is inserted."""
        outputs = self.predict(dataset)
        if not outputs:
            raise BadInput("nothing to evaluate; the dataset has no interaction from new_from on")
        return self.model.summarise(outputs)

    # State: plain tensors only

    def dense(self) -> dict[str, Tensor]:
        """Dense parameters by name, detached copies on the host."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    def load_dense(self, tensors: dict[str, Tensor]) -> None:
        """Set every dense parameter. Raises BadInput unless names and shapes match."""
        shapes = {name: p.shape for name, p in self.parameters.items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise BadInput("the dense parameters do not fit this model; load them with the config they were made with")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[name])

    def optimizer_state(self) -> dict[str, Tensor]:
        """State of the dense optimiser as '<parameter>/<moment>', the trainer's step and how far each table is."""
        state = {"trainer/step": torch.tensor(self.step, dtype=torch.int64)}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                state[f"{name}/{key}"] = value.detach().cpu().clone()
        for slot, table in self.model.tables().items():
            state[f"{slot}{PROGRESS}"] = torch.from_numpy(table.progress().view(np.int64))
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of optimizer_state, for empty tables. Raises BadInput for names that are no parameter of this model.

        A state of before the progress of tables was kept has none: then they begin as new ones.
        """
        self.step = int(state["trainer/step"])
        self.optimizer.state.clear()
        for full, value in state.items():
            name, _, key = full.rpartition("/")
            if full == "trainer/step" or full.endswith(PROGRESS):
                continue
            if name not in self.parameters:
                raise BadInput(f"optimiser state for an unknown parameter {name}; use the config it was made with")
            parameter = self.parameters[name]
            place = value.device if key == "step" else parameter.device  # Adam counts its steps on the host
            self.optimizer.state[parameter][key] = value.to(place, copy=True)
        for slot, table in self.model.tables().items():
            if (progress := state.get(f"{slot}{PROGRESS}")) is not None:
                table.start_from(progress.numpy().view(np.uint64))

    def export_state(self) -> dict[str, Tensor]:
        """Everything training depends on: dense/, optimizer/, tables/<slot>/<part> of ROW_PARTS."""
        state = {f"dense/{name}": value for name, value in self.dense().items()}
        state |= {f"optimizer/{name}": value for name, value in self.optimizer_state().items()}
        for slot, table in self.model.tables().items():
            rows = table.export_all()
            for part in ROW_PARTS:
                state[f"tables/{slot}/{part}"] = torch.from_numpy(np.ascontiguousarray(getattr(rows, part)))
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of export_state, into a model of the same config with empty tables.

        Raises BadInput for other parameters or slots, and for tables that have rows.
        """
        tables = self.model.tables()
        if full := [slot for slot, table in tables.items() if len(table)]:
            raise BadInput(f"{', '.join(full)} already have rows; load a state into a new model")
        slots = {name[7:].rpartition("/")[0] for name in state if name.startswith("tables/")}
        if different := sorted(slots ^ tables.keys()):
            raise BadInput(
                f"only the state or only the model has the tables {', '.join(different)}; "
                "use the config it was made with"
            )
        self.load_dense({name[6:]: value for name, value in state.items() if name.startswith("dense/")})
        self.load_optimizer_state({name[10:]: v for name, v in state.items() if name.startswith("optimizer/")})
        for slot, table in tables.items():
            parts = {key: state[f"tables/{slot}/{key}"].numpy() for key in ROW_PARTS}
            table.apply_delta(TableDelta(**parts))
