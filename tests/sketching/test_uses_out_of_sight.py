"""Uses of layers' parameters that a tap of the layer alone would miss: exact, or an error that names the parameter."""

import pytest
import torch
from exactness import case_errors, wanted_sketch
from small_models import FP32_RELATIVE, SPEC, build, pad, samples
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.norms import norm_formula
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher


class Beside(nn.Module):
    """An MLP, and something beside it: `use(block, x)`."""

    def __init__(self, mlp, use) -> None:
        super().__init__()
        self.mlp, self.use = mlp, use
        self.lin, self.norm, self.small = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(16, 32)
        self.shift = nn.Parameter(0.2 * torch.randn(32))
        self.table = nn.Parameter(torch.randn(64, 16), requires_grad=False)
        self.places = nn.Embedding(61, 32)

    def forward(self, x):
        return self.mlp(x) + self.use(self, x)


def model_with(use, *kept) -> nn.Module:
    """A model of which one block has the parameters `kept` and uses them so."""
    model = build("llama_untied")
    torch.manual_seed(6)
    block = model.model.layers[0].mlp = Beside(model.model.layers[0].mlp, use)
    table = block.table.detach()
    del block.table
    block.register_buffer("table", table)
    for name in {"lin", "norm", "small", "shift", "places"} - set(kept):
        delattr(block, name)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def by_position(m, x):
    """Rows by token, then by sample."""
    rows = m.norm(x.transpose(0, 1).reshape(-1, 32))
    return rows.view(x.shape[1], x.shape[0], 32).transpose(0, 1)


