"""A model in any wrapper is sketched as the plain model, or refused; it trains afterwards as before."""

import copy
import os
import socket
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from places import ROOT, TESTS
from small_models import SPEC, autograd_sketch, build, pad, samples
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients import names
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher


def compiled(module):
    return torch.compile(module, backend=never)


def never(graph, inputs):
    """A compiler that is called only where a wrapper is not passed by."""
    raise AssertionError("the pass has compiled a wrapped model")


def blocks(model, wrap, count=2):
    for i in range(count):
        model.model.layers[i] = wrap(model.model.layers[i])
    return model


def one_layer(model, wrap):
    mlp = model.model.layers[0].mlp
    mlp.up_proj = wrap(mlp.up_proj)
    return model


def in_place(model, modules):
    for module in modules:
        module.compile(backend=never)
    return model


def compiled_forward(model):
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, backend=never)
    return model


def checkpoints_of_its_own(model, use_reentrant=False):
    """Blocks that are checkpointed by the model's own code, in eval mode too."""
    for block in model.model.layers:
        block.forward = _checkpointed(block.forward, use_reentrant)
    return model


def _checkpointed(forward, use_reentrant):
    def run(hidden, **kwargs):
        return checkpoint(lambda x: forward(x, **kwargs), hidden, use_reentrant=use_reentrant)

    return run


def sharded(model, **settings):
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def mixed(model):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    return blocks(model, lambda block: fully_shard(checkpoint_wrapper(block), mp_policy=policy), 1)


def reentrant(module):
    return checkpoint_wrapper(module, checkpoint_impl=CheckpointImpl.REENTRANT)


# {name: (class of names._WRAPPERS that it proves, or None, what makes it of the plain model)}
WRAPPED = {
    "compiled": ("OptimizedModule", compiled),
    "compiled in place": (None, lambda model: in_place(model, [model])),
    "one layer compiled": ("OptimizedModule", lambda model: one_layer(model, compiled)),
    "embedding compiled": (
        "OptimizedModule",
        lambda model: setattr(model.model, "embed_tokens", compiled(model.model.embed_tokens)) or model,
    ),
    "head compiled": (
        "OptimizedModule",
        lambda model: setattr(model, "lm_head", compiled(model.lm_head)) or model,
    ),
    "blocks compiled": ("OptimizedModule", lambda model: blocks(model, compiled)),
    "blocks compiled in place": (None, lambda model: in_place(model, model.model.layers)),
    "forwards compiled": (None, compiled_forward),
    "one block checkpointed": ("ActivationWrapper", lambda model: blocks(model, checkpoint_wrapper, 1)),
    "all blocks checkpointed": ("ActivationWrapper", lambda model: blocks(model, checkpoint_wrapper)),
    "all blocks checkpointed, reentrant": ("ActivationWrapper", lambda model: blocks(model, reentrant)),
    "one layer checkpointed": ("ActivationWrapper", lambda model: one_layer(model, checkpoint_wrapper)),
    "blocks offloaded": ("ActivationWrapper", lambda model: blocks(model, offload_wrapper)),
    "checkpointed by its own code": (None, checkpoints_of_its_own),
    "gradient checkpointing": (None, lambda model: model.gradient_checkpointing_enable() or model.train()),
    "data parallel": ("DataParallel", DataParallel),
    "averaged": ("AveragedModel", torch.optim.swa_utils.AveragedModel),
    "ddp": ("DistributedDataParallel", DistributedDataParallel),
    "ddp of compiled checkpoints": (
        "DistributedDataParallel",
        lambda model: DistributedDataParallel(compiled(blocks(model, checkpoint_wrapper))),
    ),
    "fully_shard": (None, sharded),
    "fully_shard without resharding": (None, lambda model: sharded(model, reshard_after_forward=False)),
    "fully_shard of compiled checkpoints": (
        "OptimizedModule",
        lambda model: compiled(sharded(blocks(model, checkpoint_wrapper))),
    ),
    "fully_shard of some blocks, mixed precision": (None, lambda model: mixed(model)),
    "gradient hooks of weights": (
        None,
        lambda model: [p.register_hook(lambda g: 2 * g) for p in model.parameters()] and model,
    ),
}
# In tests of their own, below: packages that need not be installed.
ELSEWHERE = {"PeftModel", "PeftMixedModel", "BaseTuner", "DeepSpeedEngine"}


@pytest.fixture(scope="module")
def plain():
    return build("llama_untied")


