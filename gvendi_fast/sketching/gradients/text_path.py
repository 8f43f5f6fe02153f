"""The text path of a model: the parameters that the loss of a text can reach, and the parts that it cannot.

Checkpoints that also see or hear hold towers, projectors and embeddings of images that text alone never runs, and
some have heads that predict tokens further ahead. Their gradient is zero whatever the text, so they are left out, and
said to be. What is reached is read from autograd's graph of the logits of a few tokens, whose leaves are parameters.

A parameter that a few tokens did not reach may be that of an expert which other tokens choose. Those are told by
structure: inside a block there is a module beside it of the same class and sizes, whose name differs in a number
alone, and which was reached. A whole block that is never run lies inside no other, so it is left out. Should a batch
run a module that was left out after all, the pass ends with an error: no sketch lacks a gradient in silence.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing
from gvendi_fast.sketching.gradients.forward import Forward
from gvendi_fast.sketching.gradients.graph import edges_to_leaves
from gvendi_fast.sketching.gradients.quantised import is_code

# Rows and tokens of the trial.
ROWS, TOKENS = 4, 4
# How far the logits of a first token may move when the tokens after it change, over their distance from the mean of
# other first tokens: rounding, as experts may see their rows in another order.
UNSEEN = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
# Names of settings in a configuration whose values are tokens that stand for what is no text.
_STANDS_IN = re.compile(r"(image|video|audio|vision|boi|eoi|boa|eoa|pad).*(token_id|token_index|_index)s?$")


@dataclass(frozen=True)
class LeftOut:
    """A part of a model that its text loss does not reach.

    part: path of the module or of the parameter; * stands for the numbers of parts that are alike.
    parameters: how many it has that a sketch would otherwise be of.
    """

    part: str
    parameters: int


@dataclass(frozen=True)
class TextPath:
    """What of a model text does not reach.

    names: of the parameters.
    unvisited: {path: module} of the modules with such parameters that were not run.
    parts: the same parameters by part of the model, the largest first.
    """

    names: frozenset[str] = frozenset()
    unvisited: Mapping[str, nn.Module] = field(default_factory=dict)
    parts: tuple[LeftOut, ...] = ()


class Unvisited(Forward):
    """A module that no text was found to run; if a batch runs it, its gradient would be missing."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(module)
        self.path = path

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Raise GvendiError."""
        raise GvendiError(
            f"the module {self.path!r} was left out as one that text does not reach, but this batch runs it, so its "
            f"gradient would be missing; leave it out knowingly with exclude=[{self.path + '.*'!r}], or drop the row"
        )


def find_text_path(
    model: nn.Module, wanted: Mapping[str, torch.Tensor], kept: Collection[str] = ()
) -> TextPath:
    """Which parameters of a model the loss of a text cannot reach.

    model: in eval mode, without a parameter that requires a gradient; flags are as they were afterwards.
    wanted: {name: parameter} of those that a sketch would be of.
    kept: names of those that are not to be reported, as they are left out otherwise.
    A parameter that takes no gradient, as a quantised weight, counts as reached if its module was run. Raises
    GvendiError where the model cannot read text by itself, or reads it in both directions.
    """
    takes = {id(p): p for p in wanted.values() if not is_code(p) and not p.is_inference()}
    ran: set[int] = set()

    def restore() -> None:
        for parameter in takes.values():
            parameter.requires_grad_(False)

    with undoing() as undo, torch.enable_grad():
        undo.append(restore)
        for parameter in takes.values():
            parameter.requires_grad_(True)
        for module in model.modules():
            undo.append(module.register_forward_hook(lambda module, *_: ran.add(id(module))).remove)
        ids = text_ids(model, ROWS, TOKENS)
        logits = _logits(model, ids)
        reached = {id(leaf) for _, leaf in edges_to_leaves(logits)}
    _check_causal(model, ids, logits.detach())
    own = {
        path: {id(t) for t in (*m._parameters.values(), *m._buffers.values())}
        for path, m in model.named_modules()
    }
    modules = dict(model.named_modules())
    for path, parameters in own.items():
        if id(modules[path]) in ran:
            reached |= {key for key in parameters if key not in takes}
    if all(id(p) in reached for p in wanted.values()):
        return TextPath()
    reached |= _choosable(modules, reached)
    missed = {name: p for name, p in wanted.items() if id(p) not in reached and name not in kept}
    keys = {id(p) for p in missed.values()}
    unvisited = {
        path: modules[path]
        for path, parameters in own.items()
        if parameters & keys and id(modules[path]) not in ran
    }
    return TextPath(
        frozenset(missed), unvisited, _parts(missed, [n for n, p in wanted.items() if id(p) in reached])
    )


def text_ids(model: nn.Module, rows: int, tokens: int) -> torch.Tensor:
    """int64 [rows, tokens] of a trial, on the embedding's device: none stands for an image, a sound or padding."""
    weight = model.get_input_embeddings().weight
    others = _stand_ins(getattr(model, "config", None))
    plain = [i for i in range(1, weight.shape[0]) if i not in others][: rows * tokens] or [0]
    return torch.tensor([plain[i % len(plain)] for i in range(rows * tokens)], device=weight.device).view(
        rows, tokens
    )


