"""python -m components.traffic"""

from components.config import cli
from components.traffic.config import TrafficConfig
from components.traffic.run import run

if __name__ == "__main__":
    raise SystemExit(cli(TrafficConfig, run))
