"""The sketch as the gradient of a probe: one graph for all blocks, inputs shared, layers as they are, samples apart."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from hangs import HANG_S
from small_models import CONFIGS, SPEC, autograd_sketch, build, pad, samples

from gvendi_fast.base.engine import LocalEngine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings, sketch_corpus, sketcher_there
from gvendi_fast.sketching.gradients.compiled import (
    LEAST_TOKENS,
    CompileError,
    choose_compile,
    find_blocks,
    why_no_compiler,
)
from gvendi_fast.sketching.gradients.probe import ProbedModel, find_groups
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.gradients.taps import NORM, find_taps
from gvendi_fast.sketching.proxy.attention import never_packed
from gvendi_fast.sketching.proxy.load import load_proxy

# One summation order against another in float32.
SAME = 1e-6


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def one_layer(name: str) -> torch.nn.Module:
    """A model of one layer, which compiles in a fraction of the time."""
    config_class, values = CONFIGS[name]
    layers = {"n_layer": 1} if "n_layer" in values else {"num_hidden_layers": 1}
    torch.manual_seed(1)
    config = getattr(transformers, config_class)(**{**values, **layers, "bos_token_id": 1, "eos_token_id": 2})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def graphs(monkeypatch, request):
    """torch.compile with the graph's own operators, counting graphs; the caches of compilers empty before and after.

    The backend "eager" takes a third of the time of "aot_eager", which traces the backward pass too.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, plain = CompileCounterWithBackend(getattr(request, "param", "eager")), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda run, **options: plain(run, backend=counter, **options))
    yield counter
    torch._dynamo.reset()


def test_a_compiler_at_work_in_one_thread_is_none_in_another(graphs, monkeypatch):
    """torch's own flag for it is the process's: read in another thread, it let the half-changed model be run."""
    model, other = one_layer("qwen2_tied"), one_layer("gpt2")
    compiled, eager = GradientSketcher(model, SPEC, compile=True), GradientSketcher(other, SPEC)
    batch = pad(samples()[:2])
    wanted = [GradientSketcher(model, SPEC).sketch(*batch).z, eager.sketch(*batch).z]
    inside, go = threading.Event(), threading.Event()

    def stop(graph, _inputs, **_):
        inside.set()
        assert go.wait(HANG_S)
        return graph.forward

    monkeypatch.setattr(graphs, "backend", stop)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(compiled.sketch, *batch)
        assert inside.wait(HANG_S)
        try:
            with pytest.raises(GvendiError, match="cannot be run while another thread sketches"):
                model(batch[0])
            assert torch.equal(eager.sketch(*batch).z, wanted[1])
        finally:
            go.set()
        assert relative(found.result(HANG_S).z, wanted[0]) <= SAME


