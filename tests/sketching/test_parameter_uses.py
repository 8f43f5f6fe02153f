"""Uses of parameters outside the layers that are known: exact, or an error that names parameter and operation."""

import math

import pytest
import torch
from exactness import case_errors
from small_models import DENSE, FP32_RELATIVE, SPEC, build, pad, samples, state_of
from torch import nn
from torch.nn import functional

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher


class Block(nn.Module):
    """Takes the place of an MLP: `use(block, x)` says what is done with weight [32, 32], wide [48, 32] and so on."""

    def __init__(self, use) -> None:
        super().__init__()
        self.use = use
        self.inner = nn.Linear(32, 32)
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)
        self.wide = nn.Parameter(torch.randn(48, 32) / 6)
        self.heads = nn.Parameter(torch.randn(4, 8, 8) / 3)
        self.stack = nn.Parameter(torch.randn(3, 32, 32) / 6)
        self.bias = nn.Parameter(torch.randn(32) / 6)

    def forward(self, x):
        return self.use(self, x)


def heads(x):
    """[B, T, 32] -> [4, B * T, 8]: rows by number, tokens along the second axis."""
    return x.reshape(-1, 4, 8).transpose(0, 1)


def joined(x, like):
    return x.transpose(0, 1).reshape(like.shape)


USES = {
    "linear": lambda m, x: functional.linear(x, m.weight, m.bias),
    "linear, cast and transposed": lambda m, x: functional.linear(x, m.weight.double().T.float()),
    "product on the right": lambda m, x: x @ m.weight,
    "product on the left": lambda m, x: (m.weight @ x.transpose(1, 2)).transpose(1, 2),
    "rows and columns": lambda m, x: functional.linear(x[..., :16], m.wide[4:36, 8:24]),
    "three chunks": lambda m, x: sum(functional.linear(x, w) for w in m.wide[:48].view(3, 16, 32)).repeat(
        1, 1, 2
    ),
    "chosen of a stack": lambda m, x: x @ m.stack[1] + functional.linear(x, m.stack[0]),
    "numbered by bmm": lambda m, x: joined(torch.bmm(heads(x), m.heads), x),
    "numbered by matmul": lambda m, x: (x.view(*x.shape[:2], 4, 1, 8) @ m.heads).reshape(x.shape),
    "numbered with a bias": lambda m, x: joined(torch.baddbmm(m.bias.view(4, 1, 8), heads(x), m.heads), x),
    "einsum": lambda m, x: torch.einsum("bti,oi->bto", x, m.weight),
    "einsum, numbered": lambda m, x: torch.einsum("btgi,gio->btgo", x.unflatten(2, (4, 8)), m.heads).flatten(
        2
    ),
    "addmm": lambda m, x: torch.addmm(m.bias, x.reshape(-1, 32), m.weight).view(x.shape),
    "computed weight": lambda m, x: functional.linear(x, m.weight / m.weight.norm(dim=1, keepdim=True)),
    "dot product": lambda m, x: 2 + (x @ m.bias)[..., None].tanh() * x,
    "used twice": lambda m, x: functional.linear(torch.tanh(x @ m.weight), m.weight),
    "picked and put back": lambda m, x: _sorted(m, x),
    "rows of its transpose": lambda m, x: x * m.weight.T[torch.arange(x.shape[1])],
    "product, then rows": lambda m, x: x @ m.weight + x * m.weight[torch.arange(x.shape[1])],
    "rows, then product": lambda m, x: x * m.weight[torch.arange(x.shape[1])] + x @ m.weight,
    "outside its module": lambda m, x: m.inner(x) + functional.linear(x.sin(), m.inner.weight.T),
    "without a gradient": lambda m, x: (
        functional.linear(x * m.bias.detach().norm(), m.weight.detach()) + m.inner(x)
    ),
}


def _sorted(m, x):
    """Tokens in another order, two of each."""
    flat = x.reshape(-1, 32)
    order = flat.detach()[:, 0].repeat(2).argsort()
    product = torch.cat([flat, flat.cos()])[order] @ m.weight
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    first, second = product[back].split(len(flat))
    return (first * second).view(x.shape)


