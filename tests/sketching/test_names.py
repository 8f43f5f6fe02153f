"""Canonical names, and what a run directory says of the parameters whose gradients it holds."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from damage import strip
from places import ROOT, TESTS
from small_models import SPEC, build, pad, samples
from small_runs import MANIFEST
from small_runs import SPEC as RUN_SPEC
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gvendi_fast.analysis.compare import compare
from gvendi_fast.analysis.layers import choose_layers
from gvendi_fast.base.differences import PARAMETERS, same_spec
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.checking import check_run
from gvendi_fast.data.run_directory import NoDigestWarning, Part, RunDirectory
from gvendi_fast.data.sketched_parameters import SketchedParameters, differing_parameters, read_parameters
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.gradients import names
from gvendi_fast.sketching.gradients.names import canonical_name, named_modules, named_parameters
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.proxy.load import load_proxy

SPELLED = {
    "model.norm.weight": "model.norm.weight",
    "_orig_mod.model.norm.weight": "model.norm.weight",
    "module._orig_mod.model.norm.weight": "model.norm.weight",
    "model.layers.0._checkpoint_wrapped_module._orig_mod.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    "_fsdp_wrapped_module.model.layers.3._fsdp_wrapped_module.norm.bias": "model.layers.3.norm.bias",
    "module.base_model.model.lm_head.base_layer.weight": "lm_head.weight",
    "base_model.model.model.q_proj.lora_A.default.weight": "model.q_proj.lora_A.default.weight",
    "up_proj.parametrizations.weight.original": "up_proj.weight",
    "mlp.up_proj.parametrizations.weight.original": "mlp.up_proj.weight",
    "mlp.up_proj.parametrizations.weight.original0": "mlp.up_proj.parametrizations.weight.original0",
    # Modules may be called so further down.
    "model.module.weight": "model.module.weight",
    "module": "module",
    "_orig_mod.*.mlp.*": "*.mlp.*",
}


@pytest.mark.parametrize("name", SPELLED)
def test_wrappers_do_not_count_in_a_name(name):
    assert canonical_name(name) == SPELLED[name]


class Named(nn.Module):
    """One's own modules, called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.base_layer = nn.ModuleDict({"_orig_mod": nn.Linear(2, 2), "base_model": nn.Linear(2, 2)})
        self.tied = self.module


def test_modules_of_ones_own_keep_their_names():
    model = Named()
    assert list(named_parameters(model)) == [name for name, _ in model.named_parameters()]
    assert [path for path, _ in named_modules(model)] == [path for path, _ in model.named_modules()]


@pytest.mark.parametrize("name", ["qwen2_tied", "gpt2", "opt_projected"])
def test_a_plain_models_names_are_its_own(name):
    model = build(name)
    found, own = named_parameters(model), dict(model.named_parameters())
    assert list(found) == list(own)
    assert all(found[key] is own[key] for key in own)


