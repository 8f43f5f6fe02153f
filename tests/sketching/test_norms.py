"""Which formula a norm follows: found in float32 whatever the model's dtype, refused where none fits."""

import copy

import pytest
import torch
from small_models import CONFIGS, FP32_RELATIVE, GATED, SPEC, autograd_sketch, build, pad, samples
from torch import nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.norms import TOLERANCE, Unhooked, affine_input, norm_formula, normalised
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.gradients.taps import NORM, find_taps, module_kind

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MORE = {
    "cohere": ("CohereConfig", {**GATED, "logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {**GATED, "head_dim": 8, "logit_scale": 0.25, "sliding_window": 5}),
    "olmo2": ("Olmo2Config", GATED),
    "stablelm": ("StableLmConfig", GATED),
    "starcoder2": ("Starcoder2Config", {**GATED, "sliding_window": 5}),
}
LAYER = {
    "gpt2",
    "gpt_neox",
    "opt",
    "opt_projected",
    "phi_biased_head",
    "cohere",
    "cohere2",
    "stablelm",
    "starcoder2",
}


def formulas(model: nn.Module) -> dict[str, tuple[str, float]]:
    return {path: norm_formula(m) for path, m in model.named_modules() if module_kind(m) == NORM}


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_every_norm_is_recognised_alike_in_every_dtype(name):
    model = build(name, {**CONFIGS, **MORE})
    found = formulas(model)
    assert len(found) >= model.config.num_hidden_layers + 1
    assert {kind for kind, _ in found.values()} == {"layer" if name in LAYER else "rms"}
    for dtype in DTYPES[1:]:
        assert formulas(copy.deepcopy(model).to(dtype)) == found, dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trial_leaves_the_module_as_it_was(dtype):
    module = nn.LayerNorm(16).to(dtype)
    module.register_buffer("extra", torch.ones(3, dtype=dtype))
    before = {name: (t, t.clone()) for name, t in module.state_dict(keep_vars=True).items()}
    assert norm_formula(module) == ("layer", 1e-5)
    for name, t in module.state_dict(keep_vars=True).items():
        assert t is before[name][0]
        assert torch.equal(t, before[name][1])
        assert t.dtype == dtype


class Norm(nn.Module):
    """A norm with the formula and the name of its eps that a test asks for."""

    def __init__(self, width: int, formula, **numbers):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(width, generator=torch.Generator().manual_seed(2)))
        self.formula = formula
        for name, value in numbers.items():
            setattr(self, name, value)

    def forward(self, hidden):
        return self.formula(self, hidden)


def rms(x, eps):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def t5(self, x):
    out = rms(x, self.variance_epsilon)
    # The norm of T5 casts to its weight's dtype where that is narrow.
    return self.weight * (out.to(self.weight.dtype) if self.weight.dtype != torch.float32 else out)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5])
@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (lambda eps: nn.LayerNorm(24, eps=eps, bias=False), "layer"),
        (lambda eps: nn.RMSNorm(24, eps=eps), "rms"),
        (lambda eps: Norm(24, lambda self, x: (1 + self.weight) * rms(x, self.epsilon), epsilon=eps), "rms"),
        (lambda eps: Norm(24, t5, variance_epsilon=eps), "rms"),
        (
            lambda eps: Norm(
                24, lambda self, x: self.weight * rms(x, self.norm_eps), norm_eps=torch.tensor(eps)
            ),
            "rms",
        ),
        # Two numbers are called eps, and the formula uses the second.
        (lambda eps: Norm(24, lambda self, x: self.weight * rms(x, self.eps), a_eps=0.1, eps=eps), "rms"),
    ],
)
def test_eps_is_found_under_any_name(module, kind, eps, dtype):
    torch.manual_seed(0)
    found = norm_formula(module(eps).to(dtype))
    assert found == (kind, pytest.approx(eps, rel=1e-6))


