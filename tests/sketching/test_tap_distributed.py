"""A tap under DDP and fully_shard: each rank's own samples, the same training to the bit, nothing more sent."""

import copy
import sys
import traceback
import warnings
from contextlib import contextmanager, nullcontext
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from children import children
from exactness import off
from small_models import CONFIGS, SPEC, build, pad
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gvendi_fast import GradientSketcher, GvendiError
from gvendi_fast.sketching.gradients.training_tap import CompiledWarning

STEPS = 20
# Of the weights' own number format, for what is compared with the plain model in float32.
EXACT, BF16 = 1e-5, 1e-3


def batch(step, rank):
    """Three samples, another batch for every step and rank."""
    generator = torch.Generator().manual_seed(2 * step + rank)
    rows = []
    for length, prompt in ((9, 2), (14, 5), (6, 1)):
        ids = torch.randint(3, 61, (length,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        rows.append((ids, labels))
    ids, labels, mask = pad(rows)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def ddp(**settings):
    return lambda model: DistributedDataParallel(model, **settings)


def sharded(apart=(), **settings):
    """apart: names of modules that are sharded by themselves, beside the blocks and the root."""

    def wrap(model):
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        for module in (*blocks, *map(model.get_submodule, apart)):
            fully_shard(module, **settings)
        return fully_shard(model, **settings)

    return wrap


def after(change, wrap):
    """wrap(change(model)), where change may also change the model in place."""
    return lambda model: wrap(change(model) or model)


def gradient_checkpoints(use_reentrant):
    return lambda model: model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


def wrapped_blocks(model, wrap):
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = wrap(block)


def checkpoint_wrappers(kind):
    return lambda model: wrapped_blocks(model, lambda m: checkpoint_wrapper(m, checkpoint_impl=kind))


def compiled_blocks(model):
    wrapped_blocks(model, lambda block: torch.compile(block, backend="eager"))


@contextmanager
def unsynced_shards(model):
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


# {name: (what makes it of the plain model, 1 - cosine allowed, around all micro-batches of a step but the last)}.
WAYS = {
    "ddp": (ddp(), EXACT, None),
    "fully_shard": (sharded(), EXACT, None),
    "ddp, unused parameters": (ddp(find_unused_parameters=True), EXACT, None),
    "ddp, static graph": (ddp(static_graph=True), EXACT, None),
    "ddp, views of buckets": (ddp(gradient_as_bucket_view=True), EXACT, None),
    "ddp, accumulated": (ddp(), EXACT, lambda model: model.no_sync()),
    "ddp, checkpoints": (after(gradient_checkpoints(False), ddp()), EXACT, None),
    "ddp, re-entrant checkpoints": (after(gradient_checkpoints(True), ddp()), EXACT, None),
    "ddp, compiled blocks": (after(compiled_blocks, ddp()), EXACT, None),
    "fully_shard, kept whole": (sharded(reshard_after_forward=False), EXACT, None),
    "fully_shard, bf16": (sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), BF16, None),
    "fully_shard, head and embedding": (
        sharded(apart=("lm_head", "model.norm", "model.embed_tokens")),
        EXACT,
        None,
    ),
    "fully_shard, accumulated": (sharded(), EXACT, unsynced_shards),
    "fully_shard, checkpoints": (after(gradient_checkpoints(False), sharded()), EXACT, None),
    "fully_shard, re-entrant checkpoints": (after(gradient_checkpoints(True), sharded()), EXACT, None),
    "fully_shard, checkpoint wrappers": (
        after(checkpoint_wrappers(CheckpointImpl.NO_REENTRANT), sharded()),
        EXACT,
        None,
    ),
    "fully_shard, re-entrant checkpoint wrappers": (
        after(checkpoint_wrappers(CheckpointImpl.REENTRANT), sharded()),
        EXACT,
        None,
    ),
    "fully_shard, compiled blocks": (after(compiled_blocks, sharded()), EXACT, None),
}
DAILY = ["ddp", "fully_shard"]
NAMES = ["qwen3", "gemma3", "gemma2", "gpt2", "phi_biased_head", "llama_wide"]
# (way, model) of a soak.
RUNS = [(way, "llama_untied") for way in WAYS if way not in DAILY]
RUNS += [(way, name) for way in DAILY for name in NAMES]
GPT2 = {**CONFIGS["gpt2"][1], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {**CONFIGS, "gpt2": ("GPT2Config", GPT2)}


def whole(tensor):
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def train(model, rank, around, tap=None):
    """20 steps, every other one under the tap: the sketches of the first one, and what the steps after it sent."""
    optimizer, first = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), None
    for step in range(STEPS):
        is_tapped = tap is not None and step % 2 == 0
        with tap if is_tapped else nullcontext():
            if around is not None:
                with around(model):
                    model(**batch(STEPS + step, rank), use_cache=False).loss.backward()
            model(**batch(step, rank), use_cache=False).loss.backward()
            if is_tapped:
                z = tap.take().z
                first = z if first is None else first
        optimizer.step()
        optimizer.zero_grad()
    return first


def sent(model, rank, tap):
    """{(name, shapes): how often} of the collectives of one step, with the tap or without."""
    with torch.profiler.profile(record_shapes=True) as profile, tap or nullcontext():
        model(**batch(0, rank), use_cache=False).loss.backward()
    events = profile.key_averages(group_by_input_shape=True)
    return {(e.key, str(e.input_shapes)): e.count for e in events if "c10d" in e.key or "gloo" in e.key}


def compare(way, name, rank):
    """What a rank found of one way of training one model."""
    wrap, _, around = WAYS[way]
    plain = build(name, MODELS).train()
    own = batch(0, rank)
    wanted = sketches_of(plain, own)
    if around is not None:
        wanted = torch.cat([sketches_of(plain, batch(STEPS, rank)), wanted])
    without = wrap(copy.deepcopy(plain))
    train(without, rank, around)
    weights = [whole(p).clone() for p in without.parameters()]
    found = {"off": {}, "same": {}, "sent": (0, 0)}
    # The sketcher of the model before it is wrapped, of it afterwards, or of another model of its kind.
    for made in ("before", "after", "of another"):
        model = copy.deepcopy(plain)
        sketcher = (
            GradientSketcher(plain if made == "of another" else model, SPEC) if made != "after" else None
        )
        model = wrap(model)
        tap = (sketcher or GradientSketcher(model, SPEC)).tap(model)
        z = train(model, rank, around, tap)
        found["off"][made] = off(z, wanted)
        found["same"][made] = all(map(torch.equal, weights, map(whole, model.parameters())))
        if way in DAILY and made == "before":
            found["sent"] = sent(model, rank, None), sent(model, rank, tap)
        if way in DAILY:
            # The trained weights by themselves, in the plain model.
            trained = copy.deepcopy(plain)
            for p, value in zip(trained.parameters(), weights, strict=True):
                p.data.copy_(value)
            with tap:
                model(**own).loss.backward()
                found["off"][f"{made}, trained"] = off(tap.take().z, sketches_of(trained, own))
            break
    return found


def sketches_of(model, given):
    return GradientSketcher(model, SPEC)(given["input_ids"], given["labels"], given["attention_mask"])


def run_rank(rank, folder, runs):
    """One of two processes; what it found, or the error, is in folder/rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        found = {run: compare(*run, rank) for run in runs}
        dist.destroy_process_group()
    except BaseException:
        found = traceback.format_exc()
    torch.save(found, folder / str(rank))


def on_two_ranks(folder, runs):
    """What each rank found, {(way, model): what `compare` gave}."""
    ranks = [children().Process(target=run_rank, args=(rank, folder, runs)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    found = [torch.load(folder / str(rank), weights_only=False) for rank in range(2)]
    assert not any(isinstance(one, str) for one in found), "\n".join(map(str, found))
    return found


def check(run, found):
    for one in found:
        assert max(one[run]["off"].values()) < WAYS[run[0]][1]
        assert all(one[run]["same"].values())


def test_two_ranks_have_their_own_samples_and_send_nothing_more(tmp_path):
    runs = [(way, "qwen2_tied") for way in DAILY]
    found = on_two_ranks(tmp_path, runs)
    for run in runs:
        check(run, found)
        for one in found:
            without, under = one[run]["sent"]
            assert under == without != {}


@pytest.fixture(scope="module")
def every_run(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), RUNS)


@pytest.mark.soak
@pytest.mark.parametrize(("way", "name"), RUNS)
def test_every_way_of_two_ranks(every_run, way, name):
    check((way, name), every_run)


@pytest.fixture(scope="module")
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def flat(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def flat_block(model):
    model.model.layers[1] = flat(model.model.layers[1])
    return model


def tensor_parallel(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    plan = {"model.layers.0.mlp.up_proj": ColwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (1,)), plan)


def split_by_transformers(model):
    """As its tp_plan leaves a layer: with a forward of its own."""

    def forward(*args, **kwargs):
        raise AssertionError("a refused model was run")

    forward.__module__ = "transformers.distributed.tensor_parallel"
    model.model.layers[1].self_attn.q_proj.forward = forward
    return model


def partitioned(model):
    """As DeepSpeed's ZeRO stage 3 marks a weight."""
    model.model.layers[0].mlp.up_proj.weight.ds_id = 1
    return model


REFUSED = {
    "fsdp1": (flat, "FSDP1.*fully_shard"),
    "fsdp1 of a block": (flat_block, "FSDP1.*fully_shard"),
    "tensor parallel": (tensor_parallel, r"'model\.layers\.0\.mlp\.up_proj' of the model is split.*tp_plan"),
    "tp_plan": (
        split_by_transformers,
        r"'model\.layers\.1\.self_attn\.q_proj' of the model is split.*tp_plan",
    ),
    "zero stage 3": (partitioned, "ZeRO stage 3.*fully_shard"),
    "data parallel": (nn.DataParallel, "DataParallel, whose threads.*DistributedDataParallel"),
}


@pytest.fixture(scope="module")
def plain():
    model = build("llama_untied")
    return model, GradientSketcher(model, SPEC)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*FSDP.*")
def test_what_splits_layers_is_refused(name, plain, one_rank):
    model, sketcher = plain
    wrap, message = REFUSED[name]
    with pytest.raises(GvendiError, match=message):
        sketcher.tap(wrap(copy.deepcopy(model)))


def test_what_splits_layers_after_the_tap_was_made_is_refused(plain, one_rank):
    model, sketcher = copy.deepcopy(plain[0]), plain[1]
    tap = sketcher.tap(model)
    tensor_parallel(model)
    with pytest.raises(GvendiError, match=r"up_proj' of the model is split"):
        tap.attach()
    assert not tap.is_attached


def test_the_engine_of_deepspeed_is_a_wrapper(plain, monkeypatch):
    class DeepSpeedEngine(nn.Module):
        """Hands its arguments on, and what it does not have itself is the model's."""

        def __init__(self, module):
            super().__init__()
            self.module = module

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("module"), name)

        def forward(self, **kwargs):
            return self.module(**kwargs)

    file = ModuleType("deepspeed.runtime.engine")
    file.DeepSpeedEngine = DeepSpeedEngine
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.engine", file)
    model, sketcher = plain
    engine, given = DeepSpeedEngine(copy.deepcopy(model)), batch(0, 0)
    with sketcher.tap(engine) as tap:
        engine(**given).loss.backward()
        assert off(tap.take().z, sketches_of(model, given)) < EXACT
    assert GradientSketcher(engine, SPEC).parameters == sketcher.parameters