class Around(nn.Module):
    """A layer around another one, as PEFT's are, that has a weight of its own as well."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.zeros(2))


def test_two_parameters_of_one_name_are_an_error_that_names_both(monkeypatch):
    monkeypatch.setattr(names, "_AROUND", ((__name__, "Around", "inner"),))
    with pytest.raises(
        GvendiError, match=r"'layer\.weight' and 'layer\.inner\.weight' both .* 'layer\.weight'"
    ):
        named_parameters(nn.ModuleDict({"layer": Around()}))


@pytest.fixture(scope="module")
def plain():
    return build("llama_untied")


@pytest.mark.parametrize(
    "pattern",
    [
        "model.layers.0.mlp.*",
        "_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.*",
        "module._orig_mod.model.layers.0.mlp.*",
        "*_checkpoint_wrapped_module.mlp.*",
    ],
)
def test_patterns_match_names_as_wrappers_write_them(plain, pattern):
    wrapped = copy.deepcopy(plain)
    wrapped.model.layers[0] = checkpoint_wrapper(wrapped.model.layers[0])
    wrapped = torch.compile(wrapped, backend="eager")
    wanted = GradientSketcher(plain, SPEC, exclude=["model.layers.0.mlp.*"])
    found = GradientSketcher(wrapped, SPEC, exclude=[pattern])
    assert found.parameters == wanted.parameters
    assert torch.equal(found(*pad(samples())), wanted(*pad(samples())))
    groups = GradientSketcher(wrapped, SPEC, groups={"first": [pattern]}).groups
    assert {name for name, number in groups.of.items() if number == 0} == {
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    }


def test_a_pattern_that_matches_nothing_says_how_names_look(plain):
    with pytest.raises(
        GvendiError, match=r"'\*\.fc1\.\*' matches no .* such as 'model\.embed_tokens\.weight'"
    ):
        GradientSketcher(torch.compile(plain, backend="eager"), SPEC, exclude=["*.fc1.*"])


def renamed(model, block=0, old="up_proj", new="up_projection"):
    """The same model with a parameter under another name, as a later version of a library may have it."""
    model = copy.deepcopy(model)
    mlp = model.model.layers[block].mlp
    mlp._modules = {new if name == old else name: module for name, module in mlp._modules.items()}
    mlp.__dict__[old] = mlp._modules[new]
    return model


def test_a_renamed_parameter_is_another_sketch_and_another_digest(plain):
    old, new = (GradientSketcher(model, SPEC) for model in (plain, renamed(plain)))
    cosines = torch.cosine_similarity(old(*pad(samples())), new(*pad(samples())))
    assert float(cosines.max()) < 0.9995
    digests = {SketchedParameters(sketcher.shapes).digest for sketcher in (old, new)}
    assert len(digests) == 2
    assert SketchedParameters(dict(reversed(old.shapes.items()))).digest in digests


def shapes(**sizes):
    return SketchedParameters({name: tuple(shape) for name, shape in sizes.items()})


def test_differences_pair_old_and_new_names_of_one_shape():
    old = shapes(a=[4, 2], b=[4], c=[3], gone=[7, 7], grown=[2, 2])
    new = shapes(c=[3], z=[4, 2], y=[4], more=[9], grown=[2, 3])
    assert differing_parameters(old, new).split("\n") == [
        "  parameters: 5 in the directory, 5 now; 5 differ",
        "    grown: [2, 2] in the directory, [2, 3] now",
        "    a in the directory is z now, [4, 2]",
        "    b in the directory is y now, [4]",
        "    gone [7, 7] is in the directory alone",
        "    more [9] is now alone",
    ]


def test_differences_name_ten_and_count_the_others():
    old = SketchedParameters({f"block.{i}.w1": (4, 2) for i in range(25)})
    new = SketchedParameters({f"block.{i}.gate": (4, 2) for i in range(25)})
    lines = differing_parameters(old, new).split("\n")
    assert lines[0] == "  parameters: 25 in the directory, 25 now; 25 differ"
    assert lines[1] == "    block.0.w1 in the directory is block.0.gate now, [4, 2]"
    assert lines[11:] == ["    and 15 more"]


# Mixtral with two experts in two lines of transformers: a layer for each matrix, then stacked and fused.
FOURTH = {
    f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight": shape
    for e in range(2)
    for name, shape in (("w1", (80, 32)), ("w2", (32, 80)), ("w3", (80, 32)))
} | {"model.layers.0.block_sparse_moe.gate.weight": (2, 32)}
FIFTH = {
    "model.layers.0.mlp.experts.gate_up_proj": (2, 160, 32),
    "model.layers.0.mlp.experts.down_proj": (2, 32, 80),
    "model.layers.0.mlp.gate.weight": (2, 32),
}
MIXTRAL = """
import sys, transformers
from gvendi_fast.sketching.gradients.names import named_parameters
config = transformers.MixtralConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=80, num_local_experts=2, num_experts_per_tok=1)
model = transformers.MixtralForCausalLM(config)
for name, parameter in named_parameters(model).items():
    if "experts" in name or ".gate." in name:
        print(name, *parameter.shape)
