"""Which process does which work: this one, the ranks of torchrun, accelerate and Slurm, or the workers of Ray."""

from gvendi_fast.base.engine import Engine, LocalEngine
from gvendi_fast.engines.choice import engine_of
from gvendi_fast.engines.ranks import RanksEngine
from gvendi_fast.engines.ray import RayEngine

__all__ = ["Engine", "LocalEngine", "RanksEngine", "RayEngine", "engine_of"]
