"""Which process does which work: this one, the ranks of torchrun, accelerate and Slurm, or the workers of Ray."""

import importlib
from typing import TYPE_CHECKING, Any

from gvendi_fast.base.engine import Engine, LocalEngine
from gvendi_fast.engines.choice import engine_of
from gvendi_fast.engines.ranks import RanksEngine
from gvendi_fast.engines.ray import RayEngine

if TYPE_CHECKING:
    from gvendi_fast.engines.sketch_actor import SketchActor as SketchActor

__all__ = ["Engine", "LocalEngine", "RanksEngine", "RayEngine", "SketchActor", "engine_of"]


def __getattr__(name: str) -> Any:
    # It brings torch and transformers with it, which an engine alone does not need.
    if name != "SketchActor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("gvendi_fast.engines.sketch_actor").SketchActor
