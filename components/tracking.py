"""MLflow runs: parameters, metrics by step, pictures and inputs of one piece of work.

A run belongs to a key (what is being done). When the work starts again, the run that an attempt which died without
warning left open is closed as failed; until then, the UI shows it as running.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from components.errors import BadInput
from components.figures import Curve, calibration_plot
from components.manifests import Manifest
from components.registry import TAG, connect, origin_tags
from components.sequence_data import manifest_path
from components.storage import Storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

_BATCH = 500
_FLUSH_S = 2.0


class Run:
    """An open run; metrics by step are sent in batches."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self._pending: list[tuple[str, float, int]] = []
        self._sent = time.monotonic()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one training step."""
        self._pending += [(name, value, step) for name, value in finite(metrics).items()]
        if len(self._pending) >= _BATCH or time.monotonic() - self._sent > _FLUSH_S:
            self.flush()

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Final metrics; those that are undefined (no positives, say) are left out."""
        self._pending += [(name, value, 0) for name, value in finite(metrics).items()]
        self.flush()

    def flush(self) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for first in range(0, len(self._pending), _BATCH):
            batch = self._pending[first : first + _BATCH]
            self.client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value, step in batch])
        self._pending, self._sent = [], time.monotonic()

    def tags(self, tags: Mapping[str, object]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(TAG + name, str(value)) for name, value in tags.items()])

    def figure(self, figure: Figure, path: str) -> None:
        self.client.log_figure(self.run_id, figure, path)

    def calibration(self, curves: Mapping[str, Curve], title: str) -> None:
        """The calibration plot, when the model predicts probabilities."""
        if curves:
            self.figure(calibration_plot(curves, title), "calibration.png")

    def dataset(self, storage: Storage, manifest: Manifest, context: str) -> None:
        """Note a sequence dataset as the run's input, and keep its manifest with the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        content = manifest.model_dump_json(indent=1)
        entry = Dataset(
            name=manifest.name,
            digest=hashlib.sha256(content.encode()).hexdigest()[:12],
            source_type="freshet",
            source=json.dumps({"uri": storage.url(manifest_path(manifest.name))}),
            profile=json.dumps(manifest.counts),
        )
        self.client.log_inputs(self.run_id, [DatasetInput(entry, [InputTag("mlflow.data.context", context)])])
        self.client.log_text(self.run_id, content, f"datasets/{manifest.name}.json")


class Tracker:
    """Starts runs on one MLflow server."""

    def __init__(self, tracking_uri: str) -> None:
        self.client = connect(tracking_uri)

    @contextmanager
    def run(self, experiment: str, key: str, name: str, params: Mapping[str, Any], **tags: object) -> Iterator[Run]:
        """A run that ends FINISHED, FAILED when the block raises, or KILLED by SIGTERM or Ctrl-C."""
        where = ensure_experiment(self.client, experiment)
        self._close_abandoned(where, key)
        created = self.client.create_run(where, run_name=name, tags={TAG + "key": key})
        run = Run(self.client, created.info.run_id)
        run.tags({**origin_tags(), **tags})
        self._log_params(run, params)
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        except (SystemExit, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            run.flush()
            self.client.set_terminated(run.run_id, status)

    def finish(self, run_id: str, **tags: object) -> None:
        """Complete a run whose work was committed but whose process died before saying so."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise BadInput(
                f"the MLflow server does not know run {run_id}, which made what the storage holds; "
                "use the server that belongs to this storage root, or another root"
            ) from error
        if run.info.status != "FINISHED":
            Run(self.client, run_id).tags(tags)
            self.client.set_terminated(run_id, "FINISHED")

    def _close_abandoned(self, experiment: str, key: str) -> None:
        query = f"tags.`{TAG}key` = '{key}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([experiment], query):
            self.client.set_terminated(run.info.run_id, "FAILED")

    def _log_params(self, run: Run, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(name, str(value)) for name, value in params.items()]
        for first in range(0, len(entries), 100):
            self.client.log_batch(run.run_id, params=entries[first : first + 100])


def ensure_experiment(client: MlflowClient, name: str) -> str:
    """The id of an experiment, made if absent (also when another process makes it at the same time)."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException as error:
        made = client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or made is None:
            raise
        return str(made.experiment_id)


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without the undefined: a missing metric is told from a bad one everywhere downstream."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