@pytest.fixture(scope="module")
def wanted(plain):
    return GradientSketcher(plain, SPEC)(*pad(samples()))


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_model_has_the_sketches_of_the_plain_one(name, plain, wanted):
    wrapped = WRAPPED[name][1](copy.deepcopy(plain))
    tree = [(path, type(module)) for path, module in wrapped.named_modules()]
    sketcher = GradientSketcher(wrapped, SPEC)
    assert torch.equal(sketcher(*pad(samples())), wanted)
    assert sketcher.parameters == tuple(plain.state_dict())
    # A second time, and the wrappers stand where they stood.
    assert torch.equal(sketcher(*pad(samples())), wanted)
    assert [(path, type(module)) for path, module in wrapped.named_modules()] == tree


def test_every_known_wrapper_is_tried():
    tried = {kind for kind, _ in WRAPPED.values()}
    assert {name for _, name, _ in names._WRAPPERS} - ELSEWHERE == tried - {None}


@pytest.mark.parametrize("name", ["ddp", "fully_shard", "all blocks checkpointed"])
def test_a_wrapped_model_trains_after_a_sketch_as_it_did_before(name, plain):
    wrap = WRAPPED[name][1]
    fresh, sketched = wrap(copy.deepcopy(plain)), wrap(copy.deepcopy(plain))
    GradientSketcher(sketched, SPEC)(*pad(samples()))
    first, second = gradients_of(fresh), gradients_of(sketched)
    assert len(first) == len(list(plain.parameters()))
    assert all(torch.equal(first[key], second[key]) for key in first)


def gradients_of(model):
    ids, labels, mask = pad(samples())
    model.train()
    model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def test_an_error_inside_a_pass_leaves_the_wrappers_as_they_were(plain):
    model = in_place(blocks(copy.deepcopy(plain), checkpoint_wrapper), [])
    model.model.layers[1].compile(backend=never)
    sketcher = GradientSketcher(model, SPEC)
    before = dict(model.named_modules())

    def fail(module, args):
        raise RuntimeError("stop")

    handle = model.model.layers[1]._checkpoint_wrapped_module.mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        sketcher(*pad(samples()))
    handle.remove()
    assert dict(model.named_modules()) == before
    assert model.model.layers[1]._compiled_call_impl is not None


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm of old": nn.utils.weight_norm,
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_computed_weight_is_sketched_by_the_parameters_it_is_computed_from(name, plain):
    model = copy.deepcopy(plain)
    PARAMETRIZED[name](model.model.layers[0].mlp.up_proj)
    model.eval()
    sketcher = GradientSketcher(model, SPEC)
    assert "model.layers.0.mlp.up_proj.weight" not in sketcher.parameters
    rows = samples()
    own = torch.stack([autograd_sketch(model, sketcher, *row)[0] for row in rows])
    assert torch.allclose(sketcher(*pad(rows)), own.float(), atol=1e-5 * float(own.abs().max()), rtol=0)


def test_a_parametrization_that_changes_nothing_does_not_count_in_a_name(plain, wanted):
    model = one_layer(
        copy.deepcopy(plain), lambda m: parametrize.register_parametrization(m, "weight", nn.Identity())
    )
    sketcher = GradientSketcher(model, SPEC)
    assert set(sketcher.parameters) == set(plain.state_dict())
    z = sketcher(*pad(samples()))
    assert float(torch.cosine_similarity(z.double(), wanted.double()).min()) >= 1 - 1e-6


