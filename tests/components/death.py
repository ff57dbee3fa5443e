"""Death of the process at a chosen call."""

from __future__ import annotations

from typing import Any

import pytest


class Killed(BaseException):
    """Not an Exception: no handler in the product may swallow it."""


def die(patch: pytest.MonkeyPatch, owner: type, name: str, at: int, after: bool = True) -> None:
    """Kill the process at the at-th call of a method, before or after it did its work."""
    original, calls = getattr(owner, name), [0]

    def mortal(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == at and not after:
            raise Killed
        result = original(self, *arguments, **keywords)
        if calls[0] == at:
            raise Killed
        return result

    patch.setattr(owner, name, mortal)
