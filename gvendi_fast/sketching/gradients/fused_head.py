"""The sketch of an output head that a fused loss takes the place of, so that its layer is never run.

TRL's trainers (1.16) call the model under the head and give its hidden states and the head's weight to an autograd
function of their own, which gives the log-probability of every target, and its distribution's entropy, without any
logits [T, V]. Its node in autograd's graph keeps all that it was given, so the gradient of the logits is formed again
from what comes back to it, some rows at a time, and folded: one more product of the head a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients.boundaries import Samples
from gvendi_fast.sketching.gradients.graph import nodes_of
from gvendi_fast.sketching.gradients.head_chunks import head_chunk_rows
from gvendi_fast.sketching.gradients.layer_sketch import layer_sketch
from gvendi_fast.sketching.gradients.taps import Tap

# The names of such nodes (TRL, from 1.16 on).
_NODES = ("ChunkedLogProbFunctionBackward",)
# What such a node must hold to be understood.
_KEPT = ("kernel_args", "compute_dtype")
# From a model's outputs to the node there are a few shapes and masks.
_NEAR = 64


def find_fused(outputs: Any) -> Any | None:
    """The node of a fused head that a model's outputs come from, None if there is none."""
    waiting, seen = list(nodes_of(outputs)), 0
    while waiting and seen < _NEAR:
        node, seen = waiting.pop(0), seen + 1
        if node is None:
            continue
        if node.name().rpartition(".")[2] in _NODES and all(hasattr(node, name) for name in _KEPT):
            return node
        waiting += [following for following, _ in node.next_functions]
    return None


def fused_tokens(node: Any, labels: Tensor | None, shifted: Tensor | None, samples: Samples) -> Tensor | None:
    """The token of the flattened batch that each row of a fused head is of, int64 [N] on the CPU; None if unknown.

    labels [B, T] as the model was given them; shifted: those that a caller has shifted itself. The head sees every
    token that has a next one, or those that have a target.
    """
    count = node.saved_tensors[0].shape[0]
    rows, length = samples.shape
    all_tokens = torch.arange(rows * length).view(rows, length)
    given, tokens = (labels, all_tokens[:, :-1]) if shifted is None else (shifted, all_tokens)
    if count == tokens.numel():
        return tokens.reshape(-1)
    if given is None:
        return None
    targets = given.detach().cpu()
    targets = targets[:, 1:] if shifted is None else targets
    picked = tokens[targets != -100] if targets.shape == tokens.shape else tokens[:0]
    return picked if len(picked) == count else None


def watch_fused(
    node: Any, tokens: Tensor, samples: Samples, tap: Tap, spec: SketchSpec, found: Callable[[Tensor], None]
) -> None:
    """Have `found` called in backward passes over the node with the head's sketch, float32 [S, K]."""
    segments = torch.searchsorted(tokens, samples.segments).contiguous()

    def before(gradients: tuple[Tensor | None, ...]) -> None:
        by_target, by_entropy = (*gradients, None, None)[:2]
        if by_target is not None or by_entropy is not None:
            with torch.no_grad():
                found(_head_sketch(node, by_target, by_entropy, segments, tap, spec))

    node.register_prehook(before)


def _head_sketch(
    node: Any,
    by_target: Tensor | None,
    by_entropy: Tensor | None,
    segments: Tensor,
    tap: Tap,
    spec: SketchSpec,
) -> Tensor:
    hidden, weight, bias, targets = node.saved_tensors[:4]
    sketch = layer_sketch(spec)
    out = torch.zeros(len(segments), spec.dim, device=hidden.device)
    weight = weight.to(node.compute_dtype)
    step = head_chunk_rows(weight.shape[0], torch.finfo(torch.float32).bits // 8, weight.device)
    for begin, end in _chunks(len(hidden), step):
        part = (segments - begin).clamp(0, end - begin)
        a = hidden[begin:end].to(node.compute_dtype)
        logits = a @ weight.T
        if bias is not None:
            logits += bias.to(logits)
        given = (None if g is None else g[begin:end].float()[:, None] for g in (by_target, by_entropy))
        e = logit_gradient(logits.float(), targets[begin:end], *given, **node.kernel_args).to(a.dtype)
        if tap.bias:
            sketch.vector(tap.bias, None, e, part, out)
        if tap.weight:
            sketch.linear(a, [(tap.weight, e)], part, out, False)
    return out


def logit_gradient(
    logits: Tensor,
    targets: Tensor,
    by_target: Tensor | None,
    by_entropy: Tensor | None,
    *,
    logit_scale: float,
    softcap: float,
    inv_t: float,
    HAS_SOFTCAP: bool,
) -> Tensor:
    """The gradient of logits W h [N, V] from that of log p(target), [N, 1], and of the entropy, [N, 1].

    p = softmax(y), y = inv_t * z with z = logit_scale * W h, or softcap * tanh(z / softcap). For one row
    d log p_t / dy_v = [v = t] - p_v and dH / dy_v = -p_v (log p_v + H).
    """
    z = logits * logit_scale
    bent = torch.tanh(z / softcap) if HAS_SOFTCAP else None
    log_p = torch.log_softmax((z if bent is None else softcap * bent) * inv_t, dim=-1)
    p = log_p.exp()
    gradient = torch.zeros_like(z)
    if by_target is not None:
        gradient -= by_target * p
        gradient.scatter_add_(1, targets[:, None], by_target)
    if by_entropy is not None:
        gradient -= by_entropy * p * (log_p - (p * log_p).sum(dim=-1, keepdim=True))
    gradient *= inv_t * logit_scale
    return gradient if bent is None else gradient * (1 - bent * bent)


def _chunks(count: int, step: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)
