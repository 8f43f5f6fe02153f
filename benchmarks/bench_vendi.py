"""Time of G-Vendi's parts at K = 1024; nothing is timed whose result fails its check.

    pytest benchmarks/bench_vendi.py --benchmark-columns=min,median,max,rounds

The floor of `update` and of `jackknife` is one matrix product of the rows with a K x K matrix, timed as `product`.
Groups take turns with LAPACK in float64, group by group (the definition) and on all groups in one call.
"""

import math
import os

import pytest
import torch
from bench_speed import take_turns

from gvendi_fast import ops, reference
from gvendi_fast.vendi import VendiState, gvendi, jackknife, leave_one_out

N, K = 4096, 1024


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """float32 [N, K], standard deviations falling as k^-1/2."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, K, generator=generator) * torch.arange(1, K + 1) ** -0.5


@pytest.fixture(scope="module")
def state(rows) -> VendiState:
    return VendiState(K).update(rows)


def note(benchmark, error: float, rows: int) -> None:
    """A number travels with its error, its threads and the rows it covers."""
    benchmark.extra_info.update(error=error, rows=rows, threads=torch.get_num_threads(), cpus=os.cpu_count())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_product(benchmark, rows, dtype):
    x, y = rows.to(dtype), torch.randn(K, K, dtype=dtype)
    error = float((x[:8] @ y).double().sub(x[:8].double() @ y.double()).abs().max())
    assert error < 1e-3
    note(benchmark, error, N)
    benchmark(lambda: x @ y)


def test_update(benchmark, rows, state):
    exact = reference.covariance(rows)[0]
    error = float((state.matrix - exact).norm() / exact.norm())
    assert error < 1e-6
    note(benchmark, error, N)
    benchmark(lambda: VendiState(K).update(rows))


def test_spectrum(benchmark, rows, state):
    exact = torch.linalg.eigvalsh(reference.covariance(rows)[0] / N)
    error = abs(state.entropy() - reference.entropy(exact))
    assert error < 1e-6
    note(benchmark, error, N)
    benchmark.pedantic(
        lambda fresh: fresh.spectrum(), setup=lambda: ((VendiState(K).merge(state),), {}), rounds=5
    )


def test_gram(benchmark, rows):
    few = rows[:512]
    error = abs(math.log(gvendi(few) / VendiState(K).update(few).gvendi()))
    assert error < 1e-4
    note(benchmark, error, len(few))
    benchmark(lambda: gvendi(few))


def test_jackknife(benchmark, rows, state):
    state.eigenbasis()
    picked, exact = rows[:: N // 16], reference.covariance(rows)[0]
    oracle = [reference.entropy_after_removal(exact, N, x) for x in reference.normalise(picked)]
    wanted = torch.tensor(oracle, dtype=torch.float64)
    # What the jackknife uses is the change of the entropy, not the level that all rows share.
    change = leave_one_out(state, picked) - state.entropy()
    wanted = wanted - reference.entropy(torch.linalg.eigvalsh(exact / N))
    error = float((change - wanted).abs().max() / wanted.std())
    assert error < 1e-3
    note(benchmark, error, N)
    benchmark.pedantic(lambda: jackknife(state, rows), rounds=5, warmup_rounds=1)


def batched_entropies(rows: torch.Tensor, m: int) -> torch.Tensor:
    """Entropies of groups of m rows each, by one call of bmm and one of eigvalsh in float64."""
    z = reference.normalise(rows).view(-1, m, K)
    p = torch.linalg.eigvalsh(z @ z.mT).clamp_min(0) / m
    return -torch.special.xlogy(p, p).sum(dim=1)


@pytest.mark.parametrize("m", [8, 16, 32, 64, 256])
def test_groups(benchmark, rows, m):
    boundaries = torch.arange(0, N + 1, m)
    wanted = reference.group_entropies(rows, boundaries)
    error = float((ops.entropy(rows, boundaries) - wanted).abs().max())
    assert error < 1e-10
    assert float((batched_entropies(rows, m) - wanted).abs().max()) < 1e-10
    others = {
        "the definition's loop": lambda: reference.group_entropies(rows, boundaries),
        "batched eigvalsh": lambda: batched_entropies(rows, m),
    }
    take_turns(benchmark, lambda: ops.entropy(rows, boundaries), others)
    note(benchmark, error, N)
    seconds = benchmark.extra_info["seconds"]
    benchmark.extra_info["groups a second"] = {f"p{p}": N / m / seconds[f"p{100 - p}"] for p in (20, 50, 80)}