"""


def test_fused_experts_are_shown_as_what_is_in_one_line_of_transformers_alone():
    lines = differing_parameters(SketchedParameters(FOURTH), SketchedParameters(FIFTH)).split("\n")
    assert lines[0] == "  parameters: 7 in the directory, 3 now; 9 differ"
    gate = (
        "model.layers.0.block_sparse_moe.gate.weight in the directory is model.layers.0.mlp.gate.weight now"
    )
    assert lines[1] == f"    {gate}, [2, 32]"
    assert (
        "    model.layers.0.block_sparse_moe.experts.0.w1.weight [80, 32] is in the directory alone" in lines
    )
    assert "    model.layers.0.mlp.experts.gate_up_proj [2, 160, 32] is now alone" in lines


@pytest.mark.soak
@pytest.mark.parametrize("other", [False, True])
def test_the_names_above_are_those_of_both_lines_of_transformers(other):
    # A folder with the other line, as pip install --target makes it.
    folder = os.environ.get("GVENDI_OTHER_TRANSFORMERS", "")
    if other and not folder:
        pytest.skip("GVENDI_OTHER_TRANSFORMERS names no folder with the other line of transformers")
    paths = os.pathsep.join([*([folder] if other else []), str(ROOT), str(TESTS)])
    ran = subprocess.run(
        [sys.executable, "-c", MIXTRAL],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert {name: tuple(map(int, shape)) for name, *shape in rows} in (FOURTH, FIFTH)


def made_run(path, parameters, spec=RUN_SPEC, seed=0):
    spec = {**spec, PARAMETERS: parameters.digest} if parameters else spec
    run = RunDirectory.open(path, spec, MANIFEST, parameters)
    for unit in range(2):
        ones = {name: np.ones(4) for name in ("tokens", "length", "loss", "gradient_norm")}
        rows = np.arange(4) + 4 * unit
        sketches = np.random.default_rng(seed + unit).standard_normal((4, 8)).astype(np.float32)
        run.write_part(Part(unit, list(map(str, rows)), [""] * 4, rows, sketches, **ones))
    run.finish()
    return run


OLD, NEW = shapes(a=[4, 2], b=[4]), shapes(z=[4, 2], b=[4])


def test_a_run_directory_of_other_parameters_is_refused_with_the_pairs(tmp_path):
    made_run(tmp_path / "run", OLD)
    assert json.loads((tmp_path / "run" / "parameters.json").read_text()) == {
        "parameters": [["a", [4, 2]], ["b", [4]]]
    }
    with pytest.raises(
        GvendiError, match=r"(?s)2 now; 1 differ\n    a in the directory is z now, \[4, 2\].*renamed"
    ):
        RunDirectory.open(tmp_path / "run", {**RUN_SPEC, PARAMETERS: NEW.digest}, MANIFEST, NEW)
    # Another order of the same is the same.
    again = SketchedParameters(dict(reversed(OLD.shapes.items())))
    RunDirectory.open(tmp_path / "run", {**RUN_SPEC, PARAMETERS: again.digest}, MANIFEST, again)


def test_two_run_directories_of_other_parameters_are_not_compared(tmp_path):
    runs = {name: made_run(tmp_path / name, p) for name, p in (("one", OLD), ("two", NEW))}
    with pytest.raises(
        GvendiError, match=r"(?s)different settings:\n  parameters: 2 in 'one', 2 in 'two'; 1 differ\n"
    ):
        compare(runs)


def test_a_directory_of_an_earlier_version_goes_on_and_says_so(tmp_path):
    made_run(tmp_path / "old", None)
    before = (tmp_path / "old" / "spec.json").read_bytes()
    run = RunDirectory.open(tmp_path / "old", {**RUN_SPEC, PARAMETERS: OLD.digest}, MANIFEST, OLD)
    assert not run.broken()
    assert "has no digest" in run.no_digest()
    assert (tmp_path / "old" / "spec.json").read_bytes() == before
    assert not (tmp_path / "old" / "parameters.json").exists()
    with pytest.warns(NoDigestWarning, match="has no digest of its parameters' names"):
        RunDirectory.load(tmp_path / "old")
    # Its rows and those of a directory with a digest are still compared.
    new = made_run(tmp_path / "new", OLD)
    assert compare({"old": run, "new": new}).n == 8
    assert not same_spec(new.spec, {**RUN_SPEC, "mask": "released"})


def test_a_lost_or_damaged_list_of_parameters_is_found_and_made_again(tmp_path):
    run = made_run(tmp_path / "run", OLD)
    path = tmp_path / "run" / "parameters.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"a"', b'"c"'))
    with pytest.raises(GvendiError, match=r"its digest is not the one in spec\.json"):
        read_parameters(run.path, run.spec)
    assert [item.path for item in check_run(run.path).findings] == [str(path)]
    path.unlink()
    assert [item.path for item in check_run(run.path).findings] == [str(path)]
    RunDirectory.open(run.path, run.spec, MANIFEST, OLD)
    assert path.read_bytes() == whole
    assert not check_run(run.path).findings


@pytest.fixture(scope="module")
def tiny():
    return load_proxy("tiny", dtype="float32")


@pytest.fixture
def rows(tmp_path):
    lines = [json.dumps({"prompt": f"What is {n}?", "completion": f"{n} it is."}) + "\n" for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return tmp_path / "rows.jsonl"


def test_a_run_is_not_gone_on_with_when_the_proxy_has_other_names(tiny, rows, tmp_path):
    settings = Settings(SketchSpec(64))
    run = sketch_corpus(rows, tmp_path / "run", tiny, settings)
    found = read_parameters(run.path, run.spec)
    assert found.shapes == {name: tuple(p.shape) for name, p in tiny.model.named_parameters()}
    later = copy.copy(tiny)
    object.__setattr__(later, "model", renamed(tiny.model))
    change = r"layers\.0\.mlp\.up_proj\.weight in the directory is model\.layers\.0\.mlp\.up_projection\.weight now"
    with pytest.raises(GvendiError, match=change):
        sketch_corpus(rows, tmp_path / "run", later, settings)
    # In wrappers the names are the same, and so is the run.
    object.__setattr__(later, "model", nn.DataParallel(copy.deepcopy(tiny.model)))
    assert sketch_corpus(rows, tmp_path / "run", later, settings).spec == run.spec
    # One that was begun before there was a digest goes on.
    spec = json.loads((run.path / "spec.json").read_text())
    del spec[PARAMETERS]
    (run.path / "spec.json").write_text(json.dumps(spec))
    (run.path / "parameters.json").unlink()
    for path in run.parts.glob("*.parquet"):
        strip(path)
    assert sketch_corpus(rows, tmp_path / "run", tiny, settings).spec == spec


def test_layers_chosen_afterwards_have_the_digest_of_a_run_of_those_layers(tiny, rows, tmp_path):
    grouped = sketch_corpus(rows, tmp_path / "grouped", tiny, Settings(SketchSpec(64), groups="kind"))
    alone = sketch_corpus(rows, tmp_path / "mlp", tiny, Settings(SketchSpec(64), layers="mlp"))
    assert choose_layers(grouped, "mlp").sketch_spec == alone.sketch_spec
