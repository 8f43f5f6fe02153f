"""Sources of unit rows whose spectrum is known: what intervals and forecasts are tried on.

Each is a function (n, generator) -> float64 [n, K] of independent rows; "listed" alone draws without replacement.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Source = Callable[[int, torch.Generator], torch.Tensor]


def sources(dim: int = 128) -> dict[str, Source]:
    """By name: flat, exponential and power-law spectra, a rare diverse part, copies, a common direction, clusters."""
    k = torch.arange(1, dim + 1, dtype=torch.float64)
    narrow, part = torch.exp(-k * 16 / dim), dim * 3 // 4
    broad, few = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    broad[dim - part :], few[: dim // 16] = 1, 1
    flat = torch.zeros(dim, dtype=torch.float64)
    flat[: dim * 3 // 16] = 1
    found = {"flat": _normal(flat), "exponential": _normal(narrow)}
    found |= {f"k^-{power:g}": _normal(k**-power) for power in (0.5, 0.8, 1.0, 1.3, 1.6, 2.0)}
    found |= {f"{share:.0%} rare and diverse": _mixed(share, narrow, broad) for share in (0.02, 0.05, 0.1)}
    found["2% rare, the rest narrow"] = _mixed(0.02, few, broad)
    found["30 rows, copies of each"] = _finite(_fixed(30, k**-0.3), torch.ones(30))
    found["150 rows, copies as 1/k"] = _finite(_fixed(150, k**-0.3), 1 / torch.arange(1, 151.0))
    found["listed, each row 4 times"] = _listed(_fixed(400, k**-0.3).repeat(4, 1))
    found["common direction"] = _normal(k**-0.8, common=1.0)
    found["40 clusters of sizes 1/k"] = _clusters(dim)
    return found


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def _normal(spectrum: torch.Tensor, common: float = 0.0) -> Source:
    scale = (spectrum / spectrum.sum()).sqrt()

    def draw(n: int, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randn(n, len(scale), dtype=torch.float64, generator=generator) * scale
        rows[:, 0] += common
        return _unit(rows)

    return draw


def _mixed(share: float, most: torch.Tensor, rare: torch.Tensor) -> Source:
    usual, other = _normal(most), _normal(rare)

    def draw(n: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.rand(n, 1, generator=generator) < share
        return torch.where(chosen, other(n, generator), usual(n, generator))

    return draw


def _fixed(rows: int, spectrum: torch.Tensor) -> torch.Tensor:
    return _normal(spectrum)(rows, torch.Generator().manual_seed(0))


def _finite(rows: torch.Tensor, weights: torch.Tensor) -> Source:
    return lambda n, generator: rows[torch.multinomial(weights, n, True, generator=generator)]


def _listed(rows: torch.Tensor) -> Source:
    return lambda n, generator: rows[torch.randperm(len(rows), generator=generator)[:n]]


def _clusters(dim: int, count: int = 40, noise: float = 0.3) -> Source:
    centres = _fixed(count, torch.ones(dim, dtype=torch.float64))
    sizes = 1 / torch.arange(1, count + 1.0)

    def draw(n: int, generator: torch.Generator) -> torch.Tensor:
        chosen = centres[torch.multinomial(sizes, n, True, generator=generator)]
        noisy = torch.randn(n, dim, dtype=torch.float64, generator=generator)
        return _unit(chosen + noise / math.sqrt(dim) * noisy)

    return draw
