"""What a pass gives: the sketches of a batch's samples, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sketches:
    """The result of one batch, on the model's device; on a GPU it may still be computed, and reading a value waits.

    z: float32 [B, K], the sketches.
    loss: float32 [B], in nats, summed over targets; None from a training step, whose loss is the user's own.
    tokens: int64 [B], how many targets; None where a training step's batch has no labels that say so.
    by_group: float32 [B, G, K], the sketch of each group of parameters, whose sum is z up to rounding; None without
        groups.
    tags: int64 [B] on the CPU, what the batch of a training step says of each sample (`GradientSketcher.tap`).
    """

    z: torch.Tensor
    loss: torch.Tensor | None
    tokens: torch.Tensor | None
    by_group: torch.Tensor | None = None
    tags: torch.Tensor | None = None
