"""Arguments of the public API that a wrong type would turn into another value without a word."""

from __future__ import annotations

import operator
from typing import Any

from gvendi_fast.base.errors import GvendiError


def whole(value: Any, name: str, wanted: str, least: int | None = None) -> int:
    """The value as an int; GvendiError for anything but a whole number, 2.0 and True included, and below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or (least is not None and number < least):
        raise GvendiError(f"{name} is {value!r}; wanted {wanted}")
    return number
