"""What a pool scores at the start and at the end of a synthesis: the numbers of `gvendi score`, by one reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gvendi_fast.analysis.set_numbers import Sample
from gvendi_fast.vendi.centered import CenteredScore, RowMean
from gvendi_fast.vendi.unlimited_k import UnlimitedK


@dataclass(frozen=True)
class PoolNumbers:
    """The scores of n rows.

    gvendi: at K = dim, as the paper defines it. n: rows.
    unlimited_k: what the exact gradients of these rows would score.
    centered: the value without the mean of the seeds, the same for the seeds and the grown pool.
    """

    gvendi: float
    n: int
    dim: int
    unlimited_k: UnlimitedK
    centered: CenteredScore

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, by the names that a score has."""
        return {
            **vars(self),
            "unlimited_k": self.unlimited_k.to_dict(),
            "centered": self.centered.to_dict(),
        }


def pool_numbers(rows: torch.Tensor, seeds: int) -> tuple[PoolNumbers, PoolNumbers]:
    """The numbers of the first `seeds` rows and of all rows [n, K].

    Two spectra each, of n + 1 numbers or K, whichever is less: for the start and the end of a run, not for each block.
    """
    reference = RowMean(rows.shape[1]).update(rows[:seeds])
    start = _numbers(rows[:seeds], reference)
    return start, start if len(rows) == seeds else _numbers(rows, reference)


def _numbers(rows: torch.Tensor, reference: RowMean) -> PoolNumbers:
    sample = Sample.of_rows(rows, reference)
    state = sample.state
    return PoolNumbers(state.gvendi(), state.n, sample.dim, sample.unlimited_k(), sample.centered())
