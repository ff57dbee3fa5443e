"""Command line: python -m components.serve --help"""

from components.config import cli
from components.serve.config import ServeConfig
from components.serve.run import run

raise SystemExit(cli(ServeConfig, run))
