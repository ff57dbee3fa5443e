from components.config import cli
from components.sequences.config import SequencesConfig
from components.sequences.run import run

raise SystemExit(cli(SequencesConfig, run))
