"""`gvendi info`: what is there, what is not, and why."""

from __future__ import annotations


def info() -> None:
    """Show backends, instruction set, number formats and versions, and the reasons for what is missing."""
    from gvendi_fast.about import describe

    for name, value in describe().items():
        print(f"{name:<24}{value}")
