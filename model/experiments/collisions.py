"""What collisions cost: a DeepFM on MovieLens-1M with collisionless tables and with ids hashed into fewer rows.

    python -m model.experiments.collisions --data path/to/ml-1m [--seeds 5] [--plot collisions.png]

Prints the paper's Table 1 recomputed; test AUC at the paper's collision rates, at 2 x and at 4 x those; AUC and memory
by admission threshold and by time to live. The plot has the three.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from components.errors import BadInput
from model.experiments import collisions_report as report
from model.experiments import command
from model.experiments.collisions_data import read_ratings
from model.experiments.collisions_model import Settings
from model.experiments.collisions_runs import Arm, Kept, admission, arms, expiry, table_1

WIDTH = 190  # of the tables where the output is no terminal


def main(argv: Sequence[str] | None = None) -> None:
    """Command line. BadInput if the data cannot be read or fewer than two seeds are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ml-1m"), help="folder of MovieLens-1M")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm, at least 2")
    parser.add_argument("--threads", type=int, default=1, help="threads of the tensor library; the batches are small")
    parser.add_argument("--plot", default="", help="picture to write (default: none)")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        raise BadInput(f"a spread needs at least 2 seeds, got {arguments.seeds}")
    torch.set_num_threads(arguments.threads)
    begin, settings = time.perf_counter(), Settings()
    ratings = read_ratings(arguments.data)
    collisions: list[dict[int, Arm]] = []
    admissions: list[dict[int, Kept]] = []
    expiries: list[dict[int, Kept]] = []
    for seed in track(range(arguments.seeds), description="seeds", console=Console(stderr=True)):
        collisions.append(arms(ratings, settings, seed))
        admissions.append(admission(ratings, settings, seed))
        expiries.append(expiry(ratings, settings, seed))
    columns = table_1()
    console = Console(width=None if Console().is_terminal else WIDTH)
    for table in (
        report.table_1(columns),
        report.collisions(collisions),
        report.kept(admissions, report.THRESHOLD),
        report.kept(expiries, report.TIME_TO_LIVE),
    ):
        console.print(table)
    if arguments.plot:
        report.plot(collisions, admissions, expiries, Path(arguments.plot))
    result = report.figures(columns, collisions, admissions, expiries)
    run = {"seconds": time.perf_counter() - begin, "seeds": arguments.seeds, "settings": asdict(settings)}
    print("RESULT " + json.dumps(result | run))


if __name__ == "__main__":
    command.run(main)
