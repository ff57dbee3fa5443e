"""How the command line of an experiment ends where the user has to do something."""

from __future__ import annotations

import sys
from collections.abc import Callable

from components.errors import FreshetError


def run(main: Callable[[], object]) -> None:
    """Run it; an error that a user can mend is told in one line, with its exit code, and not as a traceback."""
    try:
        main()
    except FreshetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
