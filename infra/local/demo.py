"""The whole loop on this machine: `python -m infra.local.demo [--data KuaiRand-Pure]` (what `make demo` runs).

Starts MLflow, Spark, Airflow and the server with an empty store, then does what people do: ingest a past, trigger the
DAGs through Airflow's API, let users come, and watch. Everything stays up until `make down`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from rich.console import Console

from components.errors import BadInput, FreshetError
from components.ingest import kuairand
from components.ingest.config import IngestConfig
from infra.local import up
from infra.local.kuairand_story import KuaiRandStory
from infra.local.services import Supervisor
from infra.local.stack import Stack
from infra.local.synthetic_story import SyntheticStory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of KuaiRand-Pure; without it the synthetic world is used")
    data: Path | None = parser.parse_args().data
    console = Console(stderr=True, highlight=False)
    try:
        if data is not None:
            _require_kuairand(data)
        run(Stack.demo(), console, data)
    except FreshetError as error:
        console.print("[red]the demo failed[/red]")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2 if isinstance(error, BadInput) else 1
    return 0


def _require_kuairand(data: Path) -> None:
    """BadInput when ingest would not find its files, which must be known before anything is emptied or started."""
    try:
        kuairand.files(IngestConfig(source="kuairand", path=str(data)))
    except BadInput as error:
        raise BadInput(f"{data} is not KuaiRand-Pure; give its folder, which holds data/log_*.csv ({error})") from error


def run(stack: Stack, console: Console, data: Path | None) -> None:
    """Tell one story on a fresh store and print what came of it."""
    for other in (stack, Stack.default()):
        Supervisor(other.home).stop_all()
    shutil.rmtree(stack.home, ignore_errors=True)
    airflow = up.start(stack, console)
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    if data is None:
        synthetic = SyntheticStory(stack, airflow, console)
        synthetic.tell()
        out.print(synthetic.table("each window is measured before it is learned from (label: click)"))
        auc = synthetic.recovery()
        out.print(
            f"after the shift: AUC {auc['continual']:.3f} continually trained, {auc['frozen']:.3f} frozen "
            f"(difference {auc['difference']:+.3f})"
        )
        synthetic.save("story", recovery=auc)
    else:
        real = KuaiRandStory(stack, airflow, console)
        real.tell(data)
        out.print(real.table("each window is measured before it is learned from (label: click)"))
        out.print(real.quality_table())
        real.save("story", quality=real.quality())
    out.print(
        f"\nall DAG runs succeeded; everything stays up until `make down`:\n{up.addresses(stack)}", soft_wrap=True
    )


if __name__ == "__main__":
    sys.exit(main())
