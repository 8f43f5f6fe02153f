"""JSON as it should be, decoded the quickest way there is: by msgspec where it is installed, else by Python's scanner.

A decoder may refuse what Python reads (NaN, half a character, a number beyond a float's), but never reads it otherwise:
orjson makes floats of integers beyond 64 bits, so that ids would change with what is installed. Whoever is refused goes
the long way, which says what is wrong.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

_scan_once = json.JSONDecoder().scan_once


def scan_by_python(raw: bytes) -> Any:
    """The value of JSON in UTF-8 with nothing around it. Raises one of REFUSED for anything else."""
    text = raw.decode()
    value, end = _scan_once(text, 0)
    if end != len(text):
        raise ValueError("something follows the value")
    return value


if find_spec("msgspec") is None:
    scan, REFUSED = scan_by_python, (ValueError, StopIteration)
else:
    import msgspec

    scan, REFUSED = msgspec.json.Decoder().decode, (ValueError, msgspec.MsgspecError)
