"""Entropy of one matrix and of many small groups on a GPU: checked, then timed beside what PyTorch offers."""

from __future__ import annotations

import torch
from gpu_checks import ENTROPY_TOLERANCE
from gpu_timing import Bench, Span

from gvendi_fast import VendiState, ops, reference

GROUP = 64


def spectral(bench: Bench) -> dict[str, object]:
    """Entropy of a K x K state, and of 10,000 groups of 64 rows [., K], K = 1024."""
    dim, groups = (64, 20) if bench.dry else (1024, 10_000)
    # Columns of falling size, as sketches of real text have; without them all eigenvalues are about the same.
    scale = torch.arange(1, dim + 1, device=bench.device) ** -0.5
    rows = torch.randn(groups * GROUP, dim, device=bench.device) * scale
    return {"matrix": matrix(bench, rows[: 4 * dim]), "groups": many_groups(bench, rows)}


def matrix(bench: Bench, rows: torch.Tensor) -> dict[str, object]:
    """Entropy of the state of some rows, on the device and on the CPU."""
    dim, found = rows.shape[1], {"dim": rows.shape[1], "rows": len(rows)}
    wanted = reference.entropy(torch.linalg.eigvalsh(reference.covariance(rows.cpu())[0] / len(rows)))
    for title, device in (("", bench.device), (" on the CPU", torch.device("cpu"))):
        state = VendiState(dim, device=device).update(rows.to(device))
        error = abs(state.entropy() - wanted)
        found |= {f"error{title}": error, f"allowed{title}": ENTROPY_TOLERANCE}
        if not error <= ENTROPY_TOLERANCE:
            found[f"not timed{title}"] = "check failed"
            continue
        # A state keeps its spectrum, so every call gets a new one.
        own = Bench(device, bench.dry, 0)
        times = own.time(lambda s=state, d=device: VendiState(dim, device=d).merge(s).entropy(), 10)
        found[f"milliseconds{title}"] = times["milliseconds"]
    return found


def many_groups(bench: Bench, rows: torch.Tensor) -> dict[str, object]:
    """Entropies of groups of GROUP rows, and PyTorch's float64 eigenvalues of the same Gram matrices."""
    boundaries = torch.arange(0, len(rows) + 1, GROUP)
    some = boundaries[: min(len(boundaries), 65)]
    wanted = reference.group_entropies(rows[: int(some[-1])].cpu(), some)
    got, again = (ops.entropy(rows, boundaries) for _ in range(2))
    error = float((got[: len(wanted)].cpu() - wanted).abs().max())
    found = {
        "groups": len(boundaries) - 1,
        "rows": GROUP,
        "dim": rows.shape[1],
        "error": error,
        "allowed": ENTROPY_TOLERANCE,
    }
    if not error <= ENTROPY_TOLERANCE or not torch.equal(got, again):
        return {**found, "not timed": "check failed"}

    taken = bench.time(lambda: ops.entropy(rows, boundaries), 10)
    found["milliseconds"] = taken["milliseconds"]
    if not bench.late():
        torch_alone(rows[: 64 * GROUP])
        bench.wait()
        # One run: it may take many seconds.
        with Span(bench.device) as span:
            torch_alone(rows)
        found["milliseconds of torch.linalg.eigvalsh, one run"] = span.milliseconds()
    return found


def torch_alone(rows: torch.Tensor) -> torch.Tensor:
    """The same entropies by PyTorch's batched operations, the eigenvalues in float64."""
    z = torch.nn.functional.normalize(rows, dim=1).view(-1, GROUP, rows.shape[1])
    p = torch.linalg.eigvalsh(torch.bmm(z, z.mT).double()).clamp(min=0) / GROUP
    return -torch.special.xlogy(p, p).sum(dim=1)
