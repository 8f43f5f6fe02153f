"""The sketch operations in plain float32 PyTorch: the error that a kernel is compared with."""

from __future__ import annotations

import math

import torch

from gvendi_fast import reference
from gvendi_fast.plan import Table
from gvendi_fast.signs import signs


def fold32(x: torch.Tensor, table: Table) -> torch.Tensor:
    """S x in float32."""
    bucket, sign = reference.table_tensors(table, x.device)
    return torch.zeros(x.shape[0], table.dim).index_add_(1, bucket, x.float() * sign.float())


def hadamard32(x: torch.Tensor) -> torch.Tensor:
    """H x in float32."""
    step = 1
    while step < x.shape[-1]:
        low, high = x.reshape(*x.shape[:-1], -1, 2, step).unbind(-2)
        x = torch.stack([low + high, low - high], -2).reshape(x.shape)
        step *= 2
    return x


def softmax32(logits, labels, table, softcap, scale) -> tuple[torch.Tensor, ...]:
    """Loss, gradient and fold in float32, the gradient rounded to the dtype of the logits."""
    x, slope = logits.float() * scale, torch.tensor(scale)
    if softcap is not None:
        capped = torch.tanh(x / softcap)
        x, slope = softcap * capped, scale * (1 - capped.square())
    log_p = torch.log_softmax(x, -1)
    e = (log_p.exp() - torch.nn.functional.one_hot(labels, x.shape[1])) * slope
    return -log_p.gather(1, labels[:, None])[:, 0], e.to(logits.dtype), fold32(e, table)


def dense32(a, e, segments, key, dim) -> torch.Tensor:
    """K^(-1/2) Pi^T vec(sum_t e_t a_t^T) in float32."""
    spans = segments.tolist()
    gradient = torch.stack([(e[b:s].float().T @ a[b:s].float()).flatten() for b, s in spans])
    out, step = torch.zeros(len(segments), dim), reference.DENSE_BLOCK
    for first in range(0, gradient.shape[1], step):
        part = gradient[:, first : first + step]
        out += part @ torch.from_numpy(signs(key, first, first + part.shape[1], dim)).float()
    return out / math.sqrt(dim)
