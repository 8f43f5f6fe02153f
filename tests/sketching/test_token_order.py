"""Tokens that change places before a layer and back behind it: exact, or an error that names the layer."""

import pytest
import torch
from exactness import case_errors
from small_models import FP32_RELATIVE, SPEC, build, pad, samples
from torch import nn
from torch.overrides import TorchFunctionMode

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.gradients.token_rows import UNKNOWN, Along, TokenRows


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


class Permuted(torch.autograd.Function):
    """Rows in another order, as fused mixtures of experts have it: no mode sees how."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        return x[order]

    @staticmethod
    def backward(ctx, e):
        out = torch.empty_like(e)
        out[ctx.order] = e
        return out, None


class Sorted(nn.Module):
    """Tokens of the batch sorted and put back by `take(x, order)`; `use(module, rows)` is done between."""

    def __init__(self, take, use) -> None:
        super().__init__()
        self.take, self.use = take, use
        self.layer, self.scale = nn.Linear(32, 32), nn.Parameter(torch.randn(32))

    def forward(self, x):
        rows = x.reshape(-1, 32)
        order = rows.detach()[:, 0].argsort()
        return self.take(self.use(self, self.take(rows, order)), order.argsort()).view(x.shape)


BETWEEN = {
    "layer": lambda m, x: m.layer(x),
    "product": lambda m, x: x @ m.layer.weight + x,
    "scale": lambda m, x: m.scale * x,
}


def sorting(take, name) -> nn.Module:
    model = build("llama_untied")
    torch.manual_seed(6)
    block = model.model.layers[0].mlp = Sorted(take, BETWEEN[name])
    if name == "scale":
        del block.layer
    else:
        del block.scale
    if name == "product":
        block.layer.bias = None
    return model.eval()


TAKES = {
    "embedding": lambda x, order: nn.functional.embedding(order, x),
    "index_copy": lambda x, order: torch.zeros_like(x).index_copy(0, order.argsort(), x),
    "written": lambda x, order: written(x, order.argsort()),
}


def written(x, places):
    out = torch.zeros_like(x)
    out[places] = x
    return out


@pytest.mark.parametrize("take", TAKES)
@pytest.mark.parametrize("name", BETWEEN)
def test_rows_of_a_batch_that_is_sorted_are_followed(name, take):
    model = sorting(TAKES[take], name)
    rows = samples()[:3]
    assert max(case_errors(model, GradientSketcher(model, SPEC), rows).values()) <= FP32_RELATIVE


@pytest.mark.parametrize("name", BETWEEN)
def test_rows_permuted_out_of_sight_are_refused_by_name(name):
    model = sorting(Permuted.apply, name)
    sketcher = GradientSketcher(model, SPEC)
    ids, labels, _ = pad(samples()[:3])
    with pytest.raises(GvendiError, match=r"exclude.*layers\.0\.mlp\.(layer|scale)"):
        sketcher(ids, labels)
    assert sketcher(ids[:1], labels[:1]).isfinite().all()


def test_rows_along_another_axis_than_the_first_are_followed():
    """As many heads as samples: an einsum puts heads first, and a size says nothing."""

    def use(layer, x):
        heads = torch.einsum("bthd->hbtd", x.unflatten(2, (4, 8)))
        return torch.einsum("hbtd->bthd", heads * layer.weight[:4, :1, None, None]).flatten(2)

    model = model_with(use)
    model.model.layers[0].mlp.layer = nn.Linear(32, 32, bias=False)
    rows = samples()[:4]
    assert max(case_errors(model, GradientSketcher(model, SPEC), rows).values()) <= FP32_RELATIVE


UNKNOWN_AFTER = {
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort(dim=0)[0],
    "topk": lambda x: torch.topk(x, 12, dim=0)[0],
    "take": lambda x: x.take(torch.arange(12 * 5).view(12, 5)),
    "constant product": lambda x: torch.eye(12).flip(0) @ x,
    "einsum": lambda x: torch.einsum("ni,nj->ij", x[:, :3], x),
}
KNOWN_AFTER = {
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort()[0],
    "topk": lambda x: x.topk(2)[0],
    "product": lambda x: x @ torch.ones(5, 7),
    "einsum": lambda x: torch.einsum("ni,ij->nj", x, torch.ones(5, 7)),
}


def known_after(operation):
    """What is known of the rows of three samples of four tokens after an operation."""
    rows = TokenRows(3, 4)

    class Following(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            rows.follow(function, args, kwargs or {}, out)
            return out

    x = torch.randn(12, 5, requires_grad=True)
    with Following():
        out = operation(x)
    return rows.of(out)


@pytest.mark.parametrize("name", UNKNOWN_AFTER)
def test_an_operation_along_the_samples_leaves_nothing_known(name):
    assert known_after(UNKNOWN_AFTER[name]) is UNKNOWN


@pytest.mark.parametrize("name", KNOWN_AFTER)
def test_an_operation_along_another_axis_keeps_rows(name):
    assert known_after(KNOWN_AFTER[name]) == Along(0, 4)
