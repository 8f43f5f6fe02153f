"""The choice of the instruction set, and that it does not change a bit of any result."""

import math
import os
import subprocess
import sys

import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops
from gvendi_fast.kernels.backends import cpu, use_backend
from gvendi_fast.kernels.sketch_matrix import SketchSpec, expert_column_tables, expert_row_tables, make_table

if cpu.why_not("fold_hadamard"):
    pytest.skip(f"compiled kernels: {cpu.status()}", allow_module_level=True)

SHAPES = [
    (70, 16, 63, 64),
    (65, 100, 128, 128),
    (70, 288, 1000, 1024),
    (9, 1025, 4864, 2048),
    (3, 50, 9000, 8192),
]


@pytest.fixture(autouse=True)
def _restore():
    before = cpu.current_isa()
    with use_backend("cpu"):
        yield
    cpu.set_isa(before)


def results(rows: int, width_in: int, width_out: int, dim: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, width_in, generator=generator).to(dtype)
    e = torch.randn(rows, width_out, generator=generator).to(dtype)
    a_table, e_table = make_table(0, "a", width_in, dim), make_table(0, "e", width_out, dim)
    segments, labels = torch.tensor([[0, 1], [1, rows]]), torch.arange(rows) % width_in
    yield ops.fold_hadamard(e, e_table)
    yield ops.linear_sketch(a, a_table, [(e, e_table)], segments, torch.zeros(2, dim))
    spec, routed = SketchSpec(dim), torch.arange(rows)
    experts = expert_column_tables(spec, "a", 3, width_in), expert_row_tables(spec, "e", 3, width_out)
    yield ops.expert_sketch(a, e, routed % 3, routed % 2, *experts, torch.zeros(2, dim))
    yield ops.expert_sketch(None, e, routed % 3, routed % 2, None, experts[1], torch.zeros(2, dim))
    yield ops.token_sketch(labels, e, segments, a_table, e_table, torch.zeros(2, dim))
    for norm in (None, "rms", "layer"):
        x = None if norm is None else e * 2 + 1
        yield ops.vector_sketch(x, e, segments, e_table, torch.zeros(2, dim), norm, 1e-6)
    for softcap in (None, 5.0):
        logits = e * 5
        yield from (*ops.softmax_fold(logits, labels, e_table, softcap, 0.7), logits)
    if dim <= 1024:
        square = torch.randn(300, dim, generator=generator).to(dtype)
        yield ops.covariance(square, torch.zeros(dim, dim, dtype=torch.float64))
    # Groups with more and with fewer rows than columns.
    for x in (e, e[:, :20].contiguous()):
        for q in (0.5, 1.0, 1.3, 2.0, math.inf):
            yield ops.entropy(x, torch.tensor([0, 1, rows - rows // 3, rows]), q)
    centroids = torch.nn.functional.normalize(torch.randn(40, width_out, generator=generator), dim=1)
    yield from ops.assign(e, centroids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "width_in", "width_out", "dim"), SHAPES)
def test_every_instruction_set_gives_the_same_bits(rows, width_in, width_out, dim, dtype):
    by_isa = {}
    for isa in cpu.available_isas():
        cpu.set_isa(isa)
        assert cpu.current_isa() == isa
        by_isa[isa] = list(results(rows, width_in, width_out, dim, dtype))
    for isa, got in by_isa.items():
        same = [torch.equal(x, y) for x, y in zip(got, by_isa["baseline"], strict=True)]
        assert all(same), (isa, same)


def test_baseline_is_always_there_and_auto_is_the_widest():
    assert cpu.available_isas()[0] == "baseline"
    cpu.set_isa("auto")
    assert cpu.current_isa() == cpu.available_isas()[-1]
    assert f"ready ({cpu.current_isa()} of baseline" in cpu.status()


def test_an_unknown_name_is_refused_with_the_list():
    with pytest.raises(GvendiError, match=r"must be one of auto, baseline.* got 'sse9'"):
        cpu.set_isa("sse9")


def run(isa: str) -> subprocess.CompletedProcess:
    code = "from gvendi_fast.kernels.backends import cpu; print(cpu.status())"
    environment = {**os.environ, "GVENDI_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_environment_forces_or_raises():
    forced = run("baseline")
    assert forced.returncode == 0, forced.stderr
    assert "ready (baseline of" in forced.stdout
    refused = run("sse9")
    assert refused.returncode != 0
    assert "GVENDI_ISA" in refused.stderr
    assert "baseline" in refused.stderr


def test_one_openmp_runtime_in_the_process():
    """In a process of its own: other libraries that tests import bring runtimes of theirs."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc to list the libraries of the process")
    code = "import gvendi_fast.kernels.backends.cpu; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    runtimes = {
        line.split()[-1]
        for line in maps.splitlines()
        if any(f"lib{name}" in line for name in ("gomp", "omp", "iomp"))
    }
    assert "_cpu" in maps
    assert len(runtimes) <= 1, runtimes
