from components.config import cli
from components.pretrain.config import PretrainConfig
from components.pretrain.run import run

raise SystemExit(cli(PretrainConfig, run))
