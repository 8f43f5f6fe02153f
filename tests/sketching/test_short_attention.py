"""Attention in float32 over short sequences on a CPU: the same function, closer to it, and where it applies."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients.short_attention import LONGEST, ShortAttention, short_attention
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.proxy.load import load_proxy


def attend(dtype, length, **options):
    """Output and input gradients of attention over fixed draws, in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 4, length, 32, generator=generator).bfloat16().to(dtype) for _ in range(4))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = scaled_dot_product_attention(*inputs, **options)
    out.backward(g)
    return [out.detach().double(), *(x.grad.double() for x in inputs)]


@pytest.mark.parametrize("mask", ["causal", "bool", "added"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_is_closer_to_float64_than_the_kernel_it_replaces(dtype, mask):
    allowed = torch.ones(60, 60, dtype=torch.bool).tril()
    added = torch.zeros(60, 60, dtype=dtype).masked_fill(~allowed, float("-inf"))
    options = {"causal": {"is_causal": True}, "bool": {"attn_mask": allowed}, "added": {"attn_mask": added}}[
        mask
    ]
    wide = {name: x.double() if mask == "added" else x for name, x in options.items()}
    exact, plain = attend(torch.float64, 60, **wide), attend(dtype, 60, **options)
    with ShortAttention():
        found = attend(dtype, 60, **options)
    for right, before, now in zip(exact, plain, found, strict=True):
        assert (now - right).norm() <= 1.01 * (before - right).norm()
        assert (now - right).norm() <= 4e-3 * right.norm()


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 60), (torch.bfloat16, LONGEST + 1)])
def test_float32_and_long_sequences_are_left_alone(dtype, length):
    with ShortAttention():
        found = attend(dtype, length, is_causal=True)
    assert all(map(torch.equal, found, attend(dtype, length, is_causal=True)))


def test_sketches_in_bfloat16_are_made_with_it():
    ids = torch.randint(0, 2048, (8, 40), generator=torch.Generator().manual_seed(1))
    half, whole = load_proxy("tiny", dtype="bfloat16").model, load_proxy("tiny", dtype="float32").model
    exact = GradientSketcher(whole, SketchSpec(dim=256))(ids, ids)
    found = GradientSketcher(half, SketchSpec(dim=256))(ids, ids)
    assert float(torch.nn.functional.cosine_similarity(found, exact).min()) > 0.998
    with short_attention(half) as entered:
        assert isinstance(entered, ShortAttention)
    with short_attention(whole) as entered:
        assert entered is None
