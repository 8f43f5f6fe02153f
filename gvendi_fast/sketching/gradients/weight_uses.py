"""Whether a weight is used by its own layer alone.

The gradient of a layer's weight follows from the layer's input and output only if nothing else uses the weight. An
adapter may: it holds the layer and can take its weight, multiply it by something and do without the layer's forward.
So may an autograd function of a model's own, a view that was kept, and code for longer texts alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing
from gvendi_fast.sketching.gradients.graph import edges_to_leaves
from gvendi_fast.sketching.gradients.quantised import is_code
from gvendi_fast.sketching.gradients.taps import NORM, QUANTISED, Tap
from gvendi_fast.sketching.gradients.text_path import text_ids

# Rows and tokens of the trial.
ROWS, TOKENS = 2, 4
# Tokens of the longer one, and the settings of configurations that say how many positions there are.
LONG = 16
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


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
        logits = model(input_ids=text_ids(model, ROWS, TOKENS), use_cache=False).logits
        uses = Counter(id(leaf) for _, leaf in edges_to_leaves(logits))
    for name, weight in weights.items():
        if uses[id(weight)] > runs[name]:
            raise GvendiError(
                f"the model uses the weight {name!r} also without running its layer (it has an adapter that does), so "
                "the weight's gradient does not follow from what the layer reads and gives; leave it out with "
                f"exclude=[{name!r}]"
            )
    return {name for name, p in watched.items() if uses[id(p)]}


@dataclass(frozen=True)
class Place:
    """Where a parameter is, which may be another tensor from pass to pass."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> Tensor | None:
        """The tensor that is there."""
        return self.module._parameters.get(self.attribute)

    def require(self, undo: list[Callable[[], object]]) -> Tensor | None:
        """Let it require a gradient until undone; None, and nothing is done, where it cannot."""
        parameter = self.parameter
        if parameter is None or is_code(parameter) or parameter.is_inference():
            return None
        undo.append(self._release)
        return parameter.requires_grad_(True)

    def _release(self) -> None:
        if self.parameter is not None:
            self.parameter.requires_grad_(False)


class OwnUses:
    """The edges of autograd's graph by which layers with a tap use their own parameters, in a trial.

    Any other edge to such a parameter is a use that no tap sees: by an autograd function, through a view that was kept,
    or where a text is longer than the one that the layers were looked at with.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names
        # Nodes, not their ids: what is not held may be made anew.
        self._edges: set[tuple[Any, int]] = set()

    def note(self, module: nn.Module, ends: Set[Any], output: Any) -> None:
        """A module with parameters of `names` gave this output; ends: the nodes that its input came from."""
        own = {id(p) for p in module._parameters.values() if p is not None} & self.names.keys()
        for node, leaf in edges_to_leaves(output, ends):
            if id(leaf) in own:
                self._edges.add((node, id(leaf)))

    def check(self, outputs: Any) -> None:
        """Raise GvendiError naming the parameters that outputs depend on by another edge."""
        found = {
            self.names[id(leaf)]
            for node, leaf in edges_to_leaves(outputs)
            if id(leaf) in self.names and (node, id(leaf)) not in self._edges
        }
        if found:
            names = sorted(found)
            raise GvendiError(
                f"the model uses the parameters {', '.join(map(repr, names))} also without running their layers, by an "
                "autograd function of its own, a view that was kept, or for longer texts alone, so that their "
                "gradient does not follow from what the layers read and give; leave them out with "
                f"exclude={names}"
            )


def trial_text(model: nn.Module) -> Tensor:
    """ids [1, T] of a text, as long as the model has positions for, that shows what four tokens do not."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(config, name, None) for name in _POSITIONS]
    limits = [n for n in limits if isinstance(n, int) and n > 0]
    return text_ids(model, 1, min([LONG, *limits]))


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
