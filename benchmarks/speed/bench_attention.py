"""Fused attention on a CPU in bfloat16, forward and backward: PyTorch's own against `short_attention`'s float32.

    pytest benchmarks/speed/bench_attention.py --benchmark-columns=median,rounds

Both take turns in one process; the printed ratio, float32 over bfloat16, is what `short_attention.LONGEST` rests on.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.speed.bench_sketching import take_turns
from gvendi_fast.sketching.gradients import short_attention

SHAPES = [
    (32, 4, 41, 32),
    (32, 4, 64, 32),
    (16, 4, 128, 32),
    (8, 4, 256, 32),
    (4, 4, 512, 32),
    (4, 14, 256, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(benchmark, shape, monkeypatch):
    monkeypatch.setattr(short_attention, "LONGEST", 1 << 20)
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(shape, generator=generator).bfloat16() for _ in range(4))

    def plain() -> list[torch.Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        scaled_dot_product_attention(*inputs, is_causal=True).backward(g)
        return [x.grad for x in inputs]

    def short() -> list[torch.Tensor]:
        with short_attention.ShortAttention():
            return plain()

    for one, other in zip(plain(), short(), strict=True):
        assert float((one - other).norm() / one.norm()) < 2e-2
    take_turns(benchmark, short, {"bfloat16": plain})