@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        *((name, "eager") for name in ("qwen2_tied", "gpt2")),
        pytest.param("llama_untied", "eager", marks=pytest.mark.soak),
        *(
            pytest.param(name, "aot_eager", marks=pytest.mark.soak)
            for name in ("phi_biased_head", "gemma2", "qwen2_tied", "llama_untied", "gpt2")
        ),
    ],
    indirect=["graphs"],
)
def test_blocks_of_a_model_share_one_graph_for_batches_of_every_shape(name, graphs):
    model = build(name)
    eager, compiled = GradientSketcher(model, SPEC), GradientSketcher(model, SPEC, compile=True)
    rows = samples()
    for batch in (rows, rows[:3], rows[2:4]):
        wanted, got = eager.sketch(*pad(batch)), compiled.sketch(*pad(batch))
        assert relative(got.z, wanted.z) <= SAME
        assert torch.allclose(got.loss, wanted.loss, rtol=SAME)
    # A batch that is cut out of a wider one.
    cut = [x[:3, :10] for x in pad(rows)]
    assert relative(compiled.sketch(*cut).z, eager.sketch(*cut).z) <= SAME
    # Dynamo also hands over graphs without nodes.
    (graph,) = (graph.graph for graph in graphs.graphs if len(graph.graph.nodes))
    # One node for a norm, one for each input, one for each linear layer.
    nodes = sum("autograd_function_apply" in str(node.target) for node in graph.nodes)
    taps = find_taps(model).taps
    first, *others = find_blocks(model, taps)
    assert len(others) == 1
    inside = {id(part) for part in first.modules()}
    taps = [tap for tap in taps if id(tap.module) in inside]
    groups = [g for g in find_groups(model, taps, SPEC) if id(g.taps[0].module) in inside]
    assert nodes == sum(tap.kind == NORM for tap in taps) + len(groups) + sum(len(g.taps) for g in groups)
    # Causal without a mask of all pairs of tokens, where PyTorch's attention is used.
    attention = [n for n in graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    assert len(attention) == (model.config._attn_implementation == "sdpa")
    assert all(n.kwargs["attn_mask"] is None and n.kwargs["is_causal"] for n in attention)
    # A sample by itself is no reason to compile again.
    before = graphs.frame_count
    assert relative(compiled.sketch(*pad(rows[:1])).z, eager.sketch(*pad(rows[:1])).z) <= SAME
    assert graphs.frame_count == before
    assert not any("forward" in module.__dict__ for module in model.modules())


def other_eps(model):
    model.transformer.h[1].ln_1.eps = 0.5


def other_width(model):
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(32, 72, bias=False) for _ in range(2))
    mlp.down_proj = torch.nn.Linear(72, 32, bias=False)


def other_parameters(model):
    model.requires_grad_(True)
    model.model.layers[1].self_attn.k_proj.weight.requires_grad_(False)
    model.model.layers[1].input_layernorm.weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt2", other_eps),
        pytest.param("llama_untied", other_width, marks=pytest.mark.soak),
        pytest.param("qwen2_tied", other_parameters, marks=pytest.mark.soak),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_block_that_differs_from_the_others_has_a_graph_of_its_own(name, change, graphs):
    model = build(name)
    change(model)
    wanted = GradientSketcher(model, SPEC).sketch(*pad(samples()))
    assert relative(GradientSketcher(model, SPEC, compile=True).sketch(*pad(samples())).z, wanted.z) <= SAME
    assert sum(len(graph.graph.nodes) > 0 for graph in graphs.graphs) == 2


@pytest.mark.soak
def test_sketchers_of_one_process_do_not_use_up_each_other_s_graphs(graphs):
    batch, limit = pad(samples()), 2
    # Of eight, by default, each of which takes seconds.
    with torch._dynamo.config.patch(recompile_limit=limit):
        for seed in range(limit + 1):
            model = one_layer("opt")
            spec = SketchSpec(dim=64, seed=seed)
            got = GradientSketcher(model, spec, compile=True).sketch(*batch)
            assert relative(got.z, GradientSketcher(model, spec).sketch(*batch).z) <= SAME


@pytest.mark.soak
def test_blocks_that_all_differ_have_a_graph_each(graphs):
    config_class, values = CONFIGS["gpt2"]
    # The scale of attention is another in every block.
    scaled = {**values, "n_layer": 3, "scale_attn_by_inverse_layer_idx": True}
    model = build("gpt2", {"gpt2": (config_class, scaled)})
    wanted = GradientSketcher(model, SPEC).sketch(*pad(samples()))
    with torch._dynamo.config.patch(recompile_limit=2):
        got = GradientSketcher(model, SPEC, compile=True).sketch(*pad(samples()))
    assert relative(got.z, wanted.z) <= SAME
    assert sum(len(graph.graph.nodes) > 0 for graph in graphs.graphs) == 3


def test_a_model_without_a_list_of_blocks_is_not_compiled():
    model = build("llama_untied")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(CompileError, match=r"LlamaForCausalLM has no list of blocks .*--compile off"):
        GradientSketcher(model, SPEC, compile=True)


