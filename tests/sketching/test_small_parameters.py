"""Every handler of small parameters against autograd in float64: one operation, each sample's gradient, its sketch."""

import pytest
import torch
from small_models import SPEC
from torch.nn import functional

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import reference
from gvendi_fast.sketching.gradients import small_parameters
from gvendi_fast.sketching.gradients.parameter_uses import ParameterUses, Pass, Watched

SAMPLES, LENGTH, WIDTH, HEADS = 4, 6, 8, 4
# A sketch is float32: its sums of some hundreds of products.
TOLERANCE = 1e-6


def written(x, q):
    y = x * 1
    y[:, 2:4] = q
    return y


def sinks(x, q):
    scores = x.unflatten(-1, (HEADS, 2)).permute(0, 2, 1, 3) @ x.unflatten(-1, (HEADS, 2)).permute(0, 2, 3, 1)
    whole = torch.cat([scores, q.reshape(1, -1, 1, 1).expand(len(x), -1, LENGTH, -1)], dim=-1)
    return whole.softmax(dim=-1)[..., :-1].transpose(1, 2)


def attention_bias(x, q):
    heads = x.unflatten(-1, (HEADS, 2)).transpose(1, 2)
    return functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=q[None]).transpose(1, 2)


# {what: (shape of the parameter, the operation of x [4, 6, 8] on it)}.
CASES = {
    "bias": ((WIDTH,), lambda x, q: x + q),
    "scale in place": ((WIDTH,), lambda x, q: (x * 1).mul_(q)),
    "a number": ((), lambda x, q: x * q),
    "reversed difference": ((1,), lambda x, q: q - x),
    "quotient": ((WIDTH,), lambda x, q: q / (2 + x.square())),
    "power": ((WIDTH,), lambda x, q: (1 + x.square()) ** q),
    "blend": ((WIDTH,), lambda x, q: torch.lerp(x, x.square(), q)),
    "chosen": ((WIDTH,), lambda x, q: torch.where(x > 0, x, q)),
    "larger": ((WIDTH,), lambda x, q: torch.maximum(x, q)),
    "state space": (
        (HEADS, 2),
        lambda x, q: (x.unflatten(-1, (HEADS, 2)) * -torch.exp(q.float()).double()).tanh(),
    ),
    "softplus of a sum": ((HEADS,), lambda x, q: functional.softplus(x.reshape(-1, HEADS) + q)),
    "heads first": (
        (HEADS, 1, 1),
        lambda x, q: (x.unflatten(-1, (HEADS, 2)).transpose(1, 2) * q).transpose(1, 2),
    ),
    "of a transposed batch": ((WIDTH,), lambda x, q: (x.transpose(0, 1) * q).transpose(0, 1)),
    "masked for each sample": ((LENGTH, 1), lambda x, q: x + q * (torch.arange(24.0).view(4, 6, 1) % 3)),
    "repeated for each sample": ((1, LENGTH, WIDTH), lambda x, q: x * q.repeat(SAMPLES, 1, 1)),
    "sinks": ((HEADS,), sinks),
    "joined": ((3, WIDTH), lambda x, q: torch.cat([q[None].expand(SAMPLES, -1, -1), x * 1], dim=1).tanh()),
    "stacked": ((1, 1, WIDTH), lambda x, q: torch.stack([q.expand(x.shape), x], dim=1).prod(dim=1)),
    "written": ((WIDTH,), written),
    "depthwise convolution": (
        (WIDTH, 1, 3),
        lambda x, q: functional.conv1d(x.transpose(1, 2), q, padding=2, groups=WIDTH)[..., :LENGTH],
    ),
    "grouped convolution": (
        (6, 4, 2),
        lambda x, q: functional.conv1d(x.transpose(1, 2), q, stride=2, dilation=2, groups=2),
    ),
    "pointwise convolution": ((5, WIDTH, 1), lambda x, q: functional.conv1d(x.transpose(1, 2), q).square()),
    "bias of a convolution": (
        (WIDTH,),
        lambda x, q: functional.conv1d(
            x.transpose(1, 2), torch.ones(WIDTH, 1, 2).to(x), q, groups=WIDTH
        ).square(),
    ),
    "depthwise weight without its middle axis": (
        (WIDTH, 3),
        lambda x, q: functional.conv1d(x.transpose(1, 2), q.unsqueeze(1), groups=WIDTH).square(),
    ),
    "weight of a layer norm": ((WIDTH,), lambda x, q: functional.layer_norm(x, (WIDTH,), q, None, 1e-3)),
    "bias of a layer norm": ((WIDTH,), lambda x, q: functional.layer_norm(x, (WIDTH,), None, q).square()),
    "weight of an rms norm": ((WIDTH,), lambda x, q: functional.rms_norm(x, (WIDTH,), q, 1e-3).square()),
    "norm of heads": (
        (2,),
        lambda x, q: functional.rms_norm(x.reshape(-1, 2), (2,), q, 1e-3).square(),
    ),
    "any other: prelu": ((1,), functional.prelu),
    "any other: a bias inside attention": ((HEADS, LENGTH, LENGTH), attention_bias),
    "a type": ((WIDTH,), lambda x, q: x.type_as(q) * q),
}


