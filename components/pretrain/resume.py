"""Saves of a pretraining that is under way: killed at any moment and run again, it goes on from the newest one.

    checkpoints/<model>/<digest>/saves/step-<n>-<attempt>.safetensors     all that training depends on, after step n
    checkpoints/<model>/<digest>/saves/step-<n>.json                      names it, with its checksum; written last

The folder belongs to the settings, and so does a save. The two newest are kept: one that is damaged is named on stderr
and passed over for the one before it. All go when the checkpoint is committed.
"""

from __future__ import annotations

import secrets
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.errors import BadInput, CorruptLog, FreshetError
from components.parameters import log
from components.parameters.arrays import Array
from components.parameters.log import LogFile
from components.storage import Storage

if TYPE_CHECKING:
    from model.trainer import Trainer

KEPT = 2
NOT_USED = "this save is not used, but the one before it, if there is one"
LOSSES, EVAL_LOSSES = "course/losses", "course/eval_losses"


class Measured(BaseModel):
    """What the eval part said about the model before the model learned from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: dict[str, float]
    curves: dict[str, tuple[list[float], list[float], list[int]]] = Field(description="calibration, by head")


@dataclass
class Course:
    """How far a pretraining has come, beside what its trainer holds."""

    item_files: list[str]  # the item log as it was when the pretraining began
    losses: list[float] = field(default_factory=list)  # of each batch of the train part
    measured: Measured | None = None  # None: still learning from the train part
    eval_losses: list[float] = field(default_factory=list)  # of each batch of the eval part
    policy_counts: dict[str, float] = field(default_factory=dict)  # of the processes before this one


class Save(BaseModel):
    """The manifest of a save."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str = Field(description="of the pretrain config that it belongs to")
    step: int = Field(description="training steps done")
    item_files: list[str]
    measured: Measured | None
    policy_counts: dict[str, float]
    file: LogFile
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class Found:
    """A proven save."""

    url: str
    step: int
    course: Course
    state: dict[str, Array]

    def restore(self, trainer: Trainer) -> None:
        """Put a new trainer where the saved one stood; BadInput when the save is of other software."""
        import torch

        try:
            trainer.load_state({name: torch.from_numpy(np.array(array)) for name, array in self.state.items()})
        except (FreshetError, KeyError, ValueError, TypeError) as error:
            raise BadInput(
                f"{self.url} does not fit this model, though it has its settings ({error}): another version of Freshet "
                "wrote it; go on with that version, or delete the folder of the save to begin anew"
            ) from error


class Saves:
    """The saves of one pretraining; every_s: seconds from one to the next, 0 = none are written."""

    def __init__(self, storage: Storage, folder: str, digest: str, every_s: float) -> None:
        self.storage, self.folder, self.digest, self.every_s = storage, saves_folder(folder), digest, every_s
        self._kept: list[set[str]] = []  # files of each save that stays, oldest first
        self._saved_at = time.monotonic()

    def newest(self) -> Found | None:
        """The newest save that is whole; each that is not is named on stderr."""
        manifests = [path for path in self.storage.list(self.folder) if path.endswith(".json")]
        for path in reversed(manifests):
            try:
                found, files = self._read(path)
            except CorruptLog as error:
                print(f"warning: {error}", file=sys.stderr, flush=True)
                continue
            self._kept = [files]
            return found
        if manifests:
            print(f"warning: no save in {self.storage.url(self.folder)} can be used; beginning anew", file=sys.stderr)
        return None

    def after_step(self, trainer: Trainer, course: Course) -> None:
        """Save when it is time. A store that refuses does not stop the training: it is said, and tried again later."""
        if not self.every_s or time.monotonic() - self._saved_at < self.every_s:
            return
        try:
            self._write(trainer, course)
        except Exception as error:
            print(
                f"warning: step {trainer.step} could not be saved in {self.storage.url(self.folder)} ({error!r}); "
                f"training goes on, the next try is in {self.every_s:g} s",
                file=sys.stderr,
                flush=True,
            )
        self._saved_at = time.monotonic()  # at the end: writing a large state must not take all the time there is

    def _write(self, trainer: Trainer, course: Course) -> None:
        from components.training import policy_counts

        content: dict[str, Array] = {name: tensor.numpy() for name, tensor in trainer.export_state().items()}
        content |= {LOSSES: np.array(course.losses), EVAL_LOSSES: np.array(course.eval_losses)}
        name = f"{self.folder}/step-{trainer.step:09}"
        save = Save(
            digest=self.digest,
            step=trainer.step,
            item_files=course.item_files,
            measured=course.measured,
            policy_counts=policy_counts(trainer, course.policy_counts),
            file=log.write_file(self.storage, f"{name}-{secrets.token_hex(4)}.safetensors", content),
        )
        manifest = f"{name}.json"
        self.storage.write_bytes(manifest, save.model_dump_json(indent=1).encode())
        self._kept = [*self._kept, {manifest, save.file.path}][-KEPT:]
        _delete(self.storage, self.folder, except_for=set().union(*self._kept))

    def _read(self, path: str) -> tuple[Found, set[str]]:
        """CorruptLog when the save is damaged or belongs to other settings."""
        url = self.storage.url(path)
        try:
            save = Save.model_validate_json(self.storage.read_bytes(path))
        except FileNotFoundError as error:
            raise CorruptLog(f"{url} has gone; {NOT_USED}") from error
        except ValidationError as error:
            raise CorruptLog(f"{url} is truncated or no manifest of a save; {NOT_USED}") from error
        if save.digest != self.digest:
            raise CorruptLog(f"{url} belongs to the settings {save.digest}, not to {self.digest}; {NOT_USED}")
        state = log.read_file(self.storage, save.file, NOT_USED)
        losses, eval_losses = ([float(loss) for loss in state.pop(name, ())] for name in (LOSSES, EVAL_LOSSES))
        course = Course(save.item_files, losses, save.measured, eval_losses, save.policy_counts)
        return Found(url, save.step, course, state), {path, save.file.path}


def saves_folder(folder: str) -> str:
    return f"{folder}/saves"


def delete_saves(storage: Storage, folder: str) -> None:
    """For a checkpoint folder whose checkpoint is committed."""
    _delete(storage, saves_folder(folder), except_for=set())


def _delete(storage: Storage, folder: str, except_for: set[str]) -> None:
    """Manifests first, so that none names a file that has gone."""
    gone = [path for path in storage.list(folder) if path not in except_for]
    for path in sorted(gone, key=lambda path: not path.endswith(".json")):
        storage.delete(path)
