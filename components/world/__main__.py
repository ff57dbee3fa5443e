"""python -m components.world"""

from components.config import cli
from components.world.run import ExportConfig, run

if __name__ == "__main__":
    raise SystemExit(cli(ExportConfig, run))
