"""Kinds of layers: presets leave out what they say, and groups of layers are sketched apart in one pass."""

import pytest
import torch
from small_models import CONFIGS, DENSE, FP32_RELATIVE, GATED, SPEC, build, pad, samples

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.layers import (
    PRESETS,
    Cell,
    choose_groups,
    find_cells,
    find_experts,
    left_out,
)
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher, _frozen
from gvendi_fast.sketching.gradients.taps import find_taps

BATCH = pad(samples())


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def alone(model, sketcher, number, spec=SPEC) -> torch.Tensor:
    """The sketch of one group, all other parameters excluded."""
    others = [name for name, group in sketcher.groups.of.items() if group != number]
    return GradientSketcher(model, spec, exclude=others)(*BATCH)


@pytest.mark.parametrize(
    "spec", [SPEC, pytest.param(DENSE, marks=pytest.mark.soak)], ids=["hadamard", "rademacher"]
)
@pytest.mark.parametrize("name", ["qwen2_tied", "gpt2", "opt_projected", "llama_wide", "phi_biased_head"])
def test_every_group_is_the_sketch_without_the_others_and_the_sum_keeps_its_bits(name, spec):
    model = build(name)
    plain = GradientSketcher(model, spec).sketch(*BATCH)
    sketcher = GradientSketcher(model, spec, groups="kind-and-half")
    got = sketcher.sketch(*BATCH)
    assert torch.equal(got.z, plain.z)
    assert torch.equal(got.loss, plain.loss)
    assert plain.by_group is None
    assert got.by_group.shape == (len(BATCH[0]), len(sketcher.groups.names), spec.dim)
    assert relative(got.by_group.sum(1), plain.z) <= FP32_RELATIVE
    for number in range(len(sketcher.groups.names)):
        assert relative(got.by_group[:, number], alone(model, sketcher, number, spec)) <= FP32_RELATIVE


def test_groups_of_patterns_part_layers_that_read_one_input_and_a_weight_from_its_bias():
    model = build("qwen2_tied")
    groups = {"queries": ["*q_proj.weight"], "biases": ["*.bias"], "values": ["*v_proj.weight", "*o_proj*"]}
    sketcher = GradientSketcher(model, SPEC, groups=groups)
    got, plain = sketcher.sketch(*BATCH), GradientSketcher(model, SPEC)(*BATCH)
    assert sketcher.groups.names == ("queries", "biases", "values", "rest")
    assert sketcher.groups.of["model.layers.0.self_attn.q_proj.bias"] == 1
    assert relative(got.z, plain) <= FP32_RELATIVE
    assert relative(got.by_group.sum(1), plain) <= FP32_RELATIVE
    for number in range(4):
        assert relative(got.by_group[:, number], alone(model, sketcher, number)) <= FP32_RELATIVE


def test_a_tied_matrix_is_one_parameter_and_both_its_gradients_go_to_one_group():
    model = build("qwen2_tied")
    sketcher = GradientSketcher(model, SPEC, groups="kind")
    number = sketcher.groups.names.index("embedding and head")
    assert [name for name, group in sketcher.groups.of.items() if group == number] == [
        "model.embed_tokens.weight"
    ]
    only = GradientSketcher(model, SPEC, exclude=["model.layers.*", "model.norm.*"])(*BATCH)
    assert relative(sketcher.sketch(*BATCH).by_group[:, number], only) <= FP32_RELATIVE


