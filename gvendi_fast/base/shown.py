"""Numbers as people read them: no minus before a zero, no exponents, and limits never rounded to the wrong side."""

from __future__ import annotations

import math

# Scores of float32 sketches are rounded by less than this share: a limit that is exceeded by it is met.
_ROUNDING = 1e-6


def shown(value: float, form: str) -> str:
    """format(value, form), where a value that is shown as zero has no minus: -0.00001 with ".4f" is 0.0000."""
    text = format(value, form)
    if value <= 0 and not any(digit in text for digit in "123456789"):
        return format(0.0, form)
    return text


def significant(value: float, digits: int = 4) -> str:
    """A finite number to so many significant digits, all of those before the point."""
    return _fixed(value, _decimals(value, digits))


def at_most(value: float, digits: int = 4) -> str:
    """An upper limit above 0 as `significant` shows it, but rounded up: what keeps the limit is not above the text."""
    decimals = _decimals(value, digits)
    scale = 10.0**decimals
    return _fixed(math.ceil(value * scale * (1 - _ROUNDING)) / scale, decimals)


def number(value: float) -> str:
    """About four significant digits, in columns: 1.23, 12.3, 123.4, 1,234."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return shown(value, f",.{digits}f")


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0


def _fixed(value: float, decimals: int) -> str:
    text = shown(value, f",.{decimals}f")
    return text.rstrip("0").rstrip(".") if "." in text else text
