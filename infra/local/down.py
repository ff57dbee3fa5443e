"""Stop what `make up` and `make demo` started: `python -m infra.local.down`. Data stays."""

from __future__ import annotations

import sys

from infra.local.services import Supervisor
from infra.local.stack import Stack


def main() -> int:
    for stack in (Stack.default(), Stack.demo()):
        for name in Supervisor(stack.home).stop_all():
            print(f"stopped {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