@pytest.mark.soak
@pytest.mark.parametrize("name", ["qwen2_tied", "phi_biased_head"])
def test_a_compiled_pass_gives_the_same_groups(name, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, plain = CompileCounterWithBackend("eager"), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda run, **options: plain(run, backend=counter, **options))
    model = build(name)
    # Biases apart from their weights, so that one module has two taps.
    groups = {"biases": ["*.bias"], "first": ["model.layers.0.*.weight"]}
    wanted = GradientSketcher(model, SPEC, groups=groups).sketch(*BATCH)
    compiled = GradientSketcher(model, SPEC, groups=groups, compile=True)
    for rows in (samples(), samples()[:3], samples()):
        got = compiled.sketch(*pad(rows))
    assert relative(got.z, wanted.z) <= FP32_RELATIVE
    assert relative(got.by_group, wanted.by_group) <= FP32_RELATIVE
    kinds = GradientSketcher(model, SPEC, groups="kind-and-half", compile=True)
    counter.clear()
    got = kinds.sketch(*BATCH)
    # Halves do not make a graph of every block.
    assert sum(len(graph.graph.nodes) > 0 for graph in counter.graphs) == 1
    wanted = GradientSketcher(model, SPEC, groups="kind-and-half").sketch(*BATCH)
    assert relative(got.by_group, wanted.by_group) <= FP32_RELATIVE
    torch._dynamo.reset()


# What the parameters of a block are called, in the architectures of small_models.
ATTENTION = ("attn", "attention")
MLP = ("mlp", "fc1", "fc2")


@pytest.mark.parametrize("name", list(CONFIGS))
def test_kinds_are_those_that_the_architectures_call_so(name):
    sketcher = GradientSketcher(build(name), SPEC, groups="kind-and-half")
    for parameter, number in sketcher.groups.of.items():
        (cell,) = sketcher.groups.cells[number]
        path = parameter.split(".")
        in_block = any(part.isdigit() for part in path)
        wanted_half = "" if not in_block else "first half" if "0" in path else "last half"
        assert cell.half == wanted_half, parameter
        if "norm" in parameter or "ln_" in parameter:
            wanted = "norm"
        elif in_block:
            wanted = "attention" if any(word in part for part in path for word in ATTENTION) else "mlp"
        elif any(word in parameter for word in ("embed_tokens", "wte", "embed_in")):
            tied = not any("head" in p or "embed_out" in p for p in sketcher.parameters)
            wanted = "embedding and head" if tied else "embedding"
        elif "embed_positions" in parameter or "wpe" in parameter:
            wanted = "embedding"
        else:
            wanted = "other" if "project" in parameter else "head"
        assert cell.kind == wanted, parameter


@pytest.mark.parametrize("name", ["llama_untied", "gemma2"])
def test_a_preset_is_the_sum_of_its_groups(name):
    model = build(name)
    sketcher = GradientSketcher(model, SPEC, groups="kind-and-half")
    by_group = sketcher.sketch(*BATCH).by_group
    tied = "embedding and head" in sketcher.groups.names
    for preset in PRESETS:
        if tied and preset in ("no-embedding", "no-head"):
            with pytest.raises(GvendiError, match=r"one parameter \(tied\); give 'no-embedding-or-head'"):
                GradientSketcher(model, SPEC, layers=preset)
            with pytest.raises(GvendiError, match=r"one parameter \(tied\)"):
                choose_groups(preset, sketcher.groups.cells, sketcher.groups.names)
            continue
        if preset == "expert":
            # A model without experts.
            with pytest.raises(GvendiError, match="leaves none of the sketch groups"):
                choose_groups(preset, sketcher.groups.cells, sketcher.groups.names)
            continue
        chosen = choose_groups(preset, sketcher.groups.cells, sketcher.groups.names)
        direct = GradientSketcher(model, SPEC, layers=preset)
        assert relative(by_group[:, chosen].sum(1), direct(*BATCH)) <= FP32_RELATIVE
        assert (direct.coverage.share == 1) == (preset in ("all", "no-expert", "no-router"))


