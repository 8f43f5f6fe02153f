"""Numbers as they are printed."""

from __future__ import annotations


def shown(value: float, form: str) -> str:
    """The number in this format, but 0 without a sign of its own: -0.00001 in ".2f" is "0.00", in "+.2f" "+0.00"."""
    text = format(value, form)
    if text.startswith("-") and not text.strip("-0.,"):
        return ("+" if form.startswith("+") else "") + text[1:]
    return text