def model_with(use) -> nn.Module:
    model = build("llama_untied")
    torch.manual_seed(6)
    model.model.layers[1].mlp = Block(use)
    return model.eval()


def used(model) -> list[str]:
    """Of the block's parameters those that get a gradient are sketched; the others are left out."""
    ids = torch.tensor([[5, 9, 7]])
    model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    model.zero_grad()
    return unused


# What a use is read as does not depend on the kind of sketch: by random signs, a few uses every day.
BY_SIGNS = {
    "linear",
    "rows and columns",
    "einsum, numbered",
    "dot product",
    "picked and put back",
}


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *(pytest.param(name, SPEC, id=f"{name}-hadamard") for name in USES),
        *(
            pytest.param(
                name, DENSE, id=f"{name}-rademacher", marks=() if name in BY_SIGNS else pytest.mark.soak
            )
            for name in USES
        ),
    ],
)
def test_a_product_with_a_parameter_is_exact(name, spec):
    model = model_with(USES[name])
    before = state_of(model)
    sketcher = GradientSketcher(model, spec, exclude=used(model))
    assert max(case_errors(model, sketcher).values()) <= FP32_RELATIVE
    assert state_of(model)[:3] == before[:3]


def test_a_layer_whose_own_forward_does_something_else_is_exact():
    model = build("llama_untied")
    layer = model.model.layers[0].mlp.down_proj
    layer.forward = lambda x: functional.linear(2 * x.sin(), layer.weight)
    sketcher = GradientSketcher(model, SPEC)
    assert max(case_errors(model, sketcher).values()) <= FP32_RELATIVE
    del layer.forward


def test_values_of_the_pass_are_the_models_own():
    model = model_with(USES["einsum, numbered"])
    sketcher = GradientSketcher(model, SPEC, exclude=used(model))
    ids, labels = samples()[0]
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    wanted = functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    assert sketcher.sketch(ids[None], labels[None]).loss[0] == pytest.approx(float(wanted), rel=1e-5)


class Hidden(torch.autograd.Function):
    """A product that no mode sees."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, e):
        x, weight = ctx.saved_tensors
        return e @ weight.T, x.flatten(0, -2).T @ e.flatten(0, -2)


REFUSED = {
    "sum over an axis": (lambda m, x: torch.einsum("bti,oj->bto", x, m.weight), r"weight.*einsum"),
    "mixed samples": (
        lambda m, x: (torch.cat([x, x.sum(0, keepdim=True)]) @ m.weight)[: len(x)],
        "traced to samples|both directions",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sketched_is_refused_by_name(name):
    use, message = REFUSED[name]
    model = model_with(use)
    with pytest.raises(GvendiError, match=message) as raised:
        GradientSketcher(model, SPEC, exclude=used(model))(*pad(samples()))
    assert "exclude=['model.layers.1.mlp.weight']" in str(raised.value)


@pytest.mark.parametrize("taken", [lambda w: w, lambda w: w.clone()], ids=["itself", "a copy"])
def test_a_use_out_of_sight_is_refused_by_name(taken):
    model = model_with(lambda m, x: Hidden.apply(x, taken(m.weight)))
    with pytest.raises(GvendiError, match=r"layers\.1\.mlp\.weight.*hides what it does"):
        GradientSketcher(model, SPEC, exclude=used(model))


def test_an_input_that_is_changed_afterwards_is_refused_by_name():
    def use(m, x):
        y = x * 1
        out = y @ m.weight
        with torch.no_grad():
            y.mul_(2)
        return out

    model = model_with(use)
    with pytest.raises(GvendiError, match=r"mlp\.weight.* was changed in place"):
        GradientSketcher(model, SPEC)(*pad(samples()))


def test_what_is_left_out_is_not_watched():
    model = model_with(USES["linear"])
    sketcher = GradientSketcher(model, SPEC, exclude=["model.layers.1.mlp.*"])
    assert not sketcher._probed.watched
    assert math.isfinite(float(sketcher(*pad(samples())).sum()))