EXACT = {
    "a layer of a detached input": (lambda m, x: x * m.lin(x.detach()), "lin"),
    "a norm of a detached input": (lambda m, x: x * m.norm(x.detach()), "norm"),
    "a layer of a buffer": (
        lambda m, x: x * m.small(m.table[: x.shape[1]].expand(len(x), -1, -1)),
        "small",
    ),
    "a norm whose rows go by position": (by_position, "norm"),
    "an embedding whose ids go by position": (
        lambda m, x: x * m.places((x.detach().sum(-1) * 5).long().t() % 61).transpose(0, 1),
        "places",
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_a_tap_sees_is_exact(name):
    model = model_with(*EXACT[name])
    assert max(case_errors(model, GradientSketcher(model, SPEC)).values()) <= FP32_RELATIVE


def test_a_layer_of_a_buffer_that_all_samples_share_is_refused_by_name():
    model = model_with(lambda m, x: x * m.small(m.table[: x.shape[1]]), "small")
    sketcher = GradientSketcher(model, SPEC)
    with pytest.raises(GvendiError, match=r"exclude 'model\.layers\.0\.mlp\.small\.weight'"):
        sketcher(*pad(samples()))


class Product(torch.autograd.Function):
    """x w^T, which no mode sees."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, e):
        x, weight = ctx.saved_tensors
        return e @ weight, e.flatten(0, -2).T @ x.flatten(0, -2)


def by_kept_view(m, x):
    return m.lin(x) + torch.cat([x @ m.kept.T] * 2, -1)


# {name: (use, the layer, the parameter)}
REFUSED = {
    "an autograd function": (lambda m, x: Product.apply(x, m.lin.weight), "lin", "lin.weight"),
    "an autograd function beside": (
        lambda m, x: m.lin(x) + Product.apply(x, m.lin.weight),
        "lin",
        "lin.weight",
    ),
    "an autograd function of a bias": (
        lambda m, x: m.lin(x) * Product.apply(x, m.lin.bias[None]),
        "lin",
        "lin.bias",
    ),
    "a view that was kept": (by_kept_view, "lin", "lin.weight"),
    "longer texts alone": (
        lambda m, x: m.lin(x) + (x @ m.lin.weight if x.shape[1] > 5 else 0),
        "lin",
        "lin.weight",
    ),
    "a norm's weight for longer texts": (
        lambda m, x: m.norm(x) * (m.norm.weight if x.shape[1] > 5 else 1),
        "norm",
        "norm.weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_use_out_of_a_layers_sight_is_refused_by_name_at_construction(name):
    use, layer, parameter = REFUSED[name]
    model = model_with(use, layer)
    if use is by_kept_view:
        model.model.layers[0].mlp.kept = model.model.layers[0].mlp.lin.weight[:16]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(GvendiError, match=r"also without running their layers|hides what it does") as raised:
        GradientSketcher(model, SPEC)
    assert f"exclude=['model.layers.0.mlp.{parameter}']" in str(raised.value)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_parameter_that_longer_texts_alone_reach_is_refused_by_name_in_their_batch():
    model = model_with(lambda m, x: x * m.shift if x.shape[1] > 20 else x, "shift")
    sketcher = GradientSketcher(model, SPEC)
    short, long = samples()[0], (torch.arange(1, 25), torch.arange(1, 25))
    assert "model.layers.0.mlp.shift" not in sketcher.parameters
    with pytest.raises(GvendiError, match=r"exclude=\['model\.layers\.0\.mlp\.shift'\]"):
        sketcher(*pad([long]))
    assert bool(sketcher(*pad([(short[0][:8], short[1][:8])])).any())
    assert all(p.requires_grad for p in model.parameters())


class Scaled(nn.Embedding):
    def forward(self, ids):
        return functional.embedding(ids, 3 * self.weight)


class OneHot(nn.Embedding):
    def forward(self, ids):
        return functional.one_hot(ids, 61).float() @ self.weight


class ByPosition(nn.Embedding):
    def forward(self, ids):
        return functional.embedding(ids.t(), self.weight).transpose(0, 1)


class Backwards(nn.Embedding):
    def forward(self, ids):
        return functional.embedding(ids.flip(1), self.weight).flip(1)


class ByFrequency(nn.Embedding):
    def __init__(self, *sizes) -> None:
        super().__init__(*sizes, scale_grad_by_freq=True)


@pytest.mark.parametrize("kind", [Scaled, OneHot, ByPosition, Backwards, ByFrequency])
def test_an_embedding_that_is_not_looked_up_plainly_is_refused_by_name(kind):
    model = build("llama_untied")
    embedding = kind(61, 32)
    embedding.load_state_dict(model.model.embed_tokens.state_dict())
    model.model.embed_tokens = embedding
    with pytest.raises(GvendiError, match=r"exclude=\['model\.embed_tokens\.weight'\]"):
        GradientSketcher(model, SPEC)(*pad(samples()))
    # Left out, gradients start at it all the same.
    sketcher, (ids, labels) = (
        GradientSketcher(model, SPEC, exclude=["model.embed_tokens.weight"]),
        samples()[0],
    )
    wanted = wanted_sketch(model, sketcher, ids, labels)
    error = (sketcher(ids[None], labels[None])[0] - wanted).norm() / wanted.norm()
    assert float(error) <= FP32_RELATIVE


class OddNorm(nn.Module):
    """An RMSNorm by what `of` makes of its weight."""

    def __init__(self, of) -> None:
        super().__init__()
        self.of, self.weight = of, nn.Parameter(torch.rand(32))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.of(self.weight)


@pytest.mark.parametrize(
    "of", [torch.abs, torch.relu, lambda w: w.clamp(-0.2, 1)], ids=["abs", "relu", "clamp"]
)
def test_a_norm_by_a_function_of_its_weight_is_refused(of):
    with pytest.raises(GvendiError, match="OddNorm does not scale its normalised input by its weight"):
        norm_formula(OddNorm(of))


def test_a_norm_with_one_number_for_all_features_is_exact():
    class OneNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(1))

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight

    model = build("llama_untied")
    model.model.norm = OneNorm()
    assert max(case_errors(model, GradientSketcher(model, SPEC)).values()) <= FP32_RELATIVE


def test_a_weight_of_layers_that_store_it_either_way_is_refused_by_name():
    model = build("llama_untied")
    block = model.model.layers[0]
    turned = Conv1D(32, 32)
    turned.weight = block.self_attn.q_proj.weight
    block.mlp.register_forward_hook(lambda module, args, out: out + turned(out))
    block.turned = turned
    with pytest.raises(
        GvendiError, match=r"\[O, I\].*exclude=\['model\.layers\.0\.self_attn\.q_proj\.weight'\]"
    ):
        GradientSketcher(model, SPEC)
