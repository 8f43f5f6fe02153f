"""Entropy of one matrix and of many small groups on a GPU: checked and timed, beside what PyTorch offers."""

from __future__ import annotations

import math

import torch

from benchmarks.gpu.checks import ENTROPY_TOLERANCE
from benchmarks.gpu.timing import Bench, Figure, Span
from gvendi_fast import VendiState
from gvendi_fast.kernels import ops, reference

GROUP = 64


def figures(section: str, bench: Bench) -> list[Figure]:
    """Entropy of a K x K state, and of 10,000 groups of 64 rows [., K], K = 1024."""
    return [
        Figure("matrix", lambda: matrix(bench, bench.device)),
        Figure("groups", lambda: many_groups(bench)),
        Figure("matrix on the CPU", lambda: matrix(bench, torch.device("cpu"))),
        Figure("groups by torch.linalg.eigvalsh", lambda: by_torch(bench)),
    ]


def sizes(bench: Bench) -> tuple[int, int]:
    """K, and how many groups."""
    return (64, 20) if bench.dry else (1024, 10_000)


def draw(bench: Bench, count: int, device: torch.device) -> torch.Tensor:
    """Rows with columns of falling size, as sketches of real text have: without them all eigenvalues are alike."""
    dim = sizes(bench)[0]
    return torch.randn(count, dim, device=device) * torch.arange(1, dim + 1, device=device) ** -0.5


def matrix(bench: Bench, device: torch.device) -> dict[str, object]:
    """Entropy of the state of some rows."""
    dim = sizes(bench)[0]
    rows = draw(bench, 4 * dim, device)
    state = VendiState(dim, device=device).update(rows)
    wanted = reference.entropy(torch.linalg.eigvalsh(reference.covariance(rows.cpu())[0] / len(rows)))
    # A state keeps its spectrum, so every call gets a new one.
    taken = Bench(device, bench.dry).time(lambda: VendiState(dim, device=device).merge(state).entropy(), 10)
    return {
        "dim": dim,
        "rows": len(rows),
        **judged(abs(state.entropy() - wanted)),
        "milliseconds": taken["milliseconds"],
    }


def many_groups(bench: Bench) -> dict[str, object]:
    """Entropies of groups of GROUP rows."""
    dim, groups = sizes(bench)
    rows = draw(bench, groups * GROUP, bench.device)
    boundaries = torch.arange(0, len(rows) + 1, GROUP)
    some = boundaries[: min(len(boundaries), 65)]
    wanted = reference.group_entropies(rows[: int(some[-1])].cpu(), some)
    got, again = (ops.entropy(rows, boundaries) for _ in range(2))
    error = float((got[: len(wanted)].cpu() - wanted).abs().max())
    repeats = bool(torch.equal(got, again))
    return {
        "groups": groups,
        "rows": GROUP,
        "dim": dim,
        **(judged(error) if repeats else {"error": error, "check": "failed: two runs give other bits"}),
        "milliseconds": bench.time(lambda: ops.entropy(rows, boundaries), 10)["milliseconds"],
    }


def judged(error: float) -> dict[str, object]:
    """An absolute error and whether it is allowed."""
    passed = error <= ENTROPY_TOLERANCE
    return {
        "error": error if math.isfinite(error) else str(error),
        "check": "passed" if passed else f"failed: error {error:.1e}, {ENTROPY_TOLERANCE} is allowed",
    }


def by_torch(bench: Bench) -> dict[str, object]:
    """PyTorch's float64 eigenvalues of the same Gram matrices; one run, for it may take many seconds."""
    dim, groups = sizes(bench)
    rows = draw(bench, groups * GROUP, bench.device)
    torch_alone(rows[: 16 * GROUP])
    bench.wait()
    with Span(bench.device) as span:
        torch_alone(rows)
    return {"groups": groups, "rows": GROUP, "dim": dim, "milliseconds, one run": span.milliseconds()}


def torch_alone(rows: torch.Tensor) -> torch.Tensor:
    """The same entropies by PyTorch's batched operations, the eigenvalues in float64."""
    z = torch.nn.functional.normalize(rows, dim=1).view(-1, GROUP, rows.shape[1])
    p = torch.linalg.eigvalsh(torch.bmm(z, z.mT).double()).clamp(min=0) / GROUP
    return -torch.special.xlogy(p, p).sum(dim=1)
