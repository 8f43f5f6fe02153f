"""The Hadamard sketch of a model's gradients: its value for unlimited K is that of the exact gradients."""

import math

import numpy as np
import pytest
import torch
from small_models import build

from gvendi_fast import GradientSketcher, SketchSpec
from gvendi_fast.vendi import VendiState, gvendi, unlimited_k

ROWS, LENGTH, SEEDS = 64, 12, 8


@pytest.fixture(scope="module")
def model():
    return build("llama_untied")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 61, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exact(model, ids):
    rows = []
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum")
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows).double()


@pytest.mark.parametrize("q", [1, pytest.param(2, marks=pytest.mark.soak)])
@pytest.mark.parametrize("dim", [pytest.param(64, marks=pytest.mark.soak), 256])
def test_the_estimate_is_that_of_exact_gradients(model, ids, exact, dim, q):
    truth = gvendi(exact, q)
    found = []
    for seed in range(SEEDS):
        z = GradientSketcher(model, SketchSpec(dim=dim, seed=seed))(ids, ids)
        found.append(unlimited_k(VendiState(dim).update(z), q=q))
    plain = np.mean([item.plain for item in found]) / truth - 1
    error = np.array([item.value for item in found]) / truth - 1
    noise = error.std(ddof=1) / math.sqrt(SEEDS)
    assert plain < -0.05
    assert abs(error.mean()) < 0.02 + 2 * noise
    assert abs(error.mean()) < abs(plain) / 3
    assert sum(item.low <= truth <= item.high for item in found) >= SEEDS - 1
