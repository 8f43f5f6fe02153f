"""What a meter's figures are, from all rows of a stream in float64, slow and obvious."""

from __future__ import annotations

import math

import torch


def entropy(rows: torch.Tensor, weights: torch.Tensor | None = None, q: float = 1.0) -> float:
    """H_q of unit rows [n, K], by weights [n]; 0 for no rows."""
    if len(rows) == 0:
        return 0.0
    weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights
    sigma = (rows * weights[:, None]).T @ rows / weights.sum()
    p = torch.linalg.eigvalsh(sigma).clamp_min(0)
    p = p[p > 1e-15] / p.sum()
    return float(-(p * p.log()).sum()) if q == 1 else math.log(float((p**q).sum())) / (1 - q)


def surprisals(rows: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """-z^T (ln Sigma) z of unit rows against a window, eigenvalues of at least 2^-52."""
    p, vectors = torch.linalg.eigh(window.T @ window / len(window))
    return (rows @ vectors).square() @ -p.clamp(2.0**-52, 1).log()


def gains(rows: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """H_1 with each row less H_1 without it."""
    return torch.tensor([entropy(torch.cat([window, row[None]])) - entropy(window) for row in rows])


def similarity(rows: torch.Tensor) -> float:
    """Mean squared cosine of pairs of different rows."""
    squares = (rows @ rows.T).square()
    return float((squares.sum() - squares.trace()) / (len(rows) * (len(rows) - 1)))


class Stream:
    """All that came, and a meter's figures of it."""

    def __init__(self, window: int, decay: float, dim: int) -> None:
        self.window, self.decay = window, decay
        self.rows = torch.empty(0, dim, dtype=torch.float64)
        self.labels: list[str] = []
        self.last, self.norms, self.seen = 0, torch.empty(0), 0

    def add(self, sketches: torch.Tensor, labels: list[str]) -> None:
        x = sketches.double()
        norms = x.norm(dim=1)
        good = (norms > 0) & norms.isfinite()
        self.rows = torch.cat([self.rows, x[good] / norms[good, None]])
        self.labels += [label for label, is_good in zip(labels, good, strict=True) if is_good]
        self.last, self.norms, self.seen = int(good.sum()), norms[good], self.seen + len(x)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """The last batch, the window before it, the window, and the window's labels."""
        batch = self.rows[len(self.rows) - self.last :]
        earlier = self.rows[: len(self.rows) - self.last]
        return batch, earlier[-self.window :], self.rows[-self.window :], self.labels[-self.window :]

    def weights(self) -> torch.Tensor:
        return self.decay ** torch.arange(len(self.rows) - 1, -1, -1, dtype=torch.float64)

    def figures(self) -> dict[str, float]:
        batch, before, window, labels = self.parts()
        return figures(batch, before, window, labels, self.rows, self.weights(), self.norms, self.seen)


def figures(batch, before, window, labels, rows, weights, norms, seen) -> dict[str, float]:
    """A meter's figures of order 1."""
    found = {
        "samples/batch": len(batch), "samples/window": len(window), "samples/seen": seen,
        "samples/zero": 0, "samples/non_finite": 0,
    }  # fmt: skip
    if len(batch):
        found["gvendi/batch"] = math.exp(entropy(batch))
        for name, share in {"q05": 0.05, "q50": 0.5, "q95": 0.95, "max": 1.0}.items():
            found[f"gradient_norm/{name}"] = float(norms.double().quantile(share))
    if len(batch) and len(before):
        found["surprisal"] = float(surprisals(batch, before).mean())
        found["gain"] = float(gains(batch, before).mean())
    if len(window):
        found["gvendi/window"] = math.exp(entropy(window))
        found["gvendi/average"] = math.exp(entropy(rows, weights))
        found["samples/average"] = float(weights.sum() ** 2 / weights.square().sum())
    if len(window) > 1:
        found["similarity/window"] = similarity(window)
    for name in sorted(set(labels)):
        own = torch.tensor([label == name for label in labels])
        source = window[own]
        found |= {
            f"gvendi/source/{name}": math.exp(entropy(source)),
            f"samples/source/{name}": len(source),
            f"share/source/{name}": len(source) / len(window),
            f"surprisal/source/{name}": float(surprisals(source, window).mean()),
            f"gain/source/{name}": entropy(window) - entropy(window[~own]),
        }
        if len(source) > 1:
            found[f"similarity/source/{name}"] = similarity(source)
    return found
