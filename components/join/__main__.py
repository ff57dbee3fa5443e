from components.config import cli
from components.join.config import JoinConfig
from components.join.run import run

raise SystemExit(cli(JoinConfig, run))