@pytest.mark.skipif(
    why_no_compiler(torch.device("cpu")) is not None, reason="torch.compile needs a C++ compiler"
)
@pytest.mark.soak
def test_inductor_gives_the_eager_sketch():
    torch._dynamo.reset()
    model = one_layer("qwen2_tied")
    batch = pad(samples())
    got = GradientSketcher(model, SPEC, compile=True).sketch(*batch)
    torch._dynamo.reset()
    wanted = GradientSketcher(model, SPEC).sketch(*batch)
    assert relative(got.z, wanted.z) <= SAME
    assert torch.allclose(got.loss, wanted.loss, rtol=SAME)


def test_a_compiled_sketcher_does_not_run_the_graph_of_another(graphs):
    model, batch = one_layer("opt"), pad(samples())
    GradientSketcher(model, SPEC, exclude=["*norm*"], compile=True).sketch(*batch)
    wanted = GradientSketcher(model, SPEC).sketch(*batch)
    assert relative(GradientSketcher(model, SPEC, compile=True).sketch(*batch).z, wanted.z) <= SAME


@pytest.mark.parametrize("part", ["block", "model"])
def test_blocks_that_others_have_compiled_are_sketched_as_ever(part, graphs):
    model, batch = one_layer("phi_biased_head"), pad(samples())
    wanted = GradientSketcher(model, SPEC).sketch(*batch)
    (model.model.layers[0] if part == "block" else model).compile()
    for sketcher in (GradientSketcher(model, SPEC), GradientSketcher(model, SPEC, compile=True)):
        assert relative(sketcher.sketch(*batch).z, wanted.z) <= SAME


def test_a_pass_that_cannot_be_compiled_says_why_and_what_helps(graphs):
    model = one_layer("qwen2_tied")
    sketcher = GradientSketcher(model, SPEC, compile=True)
    norm = model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda m, a, out: out if bool((out != 0).all()) else None)
    with pytest.raises(CompileError, match=r"cannot be compiled .*--compile off"):
        sketcher.sketch(*pad(samples()))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_layers_that_read_one_input_share_its_transform():
    model = build("qwen2_tied")
    groups = find_groups(model, find_taps(model).taps, SPEC)
    named = [[tap.path.split(".")[-1] for tap in group.taps] for group in groups]
    assert named == 2 * [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ] + [["lm_head"]]
    # What is kept of an input that is wider than K is its transform.
    wide = build("llama_wide")
    kept = {g.path.split(".")[-1]: g.transform for g in find_groups(wide, find_taps(wide).taps, SPEC)}
    assert kept == {"q_proj": False, "o_proj": False, "gate_proj": False, "down_proj": True, "lm_head": False}


