"""gvendi_fast: measure and grow the diversity of language-model training data (G-Vendi, arXiv 2505.20161)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from gvendi_fast.base._version import __version__

# Loaded on first use, so that importing the package costs no more than torch and numpy.
_EXPORTS = {
    "GvendiError": "gvendi_fast.base.errors",
    "SketchSpec": "gvendi_fast.kernels.sketch_matrix",
    "GradientSketcher": "gvendi_fast.sketching.gradients.sketcher",
    "VendiState": "gvendi_fast.vendi",
    "gvendi": "gvendi_fast.vendi",
    "group_gvendi": "gvendi_fast.vendi.groups",
    "jackknife": "gvendi_fast.vendi",
    "load_proxy": "gvendi_fast.sketching.proxy.load",
    "score": "gvendi_fast.analysis.scoring",
    "select": "gvendi_fast.selection",
    "use_backend": "gvendi_fast.kernels.backends",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from gvendi_fast.analysis.scoring import score
    from gvendi_fast.base.errors import GvendiError
    from gvendi_fast.kernels.backends import use_backend
    from gvendi_fast.kernels.sketch_matrix import SketchSpec
    from gvendi_fast.selection import select
    from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
    from gvendi_fast.sketching.proxy.load import load_proxy
    from gvendi_fast.vendi import VendiState, gvendi, jackknife
    from gvendi_fast.vendi.groups import group_gvendi


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
