"""gvendi_fast: measure and grow the diversity of language-model training data (G-Vendi, arXiv 2505.20161)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gvendi_fast.base._version import __version__

# Loaded on first use, so that importing the package costs no more than torch and numpy.
_EXPORTS = {
    "DiversityMeter": "gvendi_fast.integrations.meter",
    "GvendiCallback": "gvendi_fast.integrations.trainer",
    "GvendiError": "gvendi_fast.base.errors",
    "GvendiLightningCallback": "gvendi_fast.integrations.lightning",
    "ProxySketches": "gvendi_fast.integrations.candidates",
    "SketchSpec": "gvendi_fast.kernels.sketch_matrix",
    "SourceSampler": "gvendi_fast.integrations.source_weights",
    "SourceWeights": "gvendi_fast.integrations.source_weights",
    "GainSampler": "gvendi_fast.integrations.sampler",
    "GradientSketcher": "gvendi_fast.sketching.gradients.sketcher",
    "GroupDiversityReward": "gvendi_fast.integrations.rewards",
    "RolloutSketcher": "gvendi_fast.integrations.rollouts",
    "VendiState": "gvendi_fast.vendi",
    "gvendi": "gvendi_fast.vendi",
    "group_diversity_rewards": "gvendi_fast.integrations.rewards",
    "group_gains": "gvendi_fast.vendi.group_gains",
    "group_gvendi": "gvendi_fast.vendi.groups",
    "jackknife": "gvendi_fast.vendi",
    "load_proxy": "gvendi_fast.sketching.proxy.load",
    "pack_with_sources": "gvendi_fast.integrations.sources",
    "score": "gvendi_fast.analysis.scoring",
    "select": "gvendi_fast.selection",
    "self_check": "gvendi_fast.sketching.self_check",
    "sketch": "gvendi_fast.sketching.sketch",
    "use_backend": "gvendi_fast.kernels.backends",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    # Under `as` a name counts as public; a checker does not read the list above.
    from gvendi_fast.analysis.scoring import score as score
    from gvendi_fast.base.errors import GvendiError as GvendiError
    from gvendi_fast.integrations.candidates import ProxySketches as ProxySketches
    from gvendi_fast.integrations.lightning import GvendiLightningCallback as GvendiLightningCallback
    from gvendi_fast.integrations.meter import DiversityMeter as DiversityMeter
    from gvendi_fast.integrations.rewards import GroupDiversityReward as GroupDiversityReward
    from gvendi_fast.integrations.rewards import group_diversity_rewards as group_diversity_rewards
    from gvendi_fast.integrations.rollouts import RolloutSketcher as RolloutSketcher
    from gvendi_fast.integrations.sampler import GainSampler as GainSampler
    from gvendi_fast.integrations.source_weights import SourceSampler as SourceSampler
    from gvendi_fast.integrations.source_weights import SourceWeights as SourceWeights
    from gvendi_fast.integrations.sources import pack_with_sources as pack_with_sources
    from gvendi_fast.integrations.trainer import GvendiCallback as GvendiCallback
    from gvendi_fast.kernels.backends import use_backend as use_backend
    from gvendi_fast.kernels.sketch_matrix import SketchSpec as SketchSpec
    from gvendi_fast.selection import select as select
    from gvendi_fast.sketching.gradients.sketcher import GradientSketcher as GradientSketcher
    from gvendi_fast.sketching.proxy.load import load_proxy as load_proxy
    from gvendi_fast.sketching.self_check import self_check as self_check
    from gvendi_fast.sketching.sketch import sketch as sketch
    from gvendi_fast.vendi import VendiState as VendiState
    from gvendi_fast.vendi import gvendi as gvendi
    from gvendi_fast.vendi import jackknife as jackknife
    from gvendi_fast.vendi.group_gains import group_gains as group_gains
    from gvendi_fast.vendi.groups import group_gvendi as group_gvendi
else:
    # Out of a checker's sight, which would give every misspelt name a type by it.
    def __getattr__(name: str) -> Any:
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
