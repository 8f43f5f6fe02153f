"""The output head: how a causal LM turns its last hidden states into logits, and the loss without [T, V] logits.

Where the logits are softcap(scale * W h), the head is computed in row chunks by the sketch's `head`; whatever
else a model does is left to autograd, with the head tapped like any other linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing
from gvendi_fast.sketching.gradients.names import named_parameters
from gvendi_fast.sketching.gradients.taps import LINEAR, Tap

# Settings by which the models of transformers, and published ones with code of their own, cap or scale their logits:
# Gemma, RecurrentGemma, xLSTM; Cohere, Granite and MiniCPM3, Falcon-H1, Inkling, Phi-3-small.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
    "mup_width_multiplier",
)
# Of a token's largest logit. The form is evaluated in float32 on both sides; a right one is within a thirtieth.
TOLERANCE = 256 * torch.finfo(torch.float32).eps
# Largest logits of the trial's hidden states: a cap bends the first by its third order and flattens the last.
TRIAL_LOGITS = (2.0, 60.0, 2000.0)
TRIAL_TOKENS = 4
# Rows of the head that are float32 at a time.
_ROWS = 8192


@dataclass(frozen=True)
class Head:
    """A head whose logits are softcap * tanh(scale * W h / softcap), or scale * W h if softcap is None.

    base: the model that gives the hidden states h [T, d].
    output: the layer with W [V, d].
    name: of the weight.
    softcap, scale: as in the formula.
    """

    base: nn.Module
    output: nn.Linear
    name: str
    softcap: float | None
    scale: float

    @property
    def weight(self) -> nn.Parameter:
        """W, which may be another tensor than at the trial: weights can be assigned."""
        return self.output.weight


def find_head(
    model: nn.Module, taps: list[Tap], names: list[str], unreached: Collection[str] = ()
) -> Head | None:
    """The head of `model` if the chunked form is what the model computes from its last hidden states, else None.

    That is found by trying it in float32, whatever the model's dtype: the model's own forward is run with hidden
    states of which the logits are known, and its logits are compared with softcap(scale * W h) for every cap and scale
    that its configuration names. No other factor is accepted, however well it would fit. The model is left
    unchanged, and its weights are not copied. unreached: names of parameters that no text reaches, wherever they are.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(output, nn.Linear) or output.bias is not None:
        return None
    base = _base_below(model, output, bool(unreached))
    if base is None:
        return None
    name = next((n for n, p in named_parameters(model).items() if p is output.weight), None)
    inside = {id(m) for m in base.modules()}
    below = {id(p) for p in base.parameters()} | {id(output.weight)}
    # Parameters above the base, used or not, are more than one matrix.
    above = [n for n, p in named_parameters(model).items() if id(p) not in below and n not in unreached]
    alone = id(output) not in inside and not above
    is_tapped = any(t.module is output and t.kind == LINEAR and t.weight == name for t in taps)
    if name not in names or not alone or not is_tapped:
        return None
    with torch.no_grad():
        form = _matching_form(model, base, output)
    return None if form is None else Head(base, output, name, *form)


def _base_below(model: nn.Module, output: nn.Linear, is_part: bool) -> nn.Module | None:
    """The model without a head below this one.

    is_part: text reaches a part of the model alone, so it may be the base of a language model inside.
    """
    if not is_part:
        base = getattr(model, "base_model", None)
        return None if base is model else base
    holders = (m for m in model.modules() if any(part is output for part in m._modules.values()))
    for module in (model, *holders):
        base = getattr(module, "base_model", None)
        if isinstance(base, nn.Module) and base is not module:
            return base
        # Llama 4's language model inside, and LLaVA's model in transformers 4, say that they are their own base.
        others = [part for part in module.children() if part is not output]
        if len(others) == 1:
            return others[0]
    return None


