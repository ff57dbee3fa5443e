"""Ranking on KuaiRand-Pure: baselines and HSTU, frozen and continually trained, on the five windows 1 to 5 May 2022.

    python -m model.experiments.kuairand --data path/to/KuaiRand-Pure [--day-offset 8] [--set dim=64 --set epochs=3]

Pretrains on all days before 1 May. Each window is then evaluated before it is trained on (prequential). Prints the mean
over the windows as a Markdown table. A day starts at midnight `day-offset` hours east of UTC; the file's own
`date` column is 8, the baselines' published figures are too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from components.schemas import action_bit
from model.baselines.item_user_rate import ItemUserRate
from model.catalogue import ItemCatalogue
from model.dataset import SequenceDataset
from model.experiments import command
from model.experiments.kuairand_data import HOUR_US, Log, day_us, read_catalogue, read_log, sequences
from model.metrics import auc, calibration, normalised_entropy
from model.ranker import Ranker, RankerConfig
from model.trainer import Trainer

ACTIONS = ("click", "long_view", "like")
FIRST_WINDOW, WINDOWS, CONTEXT = "2022-05-01", 5, 64
DAY_US = 24 * HOUR_US
Metrics = dict[str, float]


def mean(rows: Sequence[Metrics]) -> Metrics:
    """Mean of each figure over the windows; seconds are means too."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def baseline(log: Log, starts: Sequence[int], *, daily: bool, with_page: bool) -> Metrics:
    """Mean metrics of the item and user rate baseline, frozen before the first window or updated daily."""
    columns = {"item": log.item, "user": log.user, "page": log.page}
    rows: list[Metrics] = [{} for _ in starts]
    for action in ACTIONS:
        label = (log.actions & action_bit(action)) > 0
        model, counted = ItemUserRate(with_page=with_page), -(2**62)
        for row, start in zip(rows, starts, strict=True):
            if daily or start == starts[0]:
                new = (log.time >= counted) & (log.time < start)
                model.update({name: column[new] for name, column in columns.items()}, label[new])
                counted = start
            now = (log.time >= start) & (log.time < start + DAY_US)
            p = model.predict({name: column[now] for name, column in columns.items()})
            row[f"auc_{action}"], row[f"ne_{action}"] = auc(label[now], p), normalised_entropy(label[now], p)
            row[f"calibration_{action}"] = calibration(label[now], p)
    return mean(rows)


def hstu(
    log: Log, catalogue: ItemCatalogue, starts: Sequence[int], config: RankerConfig
) -> tuple[list[Metrics], list[Metrics], Metrics]:
    """Metrics per window of the frozen and of the continually trained ranker, and seconds of each phase."""
    trainer = Trainer(Ranker(config, catalogue))
    begin = time.perf_counter()
    trainer.fit(SequenceDataset(sequences(log, 0, starts[0], 0)))
    seconds = {"pretrain_s": time.perf_counter() - begin}
    windows = [SequenceDataset(sequences(log, start, start + DAY_US, CONTEXT)) for start in starts]
    frozen = [trainer.evaluate(window) for window in windows]
    continual, training = [], 0.0
    for window in windows:
        continual.append(trainer.evaluate(window))
        begin = time.perf_counter()
        trainer.fit(window, continual=True)
        training += time.perf_counter() - begin
    return frozen, continual, seconds | {"window_s": training / len(windows)}


def table(rows: dict[str, Metrics]) -> str:
    """Markdown: one line per model."""
    heads = ("click", "long_view", "like")
    lines = ["| model | " + " | ".join(f"{h} AUC | {h} NE" for h in heads) + " | click calibration |"]
    lines.append("|---" * (2 * len(heads) + 2) + "|")
    for name, row in rows.items():
        cells = [f"{row[f'auc_{h}']:.4f} | {row[f'ne_{h}']:.4f}" for h in heads]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['calibration_click']:.3f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of KuaiRand-Pure")
    parser.add_argument("--day-offset", type=int, default=8, help="hours that a day starts before UTC midnight")
    parser.add_argument("--threads", type=int, default=1, help="threads of the tensor library; the batches are small")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the ranker")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    folder = arguments.data / "data" if (arguments.data / "data").is_dir() else arguments.data
    log, catalogue = read_log(folder), read_catalogue(folder)
    first = day_us(FIRST_WINDOW, arguments.day_offset)
    starts = [first + i * DAY_US for i in range(WINDOWS)]
    config = RankerConfig.model_validate(dict(pair.split("=", 1) for pair in arguments.set))
    frozen, continual, seconds = hstu(log, catalogue, starts, config)
    rows = {
        f"rates{' + page' if page else ''}, {'daily' if daily else 'frozen'}": baseline(
            log, starts, daily=daily, with_page=page
        )
        for page in (False, True)
        for daily in (False, True)
    } | {"HSTU, frozen": mean(frozen), "HSTU, continual": mean(continual)}
    print(table(rows))
    for day, (one, other) in enumerate(zip(frozen, continual, strict=True), start=1):
        gain = other["auc_click"] - one["auc_click"]
        print(f"window {day}: click AUC frozen {one['auc_click']:.4f} continual {other['auc_click']:.4f} ({gain:+.4f})")
    gains = {
        f"{phase}_{action}_auc_gain": rows[f"HSTU, {phase}"][f"auc_{action}"] - rows[f"rates, {kind}"][f"auc_{action}"]
        for phase, kind in (("frozen", "frozen"), ("continual", "daily"))
        for action in ("click", "long_view")
    }
    figures = {f"{name}_click_auc": row["auc_click"] for name, row in rows.items()}
    print("RESULT " + json.dumps(gains | figures | seconds | {"config": config.model_dump()}))


if __name__ == "__main__":
    command.run(main)
