from components.config import cli
from components.register.config import RegisterConfig
from components.register.run import run

raise SystemExit(cli(RegisterConfig, run))
