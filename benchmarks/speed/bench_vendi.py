"""Time of G-Vendi's parts at K = 1024; nothing is timed whose result fails its check.

    pytest benchmarks/speed/bench_vendi.py --benchmark-columns=min,median,max,rounds

The floor of `update` and of `jackknife` is one matrix product of the rows with a K x K matrix, timed as `product`.
Groups take turns with LAPACK in float64, group by group (the definition) and on all groups in one call.
"""

import math
import os
import time

import pytest
import torch
from scipy.stats import spearmanr

from benchmarks.speed.bench_sketching import take_turns
from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import backend
from gvendi_fast.kernels.spectrum import Quadrature, marginal_change, quadrature
from gvendi_fast.vendi import VendiState, gains, gvendi, jackknife, leave_one_out

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("remove", [False, True], ids=["gain", "removal"])
def test_gain(benchmark, rows, dtype, remove):
    """Beside its time: how many times as fast it is as the eigenvalues of one candidate after the other."""
    sign, few = (-1 if remove else 1), 16
    state, picked = VendiState(K).update(rows.to(dtype)), rows[:: N // few].to(dtype)
    begin = time.perf_counter()
    change = reference.gain(state.matrix, picked, sign)
    # The definition takes the eigenvalues of A once more.
    oracle = (time.perf_counter() - begin) / (few + 1)
    wanted = gains.entropy_change(state, change, sign)
    got = state.gain(picked, remove)
    error = float((got - wanted).abs().max() / wanted.std())
    assert error < 1e-3
    assert spearmanr(got, wanted)[0] >= 0.9999
    note(benchmark, error, N)
    candidates = rows.to(dtype)
    benchmark.pedantic(lambda: state.gain(candidates, remove), rounds=7, warmup_rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info.update(oracle_s=oracle, ratio=oracle / (benchmark.stats["median"] / N))


def test_marginal_change(benchmark, rows, state):
    """The sums behind the product with the eigenvectors, in torch; `test_gain_kernel` has the compiled ones."""
    at, coordinates, _ = prepared(rows, state)
    note(benchmark, 0.0, len(coordinates))
    out = torch.empty(4, len(coordinates), dtype=torch.float64)
    benchmark(lambda: backend("reference").gain(coordinates, at, out))


def test_gain_kernel(benchmark, rows, state):
    at, coordinates, wanted = prepared(rows, state)
    out = torch.empty_like(wanted)
    backend("cpu").gain(coordinates, at, out)
    error = float((out - wanted).abs().max())
    assert error < 1e-9
    note(benchmark, error, len(coordinates))
    benchmark(lambda: backend("cpu").gain(coordinates, at, out))


def prepared(rows: torch.Tensor, state: VendiState) -> tuple[Quadrature, torch.Tensor, torch.Tensor]:
    """A quadrature, coordinates float32 [512, K] and what torch makes of them."""
    eigenvalues, vectors = state.eigenbasis()
    at = quadrature(eigenvalues, 1)
    coordinates = torch.nn.functional.normalize(rows[:512]) @ vectors.float()
    return at, coordinates, torch.stack(marginal_change(coordinates.double().square(), at))


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
