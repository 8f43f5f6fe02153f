"""Adapters of PEFT: which gradients are sketched, exactly, and which families are refused."""

import copy
import importlib.util
import json
import shutil

import pytest
import torch
from small_models import FP32_RELATIVE, SPEC, autograd_sketch, build, pad, samples
from torch import nn

from gvendi_fast import GradientSketcher, GvendiError, load_proxy
from gvendi_fast.analysis.scoring import score
from gvendi_fast.sketching.corpus import Settings
from gvendi_fast.sketching.gradients.names import named_parameters, plain_model

peft = pytest.importorskip("peft", reason="needs peft, which is not installed")

LAYERS = ["q_proj", "down_proj"]
IDS, LABELS, MASK = pad(samples())


def lora(**options):
    return peft.LoraConfig(**{"target_modules": LAYERS, "r": 4, "init_lora_weights": False, **options})


# Every family whose adapters are sketched exactly.
FAMILIES = {
    "LoRA": lambda: lora(),
    "rsLoRA": lambda: lora(use_rslora=True),
    "LoRA with biases": lambda: lora(lora_bias=True),
    "LoRA of head and embedding": lambda: lora(target_modules=[*LAYERS, "lm_head", "embed_tokens"]),
    "modules to save": lambda: lora(modules_to_save=["lm_head", "embed_tokens", "input_layernorm"]),
    "DoRA": lambda: lora(use_dora=True),
    "IA3": lambda: peft.IA3Config(
        target_modules=LAYERS, feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4, init_weights=False),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=LAYERS, r=4, total_step=10, init_lora_weights=False),
    "LoKr": lambda: peft.LoKrConfig(target_modules=LAYERS, r=4, init_weights=False),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


def adapted(config, name="llama_untied"):
    torch.manual_seed(2)
    model = peft.get_peft_model(build(name), config).eval()
    # Vectors of ones hide a wrong formula.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def by_autograd(sketcher, ids, labels):
    """The sketch of one sample from autograd's gradients, by canonical names."""
    model = sketcher.model
    flags = {p: p.requires_grad for p in model.parameters()}

    class Canonical(nn.Module):
        def named_parameters(self):
            return iter(named_parameters(model).items())

        def zero_grad(self):
            model.zero_grad()

        def __call__(self, **inputs):
            return model(**inputs)

    for name, p in named_parameters(model).items():
        p.requires_grad_(name in sketcher.parameters)
    z, _ = autograd_sketch(Canonical(), sketcher, ids, labels)
    for p, flag in flags.items():
        p.requires_grad_(flag)
    return z


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_the_gradients_of_adapters_are_those_of_autograd(config):
    model = adapted(config())
    sketcher = GradientSketcher(model, SPEC)
    wanted = {n for n, p in named_parameters(plain_model(model)).items() if p.requires_grad}
    # AdaLoRA counts its ranks in a parameter that takes no gradient.
    assert set(sketcher.parameters) == wanted
    assert not any("base_model" in name or "base_layer" in name for name in wanted)
    exact = torch.stack([by_autograd(sketcher, *sample) for sample in samples()])
    assert relative(sketcher(IDS, LABELS, MASK), exact) <= FP32_RELATIVE
    alone = torch.cat([sketcher(ids[None], labels[None]) for ids, labels in samples()])
    assert relative(alone, exact) <= FP32_RELATIVE


@pytest.mark.parametrize("name", ["llama_untied", "qwen2_tied"])
def test_the_base_is_sketched_as_the_plain_model_where_the_adapter_adds_nothing(name):
    plain = GradientSketcher(build(name), SPEC)
    model = peft.get_peft_model(build(name), lora(init_lora_weights=True))
    sketcher = GradientSketcher(model, SPEC, parameters="base")
    assert sketcher.parameters == plain.parameters
    assert relative(sketcher(IDS, LABELS, MASK), plain(IDS, LABELS, MASK)) <= FP32_RELATIVE
    with model.disable_adapter():
        assert torch.equal(sketcher(IDS, LABELS, MASK), plain(IDS, LABELS, MASK))


def test_the_base_is_sketched_with_the_adapter_at_work():
    sketcher = GradientSketcher(adapted(lora()), SPEC, parameters="base")
    exact = torch.stack([by_autograd(sketcher, *sample) for sample in samples()])
    assert relative(sketcher(IDS, LABELS, MASK), exact) <= FP32_RELATIVE


def test_adapters_are_meant_where_nothing_requires_a_gradient():
    model = adapted(lora())
    trained = GradientSketcher(model, SPEC)
    z = trained(IDS, LABELS, MASK)
    model.requires_grad_(False)
    for options in ({}, {"parameters": "adapters"}):
        loaded = GradientSketcher(model, SPEC, **options)
        assert loaded.parameters == trained.parameters
        assert torch.equal(loaded(IDS, LABELS, MASK), z)
    with pytest.raises(GvendiError, match=r"parameters is 'lora'; wanted one of trainable, adapters, base"):
        GradientSketcher(model, SPEC, parameters="lora")
    with pytest.raises(GvendiError, match="has none that is active"):
        GradientSketcher(build("llama_untied"), SPEC, parameters="adapters")