@pytest.mark.parametrize("name", ["qwen2_tied", "gpt2", "phi_biased_head"])
def test_training_under_the_probe_has_its_own_gradients_and_every_sample_s_sketch(name):
    model = build(name).requires_grad_(True)
    rows = samples()
    ids, labels, mask = pad(rows)
    # Learned positions are looked up for every sample.
    places = {"position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
    plain = model(input_ids=ids, labels=labels, attention_mask=mask, **places).loss
    plain.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    layout = find_taps(model)
    probed = ProbedModel(model, layout.taps, SPEC)
    probe = torch.zeros(len(rows), SPEC.dim, requires_grad=True)
    starts = torch.arange(len(rows)) * ids.shape[1]
    with probed.attached():
        probed.begin(probe, torch.stack([starts, starts + ids.shape[1]], dim=1), ids)
        loss = model(input_ids=ids, labels=labels, attention_mask=mask, **places).loss
        probed.end()
        loss.backward()
    assert torch.equal(loss, plain)
    assert all(torch.equal(p.grad, wanted[n]) for n, p in model.named_parameters())
    sketcher = GradientSketcher(model, SPEC)
    targets = int((labels[:, 1:] != -100).sum())
    for i, (row_ids, row_labels) in enumerate(rows):
        # The model's loss is the mean over the targets of all samples.
        alone, _ = autograd_sketch(model, sketcher, row_ids, row_labels)
        assert relative(probe.grad[i] * targets, alone) <= 1e-5


def test_an_input_that_is_changed_after_the_layer_read_it_is_refused_by_name():
    model = build("llama_untied")
    layer = model.model.layers[1].mlp

    def forward(x):
        gate = layer.act_fn(layer.gate_proj(x)) * layer.up_proj(x)
        with torch.no_grad():
            x.mul_(2)
        return layer.down_proj(gate)

    layer.forward = forward
    sketcher = GradientSketcher(model, SPEC)
    with pytest.raises(GvendiError, match=r"layers\.1\.mlp\.gate_proj.* changed in place"):
        sketcher(*pad(samples()))
    del layer.forward


def test_a_compiled_pass_refuses_inputs_that_change_in_place(graphs):
    model = one_layer("llama_untied")
    layer, batch = model.model.layers[0].mlp, pad(samples())

    def forward(x):
        y = x * 1
        gate = layer.gate_proj(y)
        y.mul_(2)
        return layer.down_proj(layer.act_fn(gate) * layer.up_proj(y))

    layer.forward = forward
    with pytest.raises(GvendiError, match=r"mlp\.gate_proj.* changed in place"):
        GradientSketcher(model, SPEC, compile=True).sketch(*batch)
    assert not graphs.graphs
    # Of an input wider than K the transform is kept, so a change is no loss; layers that the trial of one sample saw
    # share it are told apart by the eager pass alone.
    layer.gate_proj, layer.up_proj = (torch.nn.Linear(96, 80, bias=False) for _ in range(2))

    def changes_larger_batches(x):
        y = torch.cat([x, x, x], dim=-1)
        gate = layer.gate_proj(y)
        if len(y) > 1:
            y.mul_(2)
        return layer.down_proj(layer.act_fn(gate) * layer.up_proj(y))

    layer.forward, narrow = changes_larger_batches, SketchSpec(dim=64)
    assert GradientSketcher(model, narrow)(*batch).isfinite().all()
    with pytest.raises(CompileError, match=r"gate_proj.* before a further layer reads it"):
        GradientSketcher(model, narrow, compile=True).sketch(*batch)
    assert not graphs.graphs


def test_an_output_may_be_changed_in_place():
    model = build("opt")
    for block in model.model.decoder.layers:
        block.activation_fn = torch.nn.ReLU(inplace=True)
    sketcher = GradientSketcher(model, SPEC)
    ids, labels = samples()[0]
    wanted, _ = autograd_sketch(model, sketcher, ids, labels)
    assert relative(sketcher(ids[None], labels[None])[0], wanted) <= 1e-5


@pytest.mark.parametrize("part", ["mlp.up_proj", "input_layernorm", "mlp"])
def test_hooks_of_others_may_change_an_output(part):
    model = build("llama_untied")
    sketcher = GradientSketcher(model, SPEC)
    module = model.model.layers[1].get_submodule(part)
    module.register_forward_hook(lambda module, args, output: output * output.detach().sigmoid())
    ids, labels = samples()[0]
    wanted, _ = autograd_sketch(model, sketcher, ids, labels)
    assert relative(sketcher(ids[None], labels[None])[0], wanted) <= 1e-5


def test_a_layer_that_runs_twice_adds_both_gradients():
    model = build("llama_untied")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(
        mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) + mlp.gate_proj(2 * x)
    )
    sketcher = GradientSketcher(model, SPEC)
    ids, labels = samples()[0]
    wanted, _ = autograd_sketch(model, sketcher, ids, labels)
    assert relative(sketcher(ids[None], labels[None])[0], wanted) <= 1e-5
    del mlp.forward


def wrapped_part(model, where, given):
    """The model with a layer or a norm of its second block called with `given(x)` for x."""
    block = model.model.layers[1]
    part = block.mlp.gate_proj if where == "layer" else block.post_attention_layernorm
    holder, name = (block.mlp, "gate_proj") if where == "layer" else (block, "post_attention_layernorm")
    wrapped = torch.nn.Identity()
    wrapped.inner, wrapped.forward = part, lambda x: part(given(x))[: len(x)]
    setattr(holder, name, wrapped)
    return model


