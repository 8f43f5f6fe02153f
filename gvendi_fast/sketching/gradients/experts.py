"""Experts in one launch: transformers' choice of how a mixture of experts computes, for the time of a pass.

From transformers 5 on most families offer, beside a loop over experts, one product of tokens sorted by expert, which a
setting of the configuration chooses. The loop gives a sketch a launch for every expert, the grouped product one for
all. On a CPU the two take the same time, forward and backward (torch 2.13, 8 experts of 512 x 2048 and 4096
rows: 0.84 to 1.4 s grouped and 0.97 to 1.05 s one by one in float32, 0.33 to 0.37 and 0.38 to 0.39 in bfloat16).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

GROUPED, LOOP = "grouped_mm", "eager"
# Kernels of the grouped product read rows of whole 16 bytes.
_ALIGNED = 16


def choices(modules: Iterable[nn.Module]) -> list[tuple[Any, str]]:
    """The configurations that choose how these modules compute their experts, and what a pass chooses.

    A grouped product, where there are kernels for it: not in float64, where the loop is chosen, and not for rows of odd
    widths, where the choice stays what it is.
    """
    found: dict[int, tuple[Any, str]] = {}
    odd: set[int] = set()
    for module in modules:
        config = getattr(module, "config", None)
        # What transformers' decorator of expert modules leaves on them.
        if hasattr(type(module), "_apply_gate") and hasattr(config, "_experts_implementation_internal"):
            weights = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
            is_wide = any(p.dtype is torch.float64 for p in weights)
            found[id(config)] = config, LOOP if is_wide else GROUPED
            if not is_wide and any(n * p.element_size() % _ALIGNED for p in weights for n in p.shape[1:]):
                odd.add(id(config))
    return [chosen for key, chosen in found.items() if key not in odd]