def test_wrong_eps_is_no_fit():
    # The module says 1e-5 and adds 1e-6: its own x_hat is taken, never the formula with the wrong number.
    module = Norm(24, lambda self, x: self.weight * rms(x, 1e-6), eps=1e-5)
    for dtype in DTYPES[:2]:
        assert norm_formula(module.to(dtype)) == ("affine", 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_left_to_pytorch_is_the_one_its_kernel_uses(dtype):
    module = nn.RMSNorm(64, eps=None).to(dtype)
    kind, eps = norm_formula(module)
    assert kind == "rms"
    assert eps in (torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    x = (1e-3 * torch.randn(5, 64, generator=torch.Generator().manual_seed(1))).to(dtype)
    got = module(x).float()
    # A few roundings of the module's dtype; the other candidate is off by a factor of 9 or more, or the same one.
    assert torch.allclose(got, normalised(x, kind, eps), rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-6)


def mean_abs(self, x):
    return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


def grouped(self, x):
    return self.weight * rms(x.unflatten(-1, (4, -1)), self.eps).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("formula", [mean_abs, grouped])
def test_what_fits_neither_formula_is_taken_from_the_module(formula, dtype):
    module = Norm(32, formula, eps=1e-6).to(dtype)
    assert norm_formula(module) == ("affine", 0.0)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
    with torch.no_grad():
        got = affine_input(Unhooked(module), x)
        module.weight.fill_(1)
        wanted = formula(module.float(), x.float())
    assert got.dtype == torch.float32
    assert torch.allclose(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


NEAR = {
    # Within bf16's 1/256 of an RMSNorm, and none: neither linear in the weight nor in the bias is exact.
    "bent weight": lambda self, x: torch.sinh(0.2 * self.weight) / 0.2 * rms(x, self.eps),
    "weight squared": lambda self, x: self.weight.square() * rms(x, self.eps),
    "own rounding": lambda self, x: (self.weight * rms(x, self.eps)).to(torch.bfloat16),
    "not finite": lambda self, x: self.weight * rms(x, self.eps) / 0,
}


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", NEAR)
def test_near_norm_is_refused_by_name(name, dtype):
    with pytest.raises(GvendiError, match=r"Norm does not scale .* exclude=\[patterns\]"):
        norm_formula(Norm(32, NEAR[name], eps=1e-6).to(dtype))


def test_bias_that_is_not_added_is_refused():
    class Twisted(nn.LayerNorm):
        def forward(self, x):
            return (
                nn.functional.layer_norm(x, self.normalized_shape, self.weight, None, self.eps) + self.bias**3
            )

    with pytest.raises(GvendiError, match=r"Twisted does not scale .* add its bias"):
        norm_formula(Twisted(16))


def test_norm_that_takes_no_float32_is_refused_by_name():
    class Narrow(nn.RMSNorm):
        def forward(self, x):
            if x.dtype != torch.bfloat16:
                raise TypeError("bfloat16 only")
            return super().forward(x)

    with pytest.raises(GvendiError, match=r"Narrow cannot be evaluated in float32.*bfloat16 only.*exclude"):
        norm_formula(Narrow(16, eps=1e-6).bfloat16())


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "cohere", "llama_untied"])
def test_norm_weights_of_a_bf16_model_have_the_sketch_of_float32(name):
    model = build(name, {**CONFIGS, **MORE})
    # An RMSNorm in a LayerNorm's place shows where hidden states have a mean: it gave 0.08 to 0.99 here.
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.2)
    model = model.to(torch.bfloat16)
    norms = {t.weight for t in find_taps(model).taps if t.kind == NORM}
    others = [n for n, _ in model.named_parameters() if n not in norms]
    wide = GradientSketcher(copy.deepcopy(model).float(), SPEC, exclude=others)
    narrow = GradientSketcher(model, SPEC, exclude=others)
    assert set(narrow.parameters) == norms
    batch = pad(samples())
    cosine = torch.cosine_similarity(narrow(*batch).double(), wide(*batch).double())
    assert cosine.min() >= 0.999, cosine


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["llama_untied", "gpt2", "mean_abs"])
def test_hooks_of_others_are_no_part_of_a_norm(kind, when):
    model = build("llama_untied" if kind == "mean_abs" else kind)
    if kind == "mean_abs":
        model.model.layers[0].input_layernorm = Norm(32, mean_abs, eps=1e-3)
    norm = next(m for m in model.modules() if module_kind(m) == NORM)
    others = [n for n, p in model.named_parameters() if p is not norm.weight]
    sketcher = GradientSketcher(model, SPEC, exclude=others) if when == "after" else None
    norm.register_forward_pre_hook(lambda module, args: (args[0] + 1.5,))
    norm.register_forward_hook(lambda module, args, output: 2 * output)
    sketcher = sketcher or GradientSketcher(model, SPEC, exclude=others)
    ids, labels = samples()[0]
    wanted, _ = autograd_sketch(model, sketcher, ids, labels)
    assert (sketcher(ids[None], labels[None])[0].double() - wanted).norm() / wanted.norm() <= FP32_RELATIVE