@pytest.mark.parametrize("where", ["layer", "norm"])
def test_samples_that_cannot_be_told_apart_are_refused_by_name(where):
    # A row that is of all samples.
    model = wrapped_part(build("llama_untied"), where, lambda x: torch.cat([x, x.sum(0, keepdim=True)]))
    sketcher = GradientSketcher(model, SPEC)
    with pytest.raises(GvendiError, match=r"saw an input of shape \(6, 23, 32\)"):
        sketcher(*pad(samples()))


@pytest.mark.parametrize("where", ["layer", "norm"])
def test_a_sample_that_comes_twice_is_told_apart(where):
    model = wrapped_part(build("llama_untied"), where, lambda x: torch.cat([x, x[:1]]))
    sketcher = GradientSketcher(model, SPEC)
    for z, (ids, labels) in zip(sketcher(*pad(samples())), samples(), strict=True):
        wanted, _ = autograd_sketch(model, sketcher, ids, labels)
        assert relative(z, wanted) <= 1e-5


class Move(torch.autograd.Function):
    """A tensor's place taken by one on another device, there and back; meta tensors have no values to copy."""

    @staticmethod
    def forward(ctx, x, device):
        ctx.home = x.device
        return torch.zeros(x.shape, dtype=x.dtype, device=device)

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros(gradient.shape, dtype=gradient.dtype, device=ctx.home), None


def test_a_model_on_two_devices_has_its_sketches_on_the_first():
    model = build("llama_untied")
    sketcher = GradientSketcher(model, SPEC)
    # As a device map would: the embedding and a layer here, the rest there.
    for part in (model.model.embed_tokens, model.model.rotary_emb, model.model.layers[0]):
        part.to("meta")

    def bring(module, args, kwargs):
        def moved(x):
            if isinstance(x, tuple):
                return tuple(map(moved, x))
            return Move.apply(x, "cpu") if isinstance(x, torch.Tensor) else x

        return moved(args), {name: moved(x) for name, x in kwargs.items()}

    model.model.layers[1].register_forward_pre_hook(bring, with_kwargs=True)
    got = sketcher.sketch(*pad(samples()))
    assert (got.z.device.type, got.loss.device.type, got.tokens.device.type) == ("meta",) * 3
    assert got.z.shape == (5, SPEC.dim)


def test_batches_are_never_taken_for_packed_ones(monkeypatch):
    from transformers import masking_utils

    looked = []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: looked.append(ids))
    plain = masking_utils.find_packed_sequence_indices
    sketcher = GradientSketcher(build("qwen2_tied"), SPEC)
    looked.clear()
    sketcher(*pad(samples()))
    assert not looked
    assert masking_utils.find_packed_sequence_indices is plain
    with never_packed(), never_packed():
        assert masking_utils.find_packed_sequence_indices(1) is None
        # Another thread's batches may be packed.
        other = threading.Thread(target=lambda: masking_utils.find_packed_sequence_indices(2))
        other.start()
        other.join()
    assert looked == [2]
    assert masking_utils.find_packed_sequence_indices is plain


def test_flash_attention_does_not_read_the_positions_of_a_batch_of_one():
    from transformers import modeling_flash_attention_utils as flash

    plain, positions = flash._is_packed_sequence, torch.arange(5, device="meta")[None]
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(plain(positions, 1))
    with never_packed():
        assert flash._is_packed_sequence(positions, 1) is False
    assert flash._is_packed_sequence is plain


