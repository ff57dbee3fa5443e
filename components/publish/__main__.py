from components.config import cli
from components.publish.config import PublishConfig
from components.publish.run import run

raise SystemExit(cli(PublishConfig, run))