def _stand_ins(config: Any) -> set[int]:
    if config is None or not hasattr(config, "to_dict"):
        return set()
    found: set[int] = set()
    waiting = [config.to_dict()]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif _STANDS_IN.search(str(name)):
                found |= {v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}
    return found


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    try:
        return model(input_ids=ids, use_cache=False).logits
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise GvendiError(
            f"{type(model).__name__} does not read text by itself ({type(error).__name__}: {error}), as a proxy must; "
            "take a causal language model, or one whose forward pass needs input_ids alone"
        ) from error


def _check_causal(model: nn.Module, ids: torch.Tensor, logits: torch.Tensor) -> None:
    """GvendiError where the logits of the first token depend on the others: they predict what they have seen."""
    # The other tokens are those of the last row.
    others = torch.cat([ids[:, :1], ids.roll(1, dims=0)[:, 1:]], dim=1)
    apart = (logits[:, 0].float() - logits[:, 0].float().mean(dim=0)).square().sum(dim=-1).mean().sqrt()
    most = UNSEEN[logits.dtype] * apart

    def moved(tokens: torch.Tensor) -> torch.Tensor:
        # Of the first row alone: where experts have a capacity, its first token is served before all others.
        return (_logits(model, tokens)[0, 0].float() - logits[0, 0].float()).norm()

    with torch.no_grad():
        # A model that differs from run to run says nothing of its tokens; the self-check finds it.
        if moved(others) > most and moved(ids) <= most:
            raise GvendiError(
                f"{type(model).__name__} reads text in both directions: its logits depend on the tokens that they "
                "predict, so their loss measures nothing; take a causal language model, or let its configuration make "
                "it one (is_decoder=True, use_bidirectional_attention=False)"
            )


def _choosable(modules: Mapping[str, nn.Module], reached: set[int]) -> set[int]:
    """Ids of the parameters in modules that were not reached, but stand beside one like them that was."""
    beside: dict[tuple, list[nn.Module]] = {}
    inside: set[str] = set()
    for path, module in modules.items():
        above, _, name = path.rpartition(".")
        if above in inside or isinstance(modules.get(above.rpartition(".")[0]), nn.ModuleList):
            inside.add(path)
        sizes = tuple((name, p.shape) for name, p in module.named_parameters())
        if sizes and path in inside:
            key = (above, re.sub(r"\d+", "*", name), type(module), sizes)
            beside.setdefault(key, []).append(module)
    found: set[int] = set()
    for alike in beside.values():
        keys = [{id(p) for p in module.parameters()} for module in alike]
        if any(own & reached for own in keys):
            found |= {key for own in keys if not own & reached for key in own}
    return found


def _parts(missed: Mapping[str, torch.Tensor], reached: Collection[str]) -> tuple[LeftOut, ...]:
    """The parameters that are not reached, by the shortest path that leads to none which is."""
    leading = {name[:i] for name in reached for i in range(len(name) + 1) if name[i : i + 1] in ("", ".")}
    sizes: dict[str, int] = {}
    for name, parameter in missed.items():
        words = name.split(".")
        length = next(i for i in range(1, len(words) + 1) if ".".join(words[:i]) not in leading)
        part = ".".join("*" if word.isdecimal() else word for word in words[:length])
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    return tuple(LeftOut(part, size) for part, size in sorted(sizes.items(), key=lambda item: -item[1]))