def test_hooks_of_a_wrapper_stay_at_work(plain, one_rank):
    model, sketcher = plain
    seen, given = [], batch(0, 0)
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    wrapped.register_forward_hook(lambda module, args, output: seen.append(1))
    with sketcher.tap(wrapped) as tap:
        wrapped(**given).loss.backward()
        assert off(tap.take().z, sketches_of(model, given)) < EXACT
    assert seen == [1]


def test_a_model_that_is_sharded_while_it_is_tapped_is_the_same(plain, one_rank):
    model, given = copy.deepcopy(plain[0]), batch(0, 0)
    tap = plain[1].tap(model)
    sharded()(model)
    with tap, warnings.catch_warnings():
        warnings.simplefilter("error", CompiledWarning)
        model(**given).loss.backward()
        assert off(tap.take().z, sketches_of(plain[0], given)) < EXACT


def on_meta(model):
    with torch.device("meta"):
        return type(model)(model.config)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("qwen3", "gpt2") else pytest.mark.soak) for name in CONFIGS],
)
def test_a_model_without_values_serves_to_tap_another_of_its_kind(name):
    model, empty, given = build(name), on_meta(build(name)), batch(0, 0)
    sketcher, own = GradientSketcher(empty, SPEC), GradientSketcher(model, SPEC)
    assert (sketcher.parameters, sketcher.shapes, sketcher.coverage) == (
        own.parameters,
        own.shapes,
        own.coverage,
    )
    assert all(x.is_meta for x in (*empty.parameters(), *empty.buffers()))
    wanted = sketches_of(model, given)
    with sketcher.tap(model) as tap:
        model(**given).loss.backward()
        assert off(tap.take().z, wanted) < EXACT
    with pytest.raises(GvendiError, match=r"meta device.*sketcher\.tap"):
        sketcher(given["input_ids"], given["labels"])


def test_a_model_is_sharded_and_filled_after_its_sketcher_was_made(plain, one_rank):
    model, given = on_meta(plain[0]), batch(0, 0)
    sketcher = GradientSketcher(model, SPEC)
    sharded()(model)
    late = GradientSketcher(model, SPEC)
    model.to_empty(device="cpu")
    for own, value in zip(model.parameters(), plain[0].parameters(), strict=True):
        own.data.to_local().copy_(value.data)
    for own, value in zip(model.buffers(), plain[0].buffers(), strict=True):
        own.copy_(value)
    wanted = sketches_of(plain[0], given)
    for made in (sketcher, late):
        with made.tap(model) as tap:
            model(**given).loss.backward()
            assert off(tap.take().z, wanted) < EXACT
        assert torch.allclose(sketches_of(model, given), wanted)
