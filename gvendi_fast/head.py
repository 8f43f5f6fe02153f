"""The output head: how a causal LM turns its last hidden states into logits, and the loss without [T, V] logits.

Where the logits are softcap(scale * W h), the head is computed in row chunks by the sketch's `head`; whatever
else a model does is left to autograd, with the head tapped like any other linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gvendi_fast.errors import GvendiError
from gvendi_fast.taps import LINEAR, Tap


@dataclass(frozen=True)
class Head:
    """A head whose logits are softcap * tanh(scale * W h / softcap), or scale * W h where softcap is None."""

    base: nn.Module
    weight: nn.Parameter
    name: str
    softcap: float | None
    scale: float


def find_head(model: nn.Module, taps: list[Tap], names: list[str]) -> Head | None:
    """The head of `model` if the chunked form fits it, found by comparing it with the model's own logits."""
    base, output = getattr(model, "base_model", None), getattr(model, "get_output_embeddings", lambda: None)()
    if base is None or base is model or not isinstance(output, nn.Linear) or output.bias is not None:
        return None
    name = next((n for n, p in model.named_parameters() if p is output.weight), None)
    inside = {id(m) for m in base.modules()}
    outside = [t for t in taps if id(t.module) not in inside and t.module is not output]
    is_tapped = any(t.module is output and t.kind == LINEAR and t.weight == name for t in taps)
    if name not in names or outside or not is_tapped:
        return None
    softcap = getattr(model.config, "final_logit_softcapping", None)
    scale = _matching_scale(model, base, output, softcap)
    return None if scale is None else Head(base, output.weight, name, softcap, scale)


def _matching_scale(
    model: nn.Module, base: nn.Module, output: nn.Linear, softcap: float | None
) -> float | None:
    """The scale for which the chunked form gives the model's own logits on a few tokens; None if none does."""
    ids = torch.arange(1, 5, device=output.weight.device)[None] % output.weight.shape[0]
    with torch.no_grad():
        hidden = base(input_ids=ids, use_cache=False).last_hidden_state
        wanted = model(input_ids=ids, use_cache=False).logits.double()
        if not wanted.isfinite().all():
            raise GvendiError("the model's logits are not finite, so it has no gradients; check its weights")
        if hidden.shape[-1] != output.weight.shape[1]:
            return None
        raw = output(hidden).double()
        uncapped = (
            wanted if softcap is None else softcap * torch.atanh((wanted / softcap).clamp(-0.999, 0.999))
        )
        fitted = float((uncapped * raw).sum() / raw.square().sum())
        # A factor of the model's own is a short decimal or an integer's inverse; 1 is meant when it is close.
        scale = 1.0 if abs(fitted - 1) < 1e-2 else fitted
        got = scale * raw if softcap is None else softcap * torch.tanh(scale * raw / softcap)
        tolerance = 64 * torch.finfo(output.weight.dtype).eps
        close = torch.allclose(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
    return scale if close else None


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
