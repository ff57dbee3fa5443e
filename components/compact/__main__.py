from components.compact.config import CompactConfig
from components.compact.run import run
from components.config import cli

raise SystemExit(cli(CompactConfig, run))
