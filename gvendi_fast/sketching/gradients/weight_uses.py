"""Whether a weight is used by its own layer alone.

The gradient of a layer's weight follows from the layer's input and output only if nothing else uses the weight. An
adapter may: it holds the layer and can take its weight, multiply it by something and do without the layer's forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing
from gvendi_fast.sketching.gradients.taps import NORM, QUANTISED, Tap
from gvendi_fast.sketching.gradients.text_path import text_ids

# Rows and tokens of the trial.
ROWS, TOKENS = 2, 4


def check_uses(model: nn.Module, taps: Sequence[Tap]) -> set[str]:
    """Raise GvendiError naming a tapped weight that is used more often than its layers run.

    Read from autograd's graph of the logits of a few tokens, in which every use of a weight is an edge.
    model: without a parameter that requires a gradient; flags are as they were afterwards.
    Returns the names of the watched parameters that the logits depend on.
    """
    weights = {t.weight: t.module.weight for t in taps if t.weight and t.kind not in (NORM, QUANTISED)}
    watched = {name: t.module._parameters[own] for t in taps for own, name in t.watched}
    runs: Counter[str] = Counter()
    with undoing() as undo, torch.enable_grad():
        for tap in taps:
            if tap.weight in weights:
                undo.append(tap.module.register_forward_hook(partial(_count, runs, tap.weight)).remove)
        for weight in (*weights.values(), *watched.values()):
            undo.append(partial(weight.requires_grad_, False))
            weight.requires_grad_(True)
        uses = _edges(model(input_ids=text_ids(model, ROWS, TOKENS), use_cache=False).logits)
    for name, weight in weights.items():
        if uses[id(weight)] > runs[name]:
            raise GvendiError(
                f"the model uses the weight {name!r} also without running its layer (it has an adapter that does), so "
                "the weight's gradient does not follow from what the layer reads and gives; leave it out with "
                f"exclude=[{name!r}]"
            )
    return {name for name, p in watched.items() if uses[id(p)]}


def check_seen(used: Set[str], met: Set[str]) -> None:
    """Raise GvendiError naming parameters that logits depend on, of which a trial has met no use.

    An autograd function of one's own that computes from parameters alone is out of sight.
    """
    hidden = sorted(used - met)
    if hidden:
        raise GvendiError(
            f"the parameters {', '.join(map(repr, hidden))} are used by an operation that hides what it does (an "
            f"autograd function of its own), so no sketch of them is known; leave them out with exclude={hidden}"
        )


def _count(runs: Counter[str], name: str, *_: Any) -> None:
    runs[name] += 1


def _edges(logits: Tensor) -> Counter[int]:
    """How many edges of autograd's graph lead to each of its leaves, by id."""
    found: Counter[int] = Counter()
    waiting, seen = [logits.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if hasattr(following, "variable"):
                found[id(following.variable)] += 1
            waiting.append(following)
    return found
