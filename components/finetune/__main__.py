from components.config import cli
from components.finetune.config import FinetuneConfig
from components.finetune.run import run

raise SystemExit(cli(FinetuneConfig, run))
