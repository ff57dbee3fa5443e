"""The entry for spark-submit, which brings the session along:

    spark-submit --master k8s://https://cluster ... spark_jobs/submit.py join --window=20260301T000000Z-20260302T000000Z
    spark-submit ... spark_jobs/submit.py sequences --mode=window --window=20260301T000000Z-20260302T000000Z

The arguments are those of `python -m components.join` and `python -m components.sequences`.
"""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> int:
    """Run the step named first with the arguments that follow; 2 for a wrong call."""
    from components.config import cli

    os.environ["FRESHET_SPARK"] = "submitted"
    match arguments:
        case ["join", *rest]:
            from components.join.run import JoinConfig, run

            return cli(JoinConfig, run, rest)
        case ["sequences", *rest]:
            from components.sequences.run import SequencesConfig
            from components.sequences.run import run as build

            return cli(SequencesConfig, build, rest)
    print(f"error: the first argument must be join or sequences, not {' '.join(arguments[:1])!r}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