def sketch(case: str, samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    """(sketches [B, K] of the pass, those of autograd's gradients of each sample) of one operation."""
    shape, operation = CASES[case]
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(shape, generator=generator, dtype=torch.float64)
    # A first entry that nothing reads keeps every gradient from being all of the parameter's.
    x = torch.randn(samples, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        out = operation(x, q)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    module = torch.nn.Module()
    module.q = torch.nn.Parameter(q)
    watched = Watched("block.q", "block", module, "q")
    probe = torch.zeros(samples, SPEC.dim, requires_grad=True)
    segments = torch.arange(samples)[:, None] * LENGTH + torch.tensor([0, LENGTH])
    current = Pass(SPEC, probe, (), segments, samples, LENGTH)
    uses = ParameterUses([watched], current)
    with uses:
        loss = (operation(x.clone().requires_grad_(), module.q) * weights).sum()
    leaves = list(uses.leaves.values())
    z, *missed = torch.autograd.grad(loss, [probe, *leaves], allow_unused=True)
    uses.missed(missed)
    wanted = []
    parts = weights.reshape(samples, -1)
    for b in range(samples):
        own = torch.zeros_like(parts)
        own[b] = parts[b]
        (gradient,) = torch.autograd.grad((operation(x, module.q) * own.view(weights.shape)).sum(), module.q)
        wanted.append(reference.sketch_of_gradient({"block.q": gradient}, SPEC))
    return z, torch.stack(wanted)


@pytest.mark.parametrize("case", CASES)
def test_a_use_has_the_sketch_of_every_samples_gradient(case):
    got, wanted = sketch(case)
    error = (got.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(error.max()) <= TOLERANCE


@pytest.mark.parametrize(
    "case", ["state space", "masked for each sample", "depthwise convolution", "norm of heads"]
)
def test_large_gradients_are_pulled_back_one_sample_after_the_other(case, monkeypatch):
    monkeypatch.setattr(small_parameters, "AT_ONCE", 1)
    got, wanted = sketch(case)
    assert float(((got.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) <= TOLERANCE


REFUSED = {
    "a mean over the batch": (
        (WIDTH,),
        lambda x, q: torch.cumsum(x * 1, dim=0).mean(dim=0, keepdim=True) * q,
    ),
    "another sample's rows": (
        (WIDTH,),
        lambda x, q: functional.bilinear(x.flip(0), x, q.expand(1, WIDTH, WIDTH)),
    ),
    "joined along samples": ((1, LENGTH, WIDTH), lambda x, q: torch.cat([q, x], dim=0)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_use_whose_samples_are_not_known_is_refused_by_name(case, monkeypatch):
    monkeypatch.setitem(CASES, case, REFUSED[case])
    with pytest.raises(GvendiError, match=r"'block\.q' \(Module\) as .* uses them: .*exclude="):
        sketch(case)
