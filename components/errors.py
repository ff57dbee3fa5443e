"""The errors a user can meet. Each message says what is wrong and what to do about it."""

from typing import ClassVar


class FreshetError(Exception):
    """Base of every error that Freshet raises on purpose."""

    exit_code: ClassVar[int] = 1
    """Of a command line: 1 = the same command may succeed later, 2 = only another one will. Airflow retries 1 alone."""


class BadInput(FreshetError):
    """The caller's data or settings are wrong: exit code 2 on a command line, a 4xx status over HTTP."""

    exit_code = 2


class AlreadyExists(FreshetError):
    """Create-if-absent found the path taken: somebody else has published first."""


class CorruptLog(FreshetError):
    """A gap, a truncated file or a bad checksum in a parameter log: nothing of it was applied."""
