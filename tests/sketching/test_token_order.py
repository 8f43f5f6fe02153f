"""Tokens that change places before a layer and back behind it: exact, or an error that names the layer."""

import pytest
import torch
from exactness import case_errors
from small_models import FP32_RELATIVE, SPEC, build, samples
from torch import nn

from gvendi_fast.sketching.gradients.sketcher import GradientSketcher


class Reordered(nn.Module):
    """Adds a linear layer to an MLP: `use(layer, x)` says in which order it sees the tokens of x [B, T, d]."""

    def __init__(self, inner: nn.Module, use) -> None:
        super().__init__()
        self.inner, self.use, self.layer = inner, use, nn.Linear(32, 32)

    def forward(self, x):
        return self.inner(x) + self.use(self.layer, x)


def odd_ones_first(layer, x):
    length = x.shape[1]
    y = layer(torch.cat([x[:, 1::2], x[:, 0::2]], dim=1))
    out = torch.empty_like(y)
    out[:, 1::2], out[:, 0::2] = y[:, : length // 2], y[:, length // 2 :]
    return out


def flipped_by_a_product(layer, x):
    flip = torch.eye(x.shape[1]).flip(0)
    return flip @ layer(flip @ x)


def flipped(layer, x):
    return layer(x.flip(1)).flip(1)


USES = {"cat": odd_ones_first, "product": flipped_by_a_product, "flip": flipped}


def model_with(use) -> nn.Module:
    model = build("llama_untied")
    torch.manual_seed(6)
    model.model.layers[0].mlp = Reordered(model.model.layers[0].mlp, use)
    return model.eval()


@pytest.mark.parametrize("name", USES)
def test_tokens_in_another_order_are_exact(name):
    model = model_with(USES[name])
    assert max(case_errors(model, GradientSketcher(model, SPEC), samples()[:3]).values()) <= FP32_RELATIVE


def test_a_model_that_keeps_the_order_is_sketched_up_to_its_last_target():
    model = model_with(lambda layer, x: layer(x))
    assert not GradientSketcher(model, SPEC)._probed.picks
    model.model.layers[0].mlp.use = flipped_by_a_product
    assert GradientSketcher(model, SPEC)._probed.picks
