from components.config import cli
from components.rollout.config import RolloutConfig
from components.rollout.run import run

raise SystemExit(cli(RolloutConfig, run))