class OwnWrapper(nn.Module):
    """Hands its arguments on, as many wrappers do that nobody knows."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **kwargs):
        return self.inner(**kwargs)


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def tensor_parallel(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    plan = {"model.layers.0.mlp.up_proj": ColwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (1,)), plan)


def hooked(model):
    wrapped = compiled(model)
    wrapped.register_forward_pre_hook(lambda module, args: None)
    return wrapped


REFUSED = {
    "fsdp1": (fsdp1, "FSDP1.*fully_shard"),
    "fsdp1 of a block": (lambda model: blocks(model, fsdp1, 1), "FSDP1.*fully_shard"),
    "tensor parallel": (tensor_parallel, "tensor parallel.*tp_plan"),
    "hooks of a wrapper": (hooked, "OptimizedModule has forward hooks of its own"),
    "unknown wrapper": (OwnWrapper, r"OwnWrapper, which has no get_input_embeddings.*model\.inner"),
    "dynamically quantised": (
        lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
        "quantised by torch.ao",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_numbers_is_refused_with_the_reason(name, plain):
    wrap, message = REFUSED[name]
    with pytest.raises(GvendiError, match=message):
        GradientSketcher(wrap(copy.deepcopy(plain)), SPEC)


def test_a_reentrant_checkpoint_of_the_models_own_code_is_refused(plain):
    model = checkpoints_of_its_own(copy.deepcopy(plain), use_reentrant=True)
    with pytest.raises(GvendiError, match="switch checkpointing off"):
        GradientSketcher(model, SPEC)(*pad(samples()))


def test_mixed_precision_around_a_call_does_not_change_the_model(plain, wanted):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(GradientSketcher(plain, SPEC)(*pad(samples())), wanted)
        assert torch.is_autocast_enabled("cpu")


peft_missing = "peft is not installed: pip install peft"


def lora(model, **settings):
    peft = pytest.importorskip("peft", reason=peft_missing)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(model, config)


def base_trains(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" not in name and "modules_to_save" not in name)
    return model


@pytest.mark.parametrize("outer", [lambda model: model, compiled, DistributedDataParallel, DataParallel])
def test_the_base_of_a_lora_model_is_sketched_as_the_plain_model(outer, plain, wanted):
    # A fresh adapter adds zero, so that the base's gradient is the plain model's.
    sketcher = GradientSketcher(outer(base_trains(lora(copy.deepcopy(plain)))), SPEC)
    assert torch.equal(sketcher(*pad(samples())), wanted)
    assert set(sketcher.parameters) == set(plain.state_dict())


def test_an_adapter_has_the_same_names_in_every_wrapper(plain):
    model = lora(copy.deepcopy(plain))
    own = GradientSketcher(model, SPEC)
    assert all(name.startswith("model.layers.") and "lora_" in name for name in own.parameters)
    inside = GradientSketcher(model.get_base_model(), SPEC)
    assert inside.parameters == own.parameters
    assert torch.equal(inside(*pad(samples())), own(*pad(samples())))


def test_adapters_that_change_what_is_read_are_refused(plain):
    peft = pytest.importorskip("peft", reason=peft_missing)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(GvendiError, match="get_base_model"):
        GradientSketcher(peft.get_peft_model(copy.deepcopy(plain), config), SPEC)
    with pytest.raises(GvendiError, match="activated LoRA"):
        GradientSketcher(lora(copy.deepcopy(plain), alora_invocation_tokens=[5, 6]), SPEC)


def test_what_accelerate_prepares_is_sketched_as_the_plain_model(plain, wanted):
    accelerate = pytest.importorskip(
        "accelerate", reason="accelerate is not installed: pip install accelerate"
    )
    # Trainers of other tests have chosen another precision for this process.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    bf16 = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(copy.deepcopy(plain))
    assert torch.equal(GradientSketcher(bf16, SPEC)(*pad(samples())), wanted)
    placed = accelerate.dispatch_model(copy.deepcopy(plain), {"": "cpu"}, force_hooks=True)
    assert torch.equal(GradientSketcher(placed, SPEC)(*pad(samples())), wanted)
    offloaded = accelerate.cpu_offload(copy.deepcopy(plain), torch.device("cpu"))
    with pytest.raises(GvendiError, match="offloaded by accelerate"):
        GradientSketcher(offloaded, SPEC)


TWO_RANKS = """
import copy, sys
import torch, torch.distributed as dist
from small_models import SPEC, build, pad, samples
import test_wrappers as t
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
plain = build("qwen2_tied")
batch = pad(samples()[rank::2])
wanted = GradientSketcher(plain, SPEC)(*batch)
for name in ("ddp", "fully_shard", "fully_shard without resharding", "fully_shard of compiled checkpoints"):
    fresh, sketched = (t.WRAPPED[name][1](copy.deepcopy(plain)) for _ in range(2))
    sketcher = GradientSketcher(sketched, SPEC)
    assert torch.equal(sketcher(*batch), wanted), name
    if "compiled" not in name:
        first, second = t.gradients_of(fresh), t.gradients_of(sketched)
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert torch.equal(sketcher(*batch), wanted), name
dist.destroy_process_group()
"""


@pytest.mark.soak
def test_each_of_two_ranks_sketches_its_own_batch():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    paths = os.pathsep.join([str(ROOT), str(TESTS), str(TESTS / "sketching")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), port],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)


def test_a_function_that_the_models_own_code_compiled_is_an_error_with_the_remedy():
    model = build("llama_untied")
    own = torch.compile(lambda x: torch.tanh(x) * 2, backend="eager")
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: own(out))
    with pytest.raises(GvendiError, match="set_stance"):
        GradientSketcher(model, SPEC)
    with torch.compiler.set_stance("force_eager"):
        assert torch.isfinite(GradientSketcher(model, SPEC)(*pad(samples()))).all()
