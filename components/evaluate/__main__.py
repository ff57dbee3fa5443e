from components.config import cli
from components.evaluate.config import EvaluateConfig
from components.evaluate.run import run

raise SystemExit(cli(EvaluateConfig, run))
