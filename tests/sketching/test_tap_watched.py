"""A tap on models with experts, states, sinks and gates: the sketcher's sketches, and training the same to the bit."""

import copy

import pytest
import torch
from exactness import off
from small_models import SPEC, build
from test_experts import with_picked
from tiny_families import NotBuiltError, tiny_model
from torch import nn

from gvendi_fast import GradientSketcher, GvendiError
from gvendi_fast.kernels import reference

# Experts, sinks and biased experts, a state space, linear attention beside attention, layers written out.
NAMES = ["mixtral", "gpt_oss", "mamba2", "qwen3_next", "falcon"]
MORE = [
    "qwen3_moe", "olmoe", "deepseek_v3", "llama4_text", "granitemoe", "jetmoe", "mamba", "falcon_mamba", "jamba",
    "zamba2", "bamba", "nemotron_h", "rwkv", "recurrent_gemma", "lfm2", "lfm2_moe", "qwen3_5_text", "apertus", "bloom",
    "minimax", "glm4_moe", "ernie4_5_moe", "diffllama", "phimoe", "dots1", "hunyuan_v1_moe",
]  # fmt: skip
FAMILIES = pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(name, marks=pytest.mark.soak) for name in MORE)]
)
LENGTHS = [9, 6, 11, 4]


def batch(seed=0):
    """Four samples, padded on the right: ids, labels and mask [4, 11]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    labels = ids.where(mask != 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_of(model, given):
    """Of a model's own logits, for not every family here takes labels."""
    logits = model(given["input_ids"], attention_mask=given["attention_mask"], use_cache=False).logits
    labels = given["labels"][:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels)


def deterministic(model):
    """In train mode without dropout, so that it can be compared with a pass in eval mode."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def whole(model, sketcher):
    """The sketch float64 [K], by the definition, of the gradients that the weights have."""
    found = {name: p.grad for name, p in model.named_parameters() if name in sketcher.parameters}
    found = {name: g for name, g in found.items() if g is not None}
    return reference.sketch_of_gradient(found, sketcher.spec, sketcher.transposed, sketcher.stacked)


def distance(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(scope="module")
def made():
    """{name: (model in train mode, its sketcher, the sketcher's own sketches of `batch()`)}, made when asked for."""
    kept = {}

    def get(name):
        if name not in kept:
            try:
                model = tiny_model(name)
            except NotBuiltError as error:
                pytest.skip(f"transformers here has no tiny {name}: {error}")
            sketcher, given = GradientSketcher(model, SPEC), batch()
            wanted = sketcher(given["input_ids"], given["labels"], given["attention_mask"])
            kept[name] = deterministic(model), sketcher, wanted
        model, sketcher, wanted = kept[name]
        model.zero_grad()
        return model, sketcher, wanted

    return get


@FAMILIES
def test_two_micro_batches_of_padded_rows(made, name):
    model, sketcher, wanted = made(name)
    given = batch()
    halves = [{key: x[at : at + 2] for key, x in given.items()} for at in (0, 2)]
    with sketcher.tap(model) as tap:
        for half in halves:
            loss_of(model, half).backward()
        found = tap.take().z
    assert off(found, wanted) < 1e-5
    assert distance(found.sum(dim=0), whole(model, sketcher)) < 1e-4


@FAMILIES
def test_the_trained_weights_are_the_same_to_the_bit(made, name):
    model, sketcher, _ = made(name)
    state = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    steps, weights = 3 if name in NAMES else 20, []
    for is_tapped in (False, True):
        model.load_state_dict(state)
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tap = sketcher.tap(model)
        for step in range(steps):
            if is_tapped:
                tap.attach()
            loss_of(model, batch(step)).backward()
            if is_tapped:
                assert len(tap.take().z) == len(LENGTHS)
                tap.detach()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(copy.deepcopy(model.state_dict()))
    model.load_state_dict(state)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in state)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.soak)])
