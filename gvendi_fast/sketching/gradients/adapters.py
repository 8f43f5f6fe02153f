"""Adapters: which parameters of a model are those of small trained layers beside frozen ones, as PEFT adds them.

PEFT puts a layer of its own in the place of every layer it adapts: it holds the layer that was there (`base_layer`, or
`original_module` where a whole copy is trained) and, by adapter's name, what it adds. What that is, it says itself in
`adapter_layer_names`. The model around those layers is the same model, so it is sketched as any other is; which
parameters a gradient has is all that differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from gvendi_fast.base.errors import GvendiError

# Which parameters a gradient is of.
TRAINABLE, ADAPTERS, BASE = CHOICES = ("trainable", "adapters", "base")


def check_choice(parameters: str) -> None:
    """GvendiError for a word that is none of CHOICES."""
    if parameters not in CHOICES:
        raise GvendiError(f"parameters is {parameters!r}; wanted one of {', '.join(CHOICES)}")


def chosen(model: nn.Module, named: Mapping[str, Tensor], parameters: str = TRAINABLE) -> dict[str, Tensor]:
    """Of a model's parameters by name, those that a gradient is of.

    parameters: "adapters", the active ones; "base", what is none of any adapter; "trainable", what requires a gradient,
        and if nothing does the active adapters, or, where there are none, everything.
    Raises GvendiError where adapters are asked for and there are none, or are there and do not act.
    """
    check_choice(parameters)
    for path, layer in _adapted_at(model):
        if any("trainable_tokens" in where for where in layer.adapter_layer_names) and _acts(layer):
            raise GvendiError(
                f"the adapter of {path!r} trains single rows of the embedding (trainable_token_indices) and looks them "
                "up without the embedding's own forward, where gradients start; sketch the model without that adapter"
            )
    if parameters == BASE:
        others = set().union(*(_added(layer) for _, layer in _adapted_at(model)))
        return {name: p for name, p in named.items() if id(p) not in others}
    required = {name: p for name, p in named.items() if p.requires_grad}
    if parameters == TRAINABLE and (required or not has_adapters(model)):
        return required or dict(named)
    active = set().union(*(_active(path, layer) for path, layer in _adapted_at(model)))
    found = {name: p for name, p in named.items() if id(p) in active}
    if not found:
        raise GvendiError(
            'parameters is "adapters", but the model has none that is active; load one (--proxy FOLDER with '
            'adapter_config.json, or peft.PeftModel.from_pretrained), or give parameters="base"'
        )
    return found


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer of a model is adapted."""
    return next(_adapted_at(model), None) is not None


def _adapted_at(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if getattr(module, "adapter_layer_names", None) and hasattr(module, "active_adapters"):
            yield path, module


def _added(layer: nn.Module) -> set[int]:
    """Ids of the parameters that an adapted layer has beside those of the layer that was there."""
    before = getattr(layer, "base_layer", None), getattr(layer, "original_module", None)
    there = {id(p) for module in before if isinstance(module, nn.Module) for p in module.parameters()}
    return {id(p) for p in layer.parameters()} - there


def _active(path: str, layer: Any) -> set[int]:
    """Ids of the parameters of a layer's active adapters."""
    if getattr(layer, "merged", False):
        raise GvendiError(
            f"the adapters of layer {path!r} are merged into its weight, so they take no part in the model; unmerge "
            'them (model.unmerge_adapter()), or give parameters="base"'
        )
    if getattr(layer, "disable_adapters", False):
        raise GvendiError(
            f"the adapters of layer {path!r} are disabled, so they take no part in the model; enable them "
            '(model.enable_adapters()), or give parameters="base"'
        )
    found: set[int] = set()
    for where in layer.adapter_layer_names:
        try:
            part = attrgetter(where)(layer)
        except AttributeError:
            # Of an older PEFT, or of a variant that this layer is not.
            continue
        for name in _list(layer.active_adapters):
            if isinstance(part, (nn.ModuleDict, nn.ParameterDict)) and name not in part:
                continue
            entry = part[name] if isinstance(part, (nn.ModuleDict, nn.ParameterDict)) else part
            found |= {id(p) for p in entry.parameters()} if isinstance(entry, nn.Module) else {id(entry)}
    return found


def _acts(layer: Any) -> bool:
    return not (getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False))


def _list(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
