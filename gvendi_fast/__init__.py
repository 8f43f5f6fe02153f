"""gvendi_fast: measure and grow the diversity of language-model training data (G-Vendi, arXiv 2505.20161)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from gvendi_fast._version import __version__

# Loaded on first use, so that importing the package costs no more than torch and numpy.
_EXPORTS = {
    "GvendiError": "gvendi_fast.errors",
    "SketchSpec": "gvendi_fast.plan",
    "GradientSketcher": "gvendi_fast.gradients",
    "VendiState": "gvendi_fast.vendi",
    "gvendi": "gvendi_fast.vendi",
    "group_gvendi": "gvendi_fast.groups",
    "jackknife": "gvendi_fast.vendi",
    "load_proxy": "gvendi_fast.proxy",
    "score": "gvendi_fast.scoring",
    "select": "gvendi_fast.selection",
    "use_backend": "gvendi_fast.backends",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from gvendi_fast.backends import use_backend
    from gvendi_fast.errors import GvendiError
    from gvendi_fast.gradients import GradientSketcher
    from gvendi_fast.groups import group_gvendi
    from gvendi_fast.plan import SketchSpec
    from gvendi_fast.proxy import load_proxy
    from gvendi_fast.scoring import score
    from gvendi_fast.selection import select
    from gvendi_fast.vendi import VendiState, gvendi, jackknife


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