@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
def test_experts_are_computed_as_the_user_has_them(made, name, way):
    model, sketcher, wanted = made(name)
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("transformers here has no choice of experts")
    before = model.config._experts_implementation
    model.set_experts_implementation(way)
    loss_of(model, batch()).backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    with sketcher.tap(model) as tap:
        loss_of(model, batch()).backward()
        found = tap.take().z
        assert model.config._experts_implementation == way
    model.set_experts_implementation(before)
    assert off(found, wanted) < 1e-5
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["gpt_oss", "mamba2", "doge"])
def test_activation_checkpoints(made, name, reentrant):
    model, sketcher, wanted = made(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with sketcher.tap(model) as tap:
        loss_of(model, batch()).backward()
        found = tap.take().z
    if reentrant:
        model.disable_input_require_grads()
    model.gradient_checkpointing_disable()
    assert off(found, wanted) < 1e-5


def test_experts_that_are_layers():
    model = with_picked()
    sketcher, given = GradientSketcher(model, SPEC), batch()
    wanted = sketcher(given["input_ids"], given["labels"], given["attention_mask"])
    with sketcher.tap(model) as tap:
        model(**given).loss.backward()
        assert off(tap.take().z, wanted) < 1e-5


def test_frozen_parameters_others_left_out_and_groups():
    model = tiny_model("gpt_oss")
    for name, p in model.named_parameters():
        p.requires_grad_("down_proj" not in name or "bias" in name)
    sketcher = GradientSketcher(
        model, SPEC, exclude=["*sinks", "*embed*", "*gate_up_proj"], groups={"first": ["*layers.0.*"]}
    )
    given = batch()
    wanted = sketcher.sketch(given["input_ids"], given["labels"], given["attention_mask"])
    with sketcher.tap(model) as tap:
        loss_of(model, given).backward()
        found = tap.take()
    assert off(found.z, wanted.z) < 1e-5
    assert off(found.by_group.flatten(0, 1), wanted.by_group.flatten(0, 1)) < 1e-5
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_an_auxiliary_loss_of_the_router_is_part_of_the_gradient(made):
    model, sketcher, wanted = made("mixtral")
    with sketcher.tap(model) as tap:
        out = model(**batch(), output_router_logits=True)
        (out.loss + 10 * out.aux_loss).backward()
        found = tap.take().z
    assert off(found, wanted) > 1e-3
    assert distance(found.sum(dim=0), whole(model, sketcher)) < 1e-4


@pytest.mark.parametrize("name", ["gpt_oss", "mamba2"])
def test_autocast(made, name):
    """The samples' sketches add up to that of the step's own gradient, whatever its rounding."""
    model, sketcher, _ = made(name)
    gradients = []
    for is_tapped in (False, True):
        model.zero_grad()
        tap = sketcher.tap(model)
        if is_tapped:
            tap.attach()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch())
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    found = tap.take().z
    tap.detach()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert distance(found.sum(dim=0), whole(model, sketcher)) < 0.02


class Scaled(torch.autograd.Function):
    """What no mode sees inside of."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, gradient):
        x, scale = ctx.saved_tensors
        return gradient * scale, (gradient * x).flatten(0, 1).sum(dim=0)


class Fused(nn.Module):
    """A gate of features that a kernel of its own computes while the model is trained; `how` it reaches the kernel."""

    def __init__(self, how):
        super().__init__()
        self.log_scale, self.how = nn.Parameter(0.1 * torch.randn(32)), how

    def forward(self, x):
        if not self.training:
            return x * self.log_scale.exp()
        if self.how == "computed before":
            return Scaled.apply(x, self.log_scale.exp())
        if self.how == "as well":
            return x * self.log_scale.exp() + Scaled.apply(x, self.log_scale)
        return Scaled.apply(x, self.log_scale)


@pytest.mark.parametrize("how", ["itself", "computed before", "as well", "in a checkpoint"])
def test_a_kernel_that_training_alone_uses_is_not_missed_in_silence(how):
    model = build("llama_untied")
    torch.manual_seed(2)
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, Fused(how))
    sketcher = GradientSketcher(model.eval(), SPEC)
    model.train()
    if how == "in a checkpoint":
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()

    def step():
        with sketcher.tap(model) as tap:
            model(**batch()).loss.backward()
            tap.take()

    with pytest.raises(GvendiError, match=r"log_scale.*exclude="):
        step()
    assert torch.overrides._get_current_function_mode() is None


def test_a_forward_pass_that_fails_leaves_no_mode_behind(made):
    model, sketcher, wanted = made("mixtral")
    given = batch()
    with sketcher.tap(model) as tap:
        with pytest.raises(IndexError):
            model(given["input_ids"] + 100)
        assert torch.overrides._get_current_function_mode() is None
        loss_of(model, given).backward()
        assert off(tap.take().z, wanted) < 1e-5


def in_one_row(given, width):
    """The samples of a padded batch one after the other in a row of `width` tokens, with positions."""
    row = {"input_ids": 0, "labels": -100, "position_ids": 0}
    row, at = {name: torch.full((1, width), fill) for name, fill in row.items()}, 0
    for i, n in enumerate(LENGTHS):
        for name in ("input_ids", "labels"):
            row[name][0, at : at + n] = given[name][i, :n]
        row["position_ids"][0, at : at + n] = torch.arange(n)
        at += n
    return {**row, "use_cache": False}


@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
def test_packed_samples_of_a_mixture_of_experts(made, way):
    model, sketcher, wanted = made("mixtral")
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("transformers here has no choice of experts")
    before = model.config._experts_implementation
    model.set_experts_implementation(way)
    with sketcher.tap(model) as tap:
        model(**in_one_row(batch(), sum(LENGTHS) + 3)).loss.backward()
        found = tap.take().z
    model.set_experts_implementation(before)
    assert off(found, wanted) < 1e-5
    assert distance(found.sum(dim=0), whole(model, sketcher)) < 1e-4


def test_packed_samples_of_experts_that_are_layers():
    model = with_picked(normed=True)
    sketcher, given = GradientSketcher(model, SPEC), batch()
    wanted = sketcher(given["input_ids"], given["labels"], given["attention_mask"])
    with sketcher.tap(model) as tap:
        model(**in_one_row(given, sum(LENGTHS))).loss.backward()
        assert off(tap.take().z, wanted) < 1e-5


@pytest.mark.filterwarnings("ignore:attention in packed rows")
def test_packed_samples_of_a_state_space_are_refused(made):
    model, sketcher, _ = made("mamba2")
    given = in_one_row(batch(), sum(LENGTHS))
    with (
        sketcher.tap(model),
        pytest.raises(GvendiError, match=r"row of its own instead of packing .*exclude="),
    ):
        model(given["input_ids"], position_ids=given["position_ids"], use_cache=False)