def test_of_several_adapters_the_active_one_is_sketched():
    model = adapted(lora())
    model.add_adapter("other", lora(target_modules=["v_proj"]))
    model.requires_grad_(False)
    one = GradientSketcher(model, SPEC).parameters
    assert all(".default" in name for name in one)
    model.set_adapter("other")
    model.requires_grad_(False)
    sketcher = GradientSketcher(model, SPEC)
    assert all("v_proj.lora" in name and ".other." in name for name in sketcher.parameters)
    exact = torch.stack([by_autograd(sketcher, *sample) for sample in samples()])
    assert relative(sketcher(IDS, LABELS, MASK), exact) <= FP32_RELATIVE
    base = GradientSketcher(model, SPEC, parameters="base")
    assert set(base.parameters) == set(GradientSketcher(build("llama_untied"), SPEC).parameters)


def test_adapters_that_take_no_part_are_an_error():
    model = adapted(lora())
    model.merge_adapter()
    with pytest.raises(GvendiError, match=r"q_proj' are merged into its weight.*unmerge_adapter"):
        GradientSketcher(model, SPEC, parameters="adapters")
    assert GradientSketcher(model, SPEC, parameters="base").coverage.share == 1
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(GvendiError, match="are disabled"):
        GradientSketcher(model, SPEC, parameters="adapters")


REFUSED = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "tokens": lambda: lora(trainable_token_indices=[5, 6]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=LAYERS, r=4, init_weights=False),
    "OFT": lambda: peft.OFTConfig(target_modules=LAYERS, oft_block_size=4, init_weights=False),
}
WORDS = {
    "tokens": "trains single rows of the embedding",
    "LoHa": "hides what it does",
    "OFT": "hides what it does",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_no_sketch_follows_is_refused(name):
    model = adapted(REFUSED[name]())
    with pytest.raises(GvendiError, match=WORDS.get(name, "virtual tokens")):
        GradientSketcher(model, SPEC)(IDS, LABELS, MASK)


def test_a_base_weight_that_an_adapter_multiplies_is_an_error():
    """A stand-in of HiRA, whose update is the base's weight times a product, entry by entry."""

    class Multiplying(nn.Module):
        adapter_layer_names, active_adapters, merged, disable_adapters = ("a",), ["default"], False, False

        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer
            self.a = nn.ModuleDict({"default": nn.Linear(layer.in_features, layer.out_features, bias=False)})

        def forward(self, x):
            a = self.a["default"].weight
            return self.base_layer(x) + nn.functional.linear(x, self.base_layer.weight * a.detach())

    model = build("llama_untied")
    layer = model.model.layers[0].mlp
    layer.up_proj = Multiplying(layer.up_proj)
    with pytest.raises(GvendiError, match=r"up_proj.*without running its layer"):
        GradientSketcher(model, SPEC, parameters="base")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of tiny's folder with an adapter: (the adapter's folder, the model)."""
    proxy = load_proxy("tiny", dtype="float32", device="cpu")
    home = tmp_path_factory.mktemp("adapted")
    proxy.model.save_pretrained(home / "base")
    proxy.tokenizer.save_pretrained(home / "base")
    model = peft.get_peft_model(proxy.model, lora())
    model.save_pretrained(home / "adapter")
    rewrite(home / "adapter", base_model_name_or_path=str(home / "base"))
    return home / "adapter", model.eval()


def rewrite(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def copied(folders, to):
    return shutil.copytree(folders[0], to)


def test_a_folder_with_an_adapter_is_a_proxy(folders, tmp_path):
    folder, model = folders
    proxy = load_proxy(folder, dtype="float32", device="cpu")
    base = load_proxy(folder.parent / "base", dtype="float32", device="cpu")
    got = GradientSketcher(proxy.model, SPEC)
    wanted = GradientSketcher(copy.deepcopy(model), SPEC)
    ids = IDS % 61
    assert torch.equal(got(ids, LABELS, MASK), wanted(ids, LABELS, MASK))
    assert proxy.parameters == sum(p.numel() for p in model.parameters())
    assert proxy.revision.startswith("sha256:")
    assert proxy.revision.endswith(f" on {base.identity}")
    assert proxy.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    rows = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(6)]
    of = {
        name: score(rows, proxy=proxy, settings=Settings(spec=SPEC, parameters=name)).gvendi
        for name in ("trainable", "adapters", "base")
    }
    assert of["trainable"] == of["adapters"] != of["base"]


def test_what_a_folder_with_an_adapter_lacks_is_named(folders, tmp_path, monkeypatch):
    def message(**values):
        folder = copied(folders, tmp_path / str(len(list(tmp_path.iterdir()))))
        rewrite(folder, **values)
        with pytest.raises(GvendiError) as error:
            load_proxy(folder, dtype="float32", device="cpu")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "names no model (base_model_name_or_path is None)" in message(base_model_name_or_path=None)
    gone = message(base_model_name_or_path="/nowhere/at/all")
    assert "does not exist" in gone
    assert "base_model_name_or_path" in gone
    # PEFT would load the other half without a word.
    assert "names no layers for" in message(target_modules=["q_proj"])
    assert "lacks weights" in message(target_modules=["v_proj"])
    assert "virtual tokens" in message(peft_type="PROMPT_TUNING", task_type="CAUSAL_LM", num_virtual_tokens=3)
    own = copied(folders, tmp_path / "own")
    rewrite(own, base_model_name_or_path=str(own))
    with pytest.raises(GvendiError, match="names itself as its model"):
        load_proxy(own)
    bare = copied(folders, tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    with pytest.raises(GvendiError, match="adapter without weights"):
        load_proxy(bare)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(GvendiError, match=r"peft is needed: pip install \"gvendi-fast\[adapters\]\""):
        load_proxy(folders[0])
