"""Mixtures of experts: fused and unfused, of every layout, against autograd's gradient of all parameters."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from exactness import EXACT, case_errors, judge, wanted_sketch
from small_models import DENSE, FP32_RELATIVE, SPEC, build, pad, samples, state_of
from tiny_families import NotBuiltError, tiny_model
from torch import nn
from torch.nn import functional

from gvendi_fast.kernels import ops
from gvendi_fast.sketching.gradients.compiled import CompileError
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher

FUSED = [
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "deepseek_v3",
    "llama4_text",
    "granitemoe",
    "dbrx",
    "jetmoe",
]


# All experts in one matrix [experts * inner, width], and settings within settings.
DBRX = {
    "vocab_size": 61,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_seq_len": 64,
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
}


def model_of(kind: str) -> nn.Module:
    if kind == "dbrx":
        return build(kind, {kind: ("DbrxConfig", DBRX)})
    try:
        model = tiny_model(kind)
    except NotBuiltError as error:
        pytest.skip(f"transformers here has no tiny {kind}: {error}")
    return model


@pytest.mark.parametrize("kind", FUSED)
def test_fused_experts_are_exact(kind):
    finding = judge(model_of(kind))
    assert (finding.status, finding.detail) == (EXACT, "")
    assert finding.share == 1.0


def test_fused_experts_in_float64_keep_the_models_own_way():
    """Grouped products have no kernels in float64."""
    model = model_of("mixtral").double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    assert max(case_errors(model, GradientSketcher(model, SPEC)).values()) <= FP32_RELATIVE


@pytest.mark.parametrize(
    "kind", ["dbrx", *(pytest.param(name, marks=pytest.mark.soak) for name in ("mixtral", "gpt_oss"))]
)
def test_fused_experts_are_exact_by_random_signs(kind):
    assert judge(model_of(kind), DENSE).status == EXACT


class Picked(nn.Module):
    """Experts that are layers, called with the tokens that were picked for them, as transformers 4 has them."""

    def __init__(self, width: int, inner: int, count: int, top: int, normed: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, inner), nn.LayerNorm(inner) if normed else nn.SiLU(), nn.Linear(inner, width)
            )
            for _ in range(count)
        )
        self.top = top

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = functional.softmax(self.gate(flat), dim=-1).topk(self.top, dim=-1)
        mask = functional.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            place, token = torch.where(mask[number])
            out.index_add_(
                0, token, expert(flat[None, token].reshape(-1, flat.shape[1])) * weights[token, place, None]
            )
        return out.reshape(x.shape)


def with_picked(count=4, top=2, normed=False) -> nn.Module:
    model = build("llama_untied")
    torch.manual_seed(4)
    for layer in model.model.layers:
        layer.mlp = Picked(32, 24, count, top, normed)
    return model.eval()


@pytest.mark.parametrize(
    "spec", [SPEC, pytest.param(DENSE, marks=pytest.mark.soak)], ids=["hadamard", "rademacher"]
)
@pytest.mark.parametrize(("count", "top"), [(4, 2), (6, 1), (2, 2)], ids=["some", "one each", "all to all"])
def test_experts_that_are_layers_are_exact(count, top, spec):
    errors = case_errors(with_picked(count, top), GradientSketcher(with_picked(count, top), spec))
    assert max(errors.values()) <= FP32_RELATIVE


def test_a_norm_inside_an_expert_is_exact():
    model = with_picked(normed=True)
    assert max(case_errors(model, GradientSketcher(model, SPEC)).values()) <= FP32_RELATIVE


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_an_expert_that_no_token_or_every_token_sees(kind):
    model = model_of(kind)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "router" in name or name.endswith("gate.weight"):
                # The logits of expert 0 are far above, those of expert 1 far below.
                p.zero_() if p.dim() == 2 else p.copy_(torch.tensor([9.0, -9.0, 0.5, 0.0]))
                if p.dim() == 2:
                    p[0], p[1], p[2] = 0.0, 0.0, 0.3
    experts = [m for m in model.modules() if hasattr(m, "gate_up_proj")]
    sketcher = GradientSketcher(model, SPEC)
    assert experts
    assert max(case_errors(model, sketcher).values()) <= FP32_RELATIVE


def test_biases_of_experts_whose_weights_are_frozen():
    model = model_of("gpt_oss")
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("proj_bias"))
    sketcher = GradientSketcher(model, SPEC)
    assert sketcher.stacked == set(sketcher.parameters)
    assert max(case_errors(model, sketcher).values()) <= FP32_RELATIVE


def test_groups_of_parameters_add_up_and_each_is_exact():
    model = model_of("mixtral")
    whole = GradientSketcher(model, SPEC)
    sketcher = GradientSketcher(model, SPEC, groups={"experts": ["*experts*"], "router": ["*gate.weight"]})
    found, plain = sketcher.sketch(*pad(samples())), whole.sketch(*pad(samples()))
    assert sketcher.groups.names == ("experts", "router", "rest")
    assert torch.equal(found.z, plain.z)
    for number, name in enumerate(sketcher.groups.names):
        chosen = [p for p in sketcher.parameters if sketcher.groups.of[p] == number]
        others = [p for p in sketcher.parameters if p not in chosen]
        only = GradientSketcher(model, SPEC, exclude=others)
        for z, row in zip(found.by_group[:, number], samples(), strict=True):
            wanted = wanted_sketch(model, only, *row)
            # A router's gradient is a small difference of large ones.
            assert (z.double() - wanted).norm() <= 3 * FP32_RELATIVE * wanted.norm(), name


def test_kinds_of_layers_are_known_of_experts():
    sketcher = GradientSketcher(model_of("mixtral"), SPEC, groups="kind-and-half")
    assert set(sketcher.groups.of) == set(sketcher.parameters)
    mlp = GradientSketcher(model_of("mixtral"), SPEC, layers="mlp")
    assert any("experts" in name for name in mlp.parameters)


@pytest.mark.parametrize("own", ["eager", "grouped_mm", "batched_mm"])
def test_the_models_own_choice_comes_back_and_gives_the_same_sketch(own):
    model = model_of("mixtral")
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("transformers here has one way to compute experts")
    grouped = GradientSketcher(model, SPEC)(*pad(samples()))
    model.set_experts_implementation(own)
    before = state_of(model)
    assert torch.equal(GradientSketcher(model, SPEC)(*pad(samples())), grouped)
    assert model.config._experts_implementation == own
    assert state_of(model) == before


def test_a_layers_experts_are_one_launch_a_weight():
    model = model_of("mixtral")
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("transformers here has one way to compute experts")
    sketcher = GradientSketcher(model, SPEC)
    with mock.patch.object(ops, "expert_sketch", wraps=ops.expert_sketch) as launches:
        sketcher(*pad(samples()))
    assert launches.call_count == 2 * len(model.model.layers)


def test_copies_and_pickles_sketch_alike():
    sketcher = GradientSketcher(model_of("gpt_oss"), SPEC)
    wanted = sketcher(*pad(samples()))
    for again in (copy.deepcopy(sketcher), pickle.loads(pickle.dumps(sketcher))):
        assert torch.equal(again(*pad(samples())), wanted)
        assert not set(map(id, again.model.parameters())) & set(map(id, sketcher.model.parameters()))


@pytest.mark.parametrize("make", [lambda: model_of("mixtral"), with_picked], ids=["fused", "layers"])
def test_a_compiled_pass_is_refused(make):
    with pytest.raises(CompileError, match="followed operation by operation"):
        GradientSketcher(make(), SPEC, compile=True)