def test_errors_name_the_presets_and_the_groups():
    model = build("llama_untied")
    with pytest.raises(GvendiError, match=r"layers is 'middle'; wanted one of all, no-embedding,"):
        GradientSketcher(model, SPEC, layers="middle")
    with pytest.raises(GvendiError, match=r"groups is 'depth'; wanted one of kind, kind-and-half, embedding"):
        GradientSketcher(model, SPEC, groups="depth")
    with pytest.raises(GvendiError, match=r"q_proj\.weight' is in two groups, 'a' and 'b'"):
        GradientSketcher(model, SPEC, groups={"a": ["*q_proj*"], "b": ["*layers.0*"]})
    with pytest.raises(GvendiError, match=r"groups\['a'\] = \['nothing'\] matches no sketched parameter"):
        GradientSketcher(model, SPEC, groups={"a": ["nothing"]})
    with pytest.raises(GvendiError, match=r"a group 'rest'"):
        GradientSketcher(model, SPEC, groups={"rest": ["*"]})
    with pytest.raises(GvendiError, match=r"groups\['a'\] is '\*'; wanted a list"):
        GradientSketcher(model, SPEC, groups={"a": "*"})
    with pytest.raises(
        GvendiError, match=r"leaves no parameter of the model, which has: attention, last half"
    ):
        left_out("first-half", {"w": Cell("attention", "last half")})
    kinds = GradientSketcher(model, SPEC, groups="kind").groups
    with pytest.raises(GvendiError, match=r"would split the sketch group 'attention'.*kind-and-half"):
        choose_groups("last-half", kinds.cells, kinds.names)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MANY = {"num_local_experts": 4, "num_experts_per_tok": 2}
# {family: (configuration, paths inside a block of its experts, of its router, and others that are an MLP)}
MIXTURES = {
    "qwen2_moe": (
        ("Qwen2MoeConfig", {**GATED, **EXPERTS, "shared_expert_intermediate_size": 24}),
        "mlp.experts.",
        {"mlp.gate.weight"},
        "mlp.shared_expert",
    ),
    # Stacked biases [E, O] are no router, though they are matrices of E rows.
    "gpt_oss": (
        ("GptOssConfig", {**GATED, **MANY, "head_dim": 8, "pad_token_id": 0}),
        "mlp.experts.",
        {"mlp.router.weight", "mlp.router.bias"},
        None,
    ),
    "granite_moe": (
        ("GraniteMoeConfig", {**GATED, **MANY}),
        "block_sparse_moe.",
        {"block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"},
        None,
    ),
}


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_and_routers_are_told_by_their_number(family):
    _, inside, router, beside = MIXTURES[family]
    model = build(family, {family: MIXTURES[family][0]})
    with _frozen(model):
        cells = find_cells(model, find_taps(model))
    in_blocks = {name: name.split(".", 3)[-1] for name in cells if ".layers." in name}
    for name, path in in_blocks.items():
        if path in router:
            assert cells[name].kind == "router", name
        elif beside and path.startswith(beside):
            assert cells[name].kind == "mlp", name
        elif path.startswith(inside):
            assert cells[name].kind == "expert", name
        else:
            assert cells[name].kind in ("attention", "norm"), name
    kinds = {cell.kind for cell in cells.values()}
    assert {"expert", "router"} <= kinds
    assert {cells[n].kind for n in left_out("no-expert", cells)} == {"expert"}
    assert {cells[n].kind for n in cells if n not in left_out("expert", cells)} == {"expert"}
    assert {cells[n].kind for n in cells if n not in left_out("mlp", cells)} == kinds & {
        "mlp",
        "expert",
        "router",
    }


def test_a_list_of_experts_is_known_and_other_stacks_and_lists_are_none():
    class Mixture(torch.nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(32, rows, bias=False)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))

    class Turned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, 8, 8))
            self.bias = torch.nn.Parameter(torch.ones(4, 8))

    mixture, other = Mixture(3), Mixture(5)
    block = torch.nn.ModuleDict({"a": mixture, "b": Turned(), "c": torch.nn.Conv1d(8, 4, 3)})
    experts, routers = find_experts([block, torch.nn.ModuleDict({"a": other})])
    assert experts == {id(p) for p in mixture.experts.parameters()}
    assert routers == {id(mixture.gate.weight)}


def test_a_mixer_with_parameters_of_its_own_is_attention_and_so_are_they():
    values = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = build("mamba", {"mamba": ("MambaConfig", values)})
    with _frozen(model):
        cells = find_cells(model, find_taps(model))
    assert {cell.kind for name, cell in cells.items() if ".mixer." in name} == {"attention"}
