"""Stacked experts against one linear layer that sees the same rows, in turns in one process.

    pytest benchmarks/speed/bench_experts.py --benchmark-columns=median,rounds

A row is a token at one of the experts it was sent to, sorted by expert as transformers hands them over. What the ratio
should be, before it was measured: beside what a linear layer does, a sample's rows read the tables of its experts
anew, 4.6 KB a side for every 1,024 coordinates, against some hundred rows of 2 to 8 KB each between two experts (1 to
2 %), and the rows are put in order by two counting sorts (16 bytes a row). So 1.05 with 8 experts; with 128 a few rows
share a table, which then comes from the second or third cache for each: 1.2.
"""

import pytest
import torch

from benchmarks.speed.bench_sketching import DTYPES, take_turns
from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.sketch_matrix import SketchSpec, expert_column_tables, expert_row_tables

TOKENS, SAMPLES = 2048, 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("experts", "of_a_token", "width"), [(8, 2, 512), (8, 2, 1024), (8, 2, 2048), (128, 8, 1024)]
)
def test_experts_against_a_linear_layer(benchmark, experts, of_a_token, width, dtype):
    generator, rows = torch.Generator().manual_seed(0), TOKENS * of_a_token
    chosen = torch.rand(TOKENS, experts, generator=generator).topk(of_a_token).indices.flatten()
    order = chosen.argsort(stable=True)
    expert = chosen[order]
    sample = order // of_a_token // (TOKENS // SAMPLES)
    a, e = (torch.randn(rows, width, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    spec, name = SketchSpec(), "m.experts.down_proj"
    a_tables, e_tables = (
        make(spec, name, experts, width) for make in (expert_column_tables, expert_row_tables)
    )
    a_table, e_table = a_tables.table(0), e_tables.table(0)
    segments = torch.arange(0, rows + 1, rows // SAMPLES).unfold(0, 2, 1).contiguous()
    out = torch.zeros(SAMPLES, spec.dim)

    ops.expert_sketch(a, e, expert, sample, a_tables, e_tables, out)
    wanted = reference.expert_sketch(a, e, expert, sample, SAMPLES, a_tables, e_tables)
    assert float((out - wanted).norm() / wanted.norm()) < 1e-5
    benchmark.extra_info.update(experts=experts, of_a_token=of_a_token, rows=rows, width=width, dtype=dtype)
    take_turns(
        benchmark,
        lambda: ops.expert_sketch(a, e, expert, sample, a_tables, e_tables, out),
        {
            "linear layer": lambda: ops.linear_sketch(a, a_table, [(e, e_table)], segments, out),
        },
    )
