"""Values in messages."""

from __future__ import annotations

import reprlib

__all__ = ["shown"]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200
_SHORT.maxlevel = 4


def shown(value: object) -> str:
    """Returns `repr(value)`, shortened where it is long or nested.

    Only what is shown is read: a `repr` of megabytes takes a second, and one of a thousand nested lists fails.
    """
    return _SHORT.repr(value)
