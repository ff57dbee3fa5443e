"""python -m components.ingest"""

from components.config import cli
from components.ingest.config import IngestConfig
from components.ingest.run import run

if __name__ == "__main__":
    raise SystemExit(cli(IngestConfig, run))
