"""Whether the sketches of a step's samples add up to the sketch of the step's whole gradient, which autograd forms.

The sketch is linear, so they must, unless a part of the gradient goes past the layers: by a loss that takes a weight
itself, a penalty on weights, code that runs in train mode alone. What the layers do not see no tap can see, but the
sum tells that it is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gvendi_fast.kernels import reference
from gvendi_fast.sketching.gradients.layer_ops import rows
from gvendi_fast.sketching.gradients.layer_sketch import layer_sketch

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.sketcher import GradientSketcher

# Parameters above which a tap does not look by itself: each is folded once.
MOST = 500_000_000
# Relative differences that are rounding: of float32 (products may be of TF32), and where anything is narrower.
EXACT, NARROW = 5e-3, 5e-2


class WholeGradient:
    """The sketch of all gradients that some parameters get from here on, until `end`."""

    def __init__(self, sketcher: GradientSketcher, parameters: Mapping[str, Tensor]) -> None:
        self._sketcher = sketcher
        self.sketch = torch.zeros(sketcher.spec.dim, dtype=torch.float64)
        self.sum = torch.zeros(sketcher.spec.dim, dtype=torch.float64)
        self._hooks = [p.register_hook(partial(self._add, name)) for name, p in parameters.items()]

    def _add(self, name: str, gradient: Tensor) -> None:
        own, g = self._sketcher, gradient.detach()
        if own.spec.kind == "rademacher" or name in own.stacked or g.dim() not in (1, 2):
            self.sketch += reference.sketch_of_gradient({name: g}, own.spec, own.transposed, own.stacked)
            return
        # By the kernels: a matrix [O, I] is the sum over its columns of column times unit vector.
        sketch, out = layer_sketch(own.spec), torch.zeros(1, own.spec.dim, device=g.device)
        if g.dim() == 1:
            sketch.vector(name, None, rows(g[None]), torch.tensor([[0, 1]]), out)
        else:
            e = rows(g if name in own.transposed else g.T)
            units = sketch.transform(name, torch.eye(len(e), device=g.device))
            sketch.linear(units, [(name, e)], torch.tensor([[0, len(e)]]), out, True)
        self.sketch += out[0].double().cpu()

    def take(self, z: Tensor) -> None:
        """Sketches [S, K] that a tap gave of these gradients."""
        self.sum += z.detach().double().cpu().sum(dim=0)

    def difference(self) -> float:
        """The length of what is missing of the sum, over that of the whole; NaN where there is no gradient."""
        return float((self.sum - self.sketch).norm() / self.sketch.norm())

    def end(self) -> None:
        """Look no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