def test_compiling_is_chosen_where_it_pays(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("gvendi_fast.sketching.gradients.compiled.why_no_compiler", lambda device: None)
    assert choose_compile("auto", cpu, 1 << 40)[0] is False
    assert choose_compile("auto", gpu, LEAST_TOKENS - 1)[0] is False
    assert choose_compile("auto", gpu, LEAST_TOKENS)[0] is True
    assert choose_compile("on", cpu, 1)[0] is True
    assert choose_compile("off", gpu, 1 << 40)[0] is False
    with pytest.raises(GvendiError, match="compile='yes' is unknown"):
        choose_compile("yes", cpu, 1)
    monkeypatch.setattr(
        "gvendi_fast.sketching.gradients.compiled.why_no_compiler", lambda device: "no compiler"
    )
    assert choose_compile("auto", gpu, LEAST_TOKENS) == (False, "no compiler")
    with pytest.raises(GvendiError, match="no compiler; leave it out"):
        choose_compile("on", cpu, 1)


class Elsewhere(LocalEngine):
    """A worker to whom everything is pickled, as for another process."""

    name, is_remote = "elsewhere", True

    def work(self, open_worker, items):
        return super().work(pickle.loads(pickle.dumps(open_worker)), items)


def test_compiling_is_chosen_by_the_device_of_the_worker_not_of_the_driver(monkeypatch, corpus, tmp_path):
    seen = []

    def chosen(asked, device, tokens):
        seen.append((asked, device.type))
        return False, ""

    with monkeypatch.context() as patch:
        patch.setattr("gvendi_fast.sketching.corpus.choose_compile", chosen)
        # Workers load theirs anew, on the CPU here.
        driver = replace(load_proxy("tiny", dtype="float32"), device=torch.device("meta"))
        run = sketch_corpus(corpus, tmp_path / "run", driver, Settings(SPEC), engine=Elsewhere())
    assert (run.units_done, seen) == (1, [("auto", "cpu")])

    for name in ("compiled_for", "sketcher_for"):
        monkeypatch.setattr(f"gvendi_fast.sketching.corpus.{name}", lambda model, settings, name=name: name)
    monkeypatch.setattr("gvendi_fast.sketching.gradients.compiled.why_no_compiler", lambda device: None)
    cpu, gpu = (
        SimpleNamespace(parameters=lambda to=to: iter([to])) for to in map(on_device, ("cpu", "cuda"))
    )
    assert sketcher_there(LEAST_TOKENS, gpu, Settings()) == "compiled_for"
    assert sketcher_there(LEAST_TOKENS - 1, gpu, Settings()) == "sketcher_for"
    assert sketcher_there(LEAST_TOKENS, gpu, Settings(compile="off")) == "sketcher_for"
    assert sketcher_there(LEAST_TOKENS, cpu, Settings()) == "sketcher_for"


def on_device(name: str) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(name))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"prompt": "{i} and {i}", "completion": "are {2 * i}"}}\n' for i in range(20)))
    return path


def test_a_run_with_a_compiled_pass_has_the_same_sketches(graphs, corpus, tmp_path):
    proxy, settings = load_proxy("tiny", dtype="float32"), Settings(SPEC, unit_rows=8, compile="off")
    plain = sketch_corpus(corpus, tmp_path / "plain", proxy, settings)
    compiled = sketch_corpus(corpus, tmp_path / "compiled", proxy, replace(settings, compile="on"))
    assert graphs.frame_count > 0
    for wanted, got in zip(plain.iterate(), compiled.iterate(), strict=True):
        assert relative(torch.tensor(got.sketches), torch.tensor(wanted.sketches)) <= SAME


def test_a_pass_that_cannot_be_compiled_ends_the_run_only_if_asked_for(monkeypatch, corpus, tmp_path):
    def refuse(*args, **kwargs):
        raise CompileError("no graph")

    monkeypatch.setattr("gvendi_fast.sketching.gradients.compiled.CompiledBlock.run", refuse)
    monkeypatch.setattr("gvendi_fast.sketching.gradients.compiled.why_no_compiler", lambda device: None)
    proxy = load_proxy("tiny", dtype="float32")
    with pytest.raises(CompileError, match="no graph"):
        sketch_corpus(corpus, tmp_path / "asked", proxy, Settings(SPEC, compile="on"))
    monkeypatch.setattr("gvendi_fast.sketching.corpus.choose_compile", lambda *_: (True, "a long corpus"))
    with pytest.warns(RuntimeWarning, match="no graph; the run goes on without it"):
        run = sketch_corpus(corpus, tmp_path / "auto", proxy, Settings(SPEC))
    assert run.units_done == 1
