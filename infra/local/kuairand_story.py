"""The demo on KuaiRand's real log: pretrain on the days up to 30 April 2022, then learn from 1 to 5 May day by day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from components.join.run import manifests_of, published
from components.manifests import read_part
from components.schemas import action_bit
from components.storage import Storage
from components.windows import Window
from infra.local.story import ONE_THREAD, Story, mean
from model.baselines.item_user_rate import ItemUserRate
from model.metrics import auc, normalised_entropy

FIRST_EVENT, FIRST_WINDOW = datetime(2022, 4, 22, tzinfo=UTC), datetime(2022, 5, 1, tzinfo=UTC)
WINDOWS = [Window.starting(FIRST_WINDOW + timedelta(days=day), timedelta(days=1)) for day in range(5)]
ACTIONS = ("click", "long_view")
SERVED_ACTIONS = {"attribution_window_s": 3600, "max_lateness_s": 3600}
FIGURES = [f"{figure}_{action}" for action in ACTIONS for figure in ("auc", "ne")]


class KuaiRandStory(Story):
    """The same DAGs as always; only the events come from files instead of users."""

    def tell(self, data: Path) -> None:
        self.data = str(data.resolve())
        past = self.run_component("ingest", source="kuairand", path=self.data, until_time=FIRST_WINDOW.isoformat())
        self.say(f"ingested {past['impressions']:,} impressions up to 30 April ({past['duplicates']:,} duplicate rows)")
        history = {"join_from": FIRST_EVENT.isoformat(), "join_until": FIRST_WINDOW.isoformat()}
        split = {"split": (FIRST_WINDOW - timedelta(days=1)).isoformat()}
        self.run_dag("build_sequences", {**history, **split, **SERVED_ACTIONS}, "build_sequences (until 30 April)")
        release = self.run_dag("pretrain", {**ONE_THREAD, "roll_out": False}, "pretrain (ranker and retriever)")
        self.run_dag("rollout", self.airflow.result(release, "release"), "rollout of the first release")
        self.wait_until_ready()
        self.results = [self.replay(window) for window in WINDOWS]
        self.check_all_runs_succeeded()

    def replay(self, window: Window) -> dict[str, float]:
        """Let one day of events arrive, then learn from it; the metrics before learning."""
        bounds = {"from_time": window.start.isoformat(), "until_time": window.end.isoformat()}
        self.run_component("ingest", source="kuairand", path=self.data, **bounds)
        run = self.train_window(window, {**ONE_THREAD, **SERVED_ACTIONS}, f"continual_training {window.start:%d %B}")
        metrics: dict[str, float] = self.airflow.result(run, "finetune_ranker")["metrics"]
        return metrics

    def quality(self) -> dict[str, dict[str, float]]:
        """Mean figures over the windows of every model and baseline, on the same interactions."""
        rows = baselines(Storage(self.stack.root))
        for name, prefix in (("HSTU frozen", "frozen_"), ("HSTU continual", "")):
            rows[name] = {f: mean([result[prefix + f] for result in self.results]) for f in FIGURES}
        return rows

    def quality_table(self) -> Table:
        table = Table(title="mean over the windows of 1 to 5 May, measured before learning", title_justify="left")
        for name in ("model", "click AUC", "click NE", "long view AUC", "long view NE"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for name, figures in self.quality().items():
            table.add_row(name, *(f"{figures[figure]:.4f}" for figure in FIGURES))
        return table


def baselines(storage: Storage) -> dict[str, dict[str, float]]:
    """The item-user rate baselines on the published interactions: without and with page, frozen and daily."""
    parts = {m.name: read_part(storage, m, "data") for m in manifests_of(storage, published(storage))}
    windows = [_columns(parts.pop(window.key)) for window in WINDOWS]
    past = _columns(pa.concat_tables(parts.values()))
    rows: dict[str, dict[str, float]] = {}
    for with_page in (False, True):
        for daily in (False, True):
            name = f"item + user rate{' + page' if with_page else ''}, {'daily' if daily else 'frozen'}"
            rows[name] = {}
            for action in ACTIONS:
                scores = _score(past, windows, action, with_page=with_page, daily=daily)
                rows[name] |= {f"auc_{action}": scores[0], f"ne_{action}": scores[1]}
    return rows


def _score(
    past: dict[str, Any], windows: list[dict[str, Any]], action: str, *, with_page: bool, daily: bool
) -> tuple[float, float]:
    rates = ItemUserRate(with_page=with_page)
    rates.update(past, past["actions"] & action_bit(action) > 0)
    aucs, entropies = [], []
    for window in windows:
        label = window["actions"] & action_bit(action) > 0
        probability = rates.predict(window)
        aucs.append(auc(label, probability))
        entropies.append(normalised_entropy(label, probability))
        if daily:
            rates.update(window, label)
    return mean(aucs), mean(entropies)


def _columns(table: pa.Table) -> dict[str, Any]:
    names = {"item": "item_id", "user": "user_id", "page": "page", "actions": "actions"}
    return {name: np.asarray(table.column(column).to_numpy()) for name, column in names.items()}
