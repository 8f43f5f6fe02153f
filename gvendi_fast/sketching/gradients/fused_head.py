"""The head's part of a training step's sketches where a trainer has fused the head with the loss.

TRL's trainers never run the head as a layer: they take its weight into an operation that gives the log-probability of
every target, and no [T, V] matrix. The gradient g of those says the rest: with p the model's own distribution, the
logits of target t have the gradient g_t (onehot_t - p_t), so one more chunked pass over the head (`head_chunks.py`)
gives its sketch, each row scaled by -g_t. Nothing of the step changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients.boundaries import Samples
from gvendi_fast.sketching.gradients.head import Head
from gvendi_fast.sketching.gradients.layer_sketch import layer_sketch

# Mean difference of the log-probabilities, over one more than their mean size: the same products in the same number
# format differ by rounding; another temperature of 0.9 differs by 0.05 and more.
AGREES = 0.01


@dataclass(eq=False)
class FusedTargets:
    """The targets of one forward pass under a fused head.

    hidden: [R, d], the last hidden states that predict the R targets, in the number format of the logits.
    labels: int64 [R]. places: bool [B, T - 1] or [B, T], which of the log-probabilities are of targets.
    segments: int64 [S, 2] on the CPU, the targets of every sample.
    """

    hidden: Tensor
    labels: Tensor
    places: Tensor
    segments: Tensor

    def sketch(self, head: Head, spec: SketchSpec, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The head's part float32 [S, K] by the gradient of the log-probabilities, and the targets' losses [R]."""
        weight = head.weight.detach()
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        out = torch.zeros(len(self.segments), spec.dim, device=self.hidden.device)
        upstream = -gradient[self.places].to(self.hidden.device).float()
        loss, _ = layer_sketch(spec).head(
            head.name, self.hidden, weight.to(self.hidden), self.labels, self.segments, out, head.softcap, head.scale,
            upstream,
        )  # fmt: skip
        return out, loss


def log_probs_of(output: Any) -> Tensor | None:
    """The log-probabilities of the targets that a fused head returns in place of logits; None where there is none."""
    if not isinstance(output, Mapping):
        return None
    found = output.get("log_probs")
    has_logits = isinstance(output.get("logits"), Tensor)
    return found if isinstance(found, Tensor) and found.dim() == 2 and not has_logits else None


def fused_targets(
    log_probs: Tensor, hidden: Tensor, dtype: torch.dtype, arguments: Mapping[str, Any], samples: Samples
) -> FusedTargets | None:
    """What of a pass its targets need later; None where the labels do not say which they are.

    log_probs: [B, T - 1] of labels that are shifted here, or [B, T] of `shift_labels`. hidden: [B, T, d]. dtype: of the
    logits. arguments: of the model's forward.
    """
    labels = arguments.get("shift_labels")
    if labels is None and isinstance(given := arguments.get("labels"), Tensor):
        labels, hidden = given[:, 1:], hidden[:, :-1]
    if labels is None or labels.shape != log_probs.shape or hidden.shape[:2] != log_probs.shape:
        return None
    places = labels != -100
    length = samples.shape[1]
    at_row, at = places.cpu().nonzero().unbind(1)
    flat = at_row * length + at
    segments = torch.searchsorted(flat, samples.segments.contiguous())
    # The kernels read no float16.
    dtype = torch.float32 if dtype == torch.float16 else dtype
    rows = hidden.detach()[places.to(hidden.device)].to(dtype)
    return FusedTargets(rows, labels[places].to(rows.device), places.to(log_probs.device), segments)