def _matching_form(model: nn.Module, base: nn.Module, output: nn.Linear) -> tuple[float | None, float] | None:
    """(softcap, scale) for which the chunked form gives the model's own logits; None if none does."""
    shape = (1 + len(TRIAL_LOGITS), TRIAL_TOKENS)
    ids = torch.arange(1, 1 + shape[0] * shape[1], device=output.weight.device) % output.weight.shape[0]
    call = {"input_ids": ids.view(shape), "use_cache": False}
    last: list[object] = [None, None]

    def note(module: nn.Module, args: tuple, result: object) -> None:
        last[:] = module, result

    with _hooked(base.modules(), note):
        wanted = model(**call).logits
    if not wanted.isfinite().all():
        raise GvendiError("the model's logits are not finite, so it has no gradients; check its weights")
    # The last module of the base to return is the one whose output the head reads: the base, or OPT's decoder.
    core, result = last
    own = _last_hidden(result)
    if own is None or own.shape != (*shape, output.weight.shape[1]):
        return None
    # The pass runs the base alone, so the model's forward must give it its input as it came.
    alone = _last_hidden(base(**call))
    if alone is None or not torch.equal(alone, own):
        return None
    hidden = _trial_hidden(own, output.weight)
    if hidden is None:
        return None
    raw = _wide_logits(hidden, output.weight)
    hidden = hidden.to(own.device)
    with _hooked([core], lambda module, args, result: _with_hidden(result, hidden.clone())):
        if core is not base and not torch.equal(base(**call).last_hidden_state, hidden):
            return None
        with _forward(output, lambda x: _wide_logits(x, output.weight)):
            wanted = model(**call).logits
    if wanted.shape != raw.shape:
        return None
    wanted, forms = wanted.to(raw), _named_forms(model)
    size = wanted.abs().amax(dim=-1, keepdim=True)
    errors = [float(((_form(raw, *form) - wanted).abs() / size).max()) for form in forms]
    best = min(range(len(forms)), key=errors.__getitem__)
    return forms[best] if errors[best] <= TOLERANCE else None


def _trial_hidden(own: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """Hidden states [B, T, d]: the model's own for the first sample, random ones with larger and larger logits.

    None where the head is zero, so that every form fits. Every value is one of bfloat16's, in float32 or wider: a
    model that casts hidden states to its own dtype does not change them.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(own.shape, generator=generator).to(weight.device, torch.bfloat16).to(own)
    hidden[0] = own[0].to(torch.bfloat16)
    hidden = hidden.to(torch.promote_types(weight.dtype, torch.float32))
    largest = _wide_logits(hidden, weight).abs().amax(dim=(1, 2))
    if not bool((largest > 0).all()):
        return None
    # Powers of two, which change no digit.
    for row, logit in enumerate(TRIAL_LOGITS, start=1):
        hidden[row] *= 2.0 ** round(math.log2(logit / float(largest[row])))
    return hidden


def _named_forms(model: nn.Module) -> list[tuple[float | None, float]]:
    """Every (softcap, scale) that the model names, the plain one first; models multiply by a scale or divide by it."""
    caps: list[float | None] = [None, *_numbers(model, CAPS)]
    scales = [1.0]
    for number in _numbers(model, SCALES):
        scales += [number, 1 / number]
    # MiniCPM keeps its scale as two widths.
    scales += [n / d for n in _numbers(model, ("dim_model_base",)) for d in _numbers(model, ("hidden_size",))]
    return [(cap, scale) for cap in caps for scale in scales]


def _numbers(model: nn.Module, names: Sequence[str]) -> list[float]:
    """The numbers other than zero that these settings have in the model and in its configuration."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    settings = [getattr(place, name, None) for name in names for place in (model, config, text)]
    numbers = [float(n) for n in settings if isinstance(n, (int, float)) and n != 0]
    return list(dict.fromkeys(numbers))


def _form(raw: torch.Tensor, softcap: float | None, scale: float) -> torch.Tensor:
    return scale * raw if softcap is None else softcap * torch.tanh(scale * raw / softcap)


def _wide_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """W h in float32 or wider, without a whole copy of W in it: [..., d] -> [..., V]."""
    hidden = hidden.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    return torch.cat([hidden @ rows.to(hidden).T for rows in weight.split(_ROWS)], dim=-1)


def _last_hidden(result: object) -> torch.Tensor | None:
    if isinstance(result, tuple):
        result = result[0]
    states = result if isinstance(result, torch.Tensor) else getattr(result, "last_hidden_state", None)
    return states if isinstance(states, torch.Tensor) else None


def _with_hidden(result: object, hidden: torch.Tensor) -> object:
    """A base model's result with other last hidden states."""
    if isinstance(result, torch.Tensor):
        return hidden
    if isinstance(result, tuple):
        return (hidden, *result[1:])
    result.last_hidden_state = hidden
    return result


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    """The modules with this forward hook inside, without it outside."""
    with undoing() as undo:
        for module in modules:
            undo.append(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def _forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """The module with this forward inside, with its own outside."""
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is not None:
            module.forward = own
        else:
            module.__dict__.pop("forward", None)

    with undoing() as undo:
        undo.append(restore)
        module.forward = forward
        yield


def autograd_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss summed over each sample's targets by autograd: logits [B, T, V], targets [B, T] -> float32 [B]."""
    flat = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.reshape(-1), ignore_index=-100, reduction="none"
    )
    return flat.view(targets.shape).sum(dim=1)


def sum_by_sample(loss: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sum consecutive runs of `counts` entries: [R] -> [B]; counts int64 [B] on the CPU.

    One sum a sample, so that its bits depend neither on its batch nor on the order in which threads add.
    """
    return torch.stack([part.sum() for part in loss.split(counts.tolist())])
