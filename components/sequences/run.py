"""Build a data set of sequences, one row per user, from the interactions that join has published.

Reads   interactions/window=*/manifest.json and the files they name
Writes  sequences/<dataset id>/ with the parts train and (if split) eval, manifest last

  --mode=history  train = interactions before --split; eval = those from --split to --end, each after up to
                  --context-interactions earlier ones, without loss before new_from
  --mode=window   train = the interactions of --window, each user's after up to --context-interactions earlier ones

The dataset id depends on the settings and the windows inside alone; a finished data set is returned, not built again.

examples:
  python -m components.sequences --mode=history --split=2022-04-29T00:00:00Z --end=2022-05-01T00:00:00Z
  python -m components.sequences --mode=window --window=20220501T000000Z-20220502T000000Z
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from components.errors import BadInput
from components.join.run import manifests_of, published
from components.manifests import Manifest, find, new_attempt, publish
from components.schemas import INTERACTIONS
from components.sequence_data import dataset_folder, manifest_path
from components.sequences.config import SequencesConfig
from components.storage import Storage
from components.windows import Window, parse_time
from spark_jobs import event_log
from spark_jobs.sequences import observed, sequences

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

INTERACTIONS_PER_FILE = 1_000_000


class SequencesResult(BaseModel):
    """The data set that was built, or found."""

    dataset: str = Field(description="dataset id")
    folder: str = Field(description="folder of the data set, relative to the root")
    manifest: str = Field(description="path of the manifest, relative to the root")
    windows: list[str] = Field(description="windows whose interactions have loss in it")
    counts: dict[str, int] = Field(description="rows, interactions (with loss) and context per part")


def run(config: SequencesConfig) -> SequencesResult:
    """Build the data set. BadInput: nothing joined yet, a window that is not joined, times that do not fit."""
    storage = Storage(config.root)
    joined = published(storage)
    if not joined:
        raise BadInput(f"{storage.url('interactions')} has no joined window; run python -m components.join first")
    if config.mode == "window":
        windows, context = _window(config, joined)
    else:
        windows, context = _history(config, joined), []
    dataset = dataset_id(config, windows)
    folder = dataset_folder(dataset)
    manifest = find(storage, folder) or _build(config, storage, windows, context, dataset)
    return SequencesResult(
        dataset=dataset,
        folder=folder,
        manifest=manifest_path(dataset),
        windows=manifest.windows,
        counts=manifest.counts,
    )


def dataset_id(config: SequencesConfig, windows: list[Window]) -> str:
    """A pure function of what is computed (not where) and of the windows inside."""
    content = config.model_dump(mode="json", exclude={"root", "spark"})
    keys = [window.key for window in windows]
    digest = hashlib.sha256(json.dumps([content, keys], sort_keys=True).encode()).hexdigest()[:12]
    whole = Window(windows[0].start, windows[-1].end)
    return f"{config.mode}-{whole.key}-{digest}"


def _window(config: SequencesConfig, joined: list[Window]) -> tuple[list[Window], list[Window]]:
    """The window itself, and the windows before it, which give context."""
    if config.split or config.end:
        raise BadInput("--split and --end belong to --mode=history; leave them out, or change the mode")
    if not config.window:
        raise BadInput(f"--mode=window needs a --window; the last joined one is --window={joined[-1].key}")
    window = Window.parse(config.window)
    if window not in joined:
        raise BadInput(
            f"window {config.window} is not joined; run python -m components.join --window={config.window} first "
            f"(the last joined window is {joined[-1].key})"
        )
    return [window], [other for other in joined if other.start < window.start]


def _history(config: SequencesConfig, joined: list[Window]) -> list[Window]:
    if config.window:
        raise BadInput("--window belongs to --mode=window; leave it out, or change the mode")
    end = parse_time(config.end) if config.end else joined[-1].end
    for window in joined:
        if window.start < end < window.end:
            raise BadInput(
                f"--end={config.end} lies inside the joined window {window.key}; choose its start or its end"
            )
    windows = [window for window in joined if window.end <= end]
    if not windows:
        raise BadInput(f"no joined window ends by --end={config.end}; the first is {joined[0].key}")
    if config.split and not windows[0].start < parse_time(config.split) < end:
        raise BadInput(
            f"--split={config.split} leaves train or eval empty; choose a time between "
            f"{windows[0].start.isoformat()} and {end.isoformat()}"
        )
    return windows


def _build(
    config: SequencesConfig, storage: Storage, windows: list[Window], before: list[Window], dataset: str
) -> Manifest:
    from spark_jobs.session import session, tune

    spark = session(config.spark, config.root)
    folder = dataset_folder(dataset)
    attempt = new_attempt(folder)
    manifests = manifests_of(storage, [*windows, *before])
    own, earlier = (
        event_log.read(spark, storage, [path for m in some for path in m.files["data"]], INTERACTIONS)
        for some in (manifests[: len(windows)], manifests[len(windows) :])
    )
    tune(spark, sum(m.counts["interactions"] for m in manifests))
    size = sum(m.counts["interactions"] for m in manifests[: len(windows)])
    files: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    with event_log.naming_bad_files():
        for part, (rows, new) in _parts(config, own, earlier).items():
            built = sequences(rows, new, config.context_interactions)
            files[part], found = _write(built, storage, f"{attempt}/{part}", size)
            counts |= {f"{part}_{name}": count for name, count in found.items()}
    manifest = Manifest(
        kind="sequences",
        name=dataset,
        windows=[window.key for window in windows],
        inputs=[f"interactions/window={m.name}/manifest.json" for m in manifests],
        files=files,
        counts=counts,
        config=config.model_dump(mode="json", exclude={"root", "spark"}),
    )
    return publish(storage, folder, manifest)


def _parts(config: SequencesConfig, own: DataFrame, earlier: DataFrame) -> dict[str, tuple[DataFrame, Column]]:
    """Part -> (interactions, which of them have loss)."""
    from pyspark.sql import functions as F

    if config.mode == "window":
        users = F.broadcast(own.select("user_id").distinct())
        context = earlier.join(users, "user_id", "left_semi").withColumn("own", F.lit(False))
        return {"train": (own.withColumn("own", F.lit(True)).unionByName(context), F.col("own"))}
    if not config.split:
        return {"train": (own, F.lit(True))}
    later = F.col("timestamp") >= F.lit(parse_time(config.split))
    return {"train": (own.where(~later), F.lit(True)), "eval": (own, later)}


def _write(rows: DataFrame, storage: Storage, folder: str, size: int) -> tuple[list[str], dict[str, int]]:
    """Write rows sorted by user to few files; returns them and the counts."""
    counted, observation = observed(rows)
    files = max(1, -(-size // INTERACTIONS_PER_FILE))
    placed = counted.repartition(1) if files == 1 else counted.repartitionByRange(files, "user_id")
    placed.sortWithinPartitions("user_id", "timestamp", "request_id").write.parquet(storage.spark_url(folder))
    found = observation.get
    counts = {"rows": found["rows"], "interactions": found["new"], "context": found["context"]}
    return [path for path in storage.list(folder) if path.endswith(".parquet")], counts
