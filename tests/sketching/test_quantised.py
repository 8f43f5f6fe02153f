"""Quantised weights: the sketch is that of the plain model whose weights are the dequantised ones, or an error."""

import copy
import importlib.util
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import FP32_RELATIVE, SPEC, build, pad, samples
from torch import nn

from gvendi_fast import GradientSketcher, GvendiError, load_proxy
from gvendi_fast.sketching.gradients.layers import GROUPINGS
from gvendi_fast.sketching.gradients.quantised import is_quantised, parameter_count

VOCABULARY = 61
IDS, LABELS, MASK = pad(samples(VOCABULARY))


def needs(*packages):
    # Of a package inside one that is absent nothing can be asked.
    absent = [
        name
        for name in packages
        if importlib.util.find_spec(name.partition(".")[0]) is None or importlib.util.find_spec(name) is None
    ]
    return pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)}, which is not installed")


since_5 = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5,
    reason="transformers 4 makes no matrices of such codes on a CPU, and says so",
)


class Coded(nn.Module):
    """A linear layer with an int8 code, as quantising packages have them; no weight is a parameter."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("code", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def used(self):
        return self.code.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.used(), self.bias)


class NoGradient(Coded):
    def forward(self, x):
        return super().forward(x.detach())


class NotLinear(Coded):
    def forward(self, x):
        return super().forward(x).relu()


class AnothersGradient(Coded):
    def forward(self, x):
        out = super().forward(x)
        return 2 * out - out.detach()


class OfItsOwnScale(nn.Module):
    """No code: the weight is a parameter, and an adapter or a user may train it."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 4, 6
        self.weight = nn.Parameter(torch.ones(6, 4))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))


def with_code(model, kind=Coded):
    """The model with codes in its blocks, and the plain one at the weights that those stand for."""
    plain = copy.deepcopy(model)
    for (_, block), (_, other) in zip(model.named_modules(), list(plain.named_modules()), strict=True):
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear) and child is not model.get_output_embeddings():
                coded = kind(child)
                setattr(block, name, coded)
                with torch.no_grad():
                    getattr(other, name).weight.copy_(coded.used())
    return model, plain


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ["llama_untied", "qwen2_tied", "phi_biased_head"])
def test_a_coded_weight_is_sketched_as_the_plain_one_at_its_values(name):
    coded, plain = with_code(build(name))
    sketcher, wanted = GradientSketcher(coded, SPEC), GradientSketcher(plain, SPEC)
    assert sketcher.parameters == wanted.parameters
    assert sketcher.shapes == wanted.shapes
    assert (sketcher.coverage.sketched, sketcher.coverage.total) == (
        wanted.coverage.sketched,
        wanted.coverage.total,
    )
    assert parameter_count(coded) == sum(p.numel() for p in plain.parameters())
    assert relative(sketcher(IDS, LABELS, MASK), wanted(IDS, LABELS, MASK)) <= FP32_RELATIVE
    ids, labels = samples(VOCABULARY)[1]
    assert relative(sketcher(ids[None], labels[None]), wanted(ids[None], labels[None])) <= FP32_RELATIVE


def test_groups_presets_and_patterns_reach_coded_weights():
    coded, plain = with_code(build("llama_untied"))
    for options in ({"layers": "mlp"}, {"exclude": ["*q_proj*"]}, {"groups": "kind"}):
        sketcher, wanted = GradientSketcher(coded, SPEC, **options), GradientSketcher(plain, SPEC, **options)
        assert sketcher.parameters == wanted.parameters
        got, other = (s.sketch(IDS, LABELS, MASK) for s in (sketcher, wanted))
        assert relative(got.z, other.z) <= FP32_RELATIVE
        if "groups" in options:
            assert options["groups"] in GROUPINGS
            assert relative(got.by_group, other.by_group) <= FP32_RELATIVE


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (NoGradient, "hands no gradient on"),
        (NotLinear, "not linear in its input"),
        (AnothersGradient, "gradient of its input is not that of what it computes"),
    ],
)
def test_a_layer_whose_gradient_is_not_its_own_is_refused_by_name(kind, said):
    coded, _ = with_code(build("llama_untied"), kind)
    with pytest.raises(
        GvendiError, match=rf"'model\.layers\.0\.self_attn\.q_proj' \({kind.__name__} of .*{said}"
    ):
        GradientSketcher(coded, SPEC)
    # A gradient goes through a layer that is left out, too.
    with pytest.raises(GvendiError, match=said):
        GradientSketcher(coded, SPEC, exclude=["model.layers.*"])


def test_what_is_no_code_is_none():
    assert not is_quantised(OfItsOwnScale())
    assert not is_quantised(nn.Linear(3, 4))
    assert not is_quantised(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    assert is_quantised(Coded(nn.Linear(3, 4)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose widths go with every library's blocks, with the tokenizer of tiny."""
    proxy = load_proxy("tiny", dtype="float32", device="cpu")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=proxy.vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=128, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    proxy.tokenizer.save_pretrained(path)
    return path


def sketch(model):
    return GradientSketcher(model, SPEC)(IDS, LABELS, MASK)


def at(folder, weights):
    """The sketches of the plain model of a folder at other weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    model.load_state_dict({**state, **weights})
    return sketch(model)


def dequantised(model):
    """{name: weight as used} of the layers of any library."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            found[f"{name}.weight"] = dequantize_4bit(weight.data, weight.quant_state).float()
        elif hasattr(module, "state") and hasattr(module.state, "SCB"):
            code = module.state.CB if module.state.CB is not None else weight.CB
            scale = module.state.SCB if module.state.SCB is not None else weight.SCB
            found[f"{name}.weight"] = code.float() * scale.float()[:, None] / 127
        elif isinstance(weight, torch.Tensor) and "torchao" in type(weight.data).__module__:
            found[f"{name}.weight"] = weight.dequantize()
    return found


@needs("bitsandbytes", "accelerate")
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, FP32_RELATIVE),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, FP32_RELATIVE),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            FP32_RELATIVE,
        ),
        # Activations are rounded to 8 bits, and the backward pass is half precision.
        ({"load_in_8bit": True}, 0.02),
    ],
    ids=["nf4", "fp4", "double", "8-bit"],
)
def test_bitsandbytes(folder, options, tolerance):
    if "load_in_4bit" in options:
        options = {**options, "bnb_4bit_compute_dtype": torch.float32}
    config = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).eval()
    z, weights = sketch(model), dequantised(model)
    assert len(weights) == 14
    assert relative(z, at(folder, weights)) <= tolerance


@needs("bitsandbytes", "accelerate")
def test_a_weight_that_inference_has_packed_is_refused(folder):
    model = load_proxy(folder, dtype="float32", device="cpu", quantize="4bit").model
    layer = model.model.layers[0].mlp.down_proj
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs weights on CPUs with AVX-512 BF16 alone")
    before = sketch(model)
    assert torch.equal(sketch(model), before)
    assert layer.support_avx512bf16_for_cpu
    with torch.no_grad():
        model(IDS)
    with pytest.raises(GvendiError, match="packs weights anew"):
        GradientSketcher(model, SPEC)


@needs("torchao", "accelerate")
def test_torchao(folder):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    def load(config):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=transformers.TorchAoConfig(config),
            dtype=torch.float32,
            device_map="cpu",
        ).eval()

    model = load(Int8WeightOnlyConfig())
    weights = dequantised(model)
    assert len(weights) >= 14
    assert relative(sketch(model), at(folder, weights)) <= FP32_RELATIVE
    with pytest.raises(GvendiError, match=r"of torchao, quantised.*hands no gradient on"):
        GradientSketcher(load(Int8DynamicActivationInt8WeightConfig()), SPEC)


@needs("optimum.quanto", "accelerate")
@pytest.mark.parametrize("bits", ["int8", "int4", "float8"])
def test_quanto(folder, bits):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.QuantoConfig(weights=bits),
        dtype=torch.float32,
        device_map="cpu",
    ).eval()
    weights = {
        f"{name}.weight": module.weight.dequantize()
        for name, module in model.named_modules()
        if type(module).__name__ == "QLinear"
    }
    assert len(weights) >= 14
    assert relative(sketch(model), at(folder, weights)) <= FP32_RELATIVE


@since_5
@needs("compressed_tensors", "accelerate")
@pytest.mark.parametrize(
    ("bits", "form"), [(4, "pack-quantized"), (8, "int-quantized")], ids=["packed int4", "int8"]
)
def test_compressed_tensors_become_matrices(folder, tmp_path, bits, form):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    args = QuantizationArgs(num_bits=bits, type="int", strategy="channel", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    config = QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format=form, quantization_status="frozen"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    apply_quantization_config(model, config)
    used = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "weight_scale"):
                scale = module.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
                module.weight_scale.copy_(scale)
                used[f"{name}.weight"] = fake_quantize(module.weight, module.weight_scale, None, args).clone()
    assert len(used) == 14
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    copied = shutil.copytree(folder, tmp_path / "compressed")
    (copied / "model.safetensors").unlink()
    model.save_pretrained(copied)
    compressor.update_config(str(copied))
    proxy = load_proxy(copied, dtype="float32", device="cpu")
    assert proxy.weights == f"compressed-tensors {form}"
    assert relative(sketch(proxy.model), at(folder, used)) <= FP32_RELATIVE


@needs("bitsandbytes", "accelerate", "peft")
def test_adapters_on_coded_weights(folder):
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)
    coded = load_proxy(folder, dtype="float32", device="cpu", quantize="4bit").model
    weights = dequantised(coded)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain.load_state_dict({**plain.state_dict(), **weights})
    torch.manual_seed(0)
    adapted = peft.get_peft_model(coded, config).eval()
    other = peft.get_peft_model(plain.eval(), config).eval()
    other.load_state_dict({n: p for n, p in adapted.state_dict().items() if "lora" in n}, strict=False)
    for parameters in ("trainable", "adapters", "base"):
        sketcher, wanted = (GradientSketcher(m, SPEC, parameters=parameters) for m in (adapted, other))
        assert sketcher.parameters == wanted.parameters
        assert relative(sketcher(IDS, LABELS, MASK), wanted(IDS, LABELS, MASK)) <= FP32_RELATIVE


@needs("bitsandbytes", "accelerate")
def test_a_proxy_is_coded_while_it_is_loaded_and_read_as_it_was_saved(folder, tmp_path):
    proxy = load_proxy(folder, dtype="float32", device="cpu", quantize="4bit")
    assert proxy.weights == "bitsandbytes 4-bit nf4"
    assert proxy.parameters == load_proxy(folder, dtype="float32", device="cpu").parameters
    wanted = at(folder, dequantised(proxy.model))
    assert relative(sketch(proxy.model), wanted) <= FP32_RELATIVE
    proxy.model.save_pretrained(tmp_path)
    proxy.tokenizer.save_pretrained(tmp_path)
    again = load_proxy(tmp_path, dtype="float32", device="cpu")
    assert again.weights == proxy.weights
    assert relative(sketch(again.model), wanted) <= FP32_RELATIVE
    with pytest.raises(GvendiError, match="quantised already"):
        load_proxy(tmp_path, dtype="float32", device="cpu", quantize="8bit")


@needs("bitsandbytes", "accelerate")
def test_a_config_that_says_coded_over_plain_weights_is_an_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(GvendiError, match=r"are not coded.*--quantize 4bit"):
        load_proxy(tmp_path / "plain", dtype="float32", device="cpu")


def test_a_word_or_an_absent_package_is_named(folder, monkeypatch):
    with pytest.raises(GvendiError, match="quantize is '3bit'; wanted one of 4bit, 8bit"):
        load_proxy(folder, quantize="3bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        GvendiError, match=r"quantize='4bit' needs bitsandbytes and accelerate: .*\[quantised\]"
    ):
        load_proxy(folder, quantize="4bit")


@since_5
@needs("accelerate")
def test_fp8_becomes_matrices(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "fp8")
    stored, used = {}, {}
    for name, weight in load_file(copied / "model.safetensors").items():
        stored[name] = used[name] = weight
        if "proj" in name:
            scale = weight.abs().max().reshape(1, 1) / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"], used[name] = scale, stored[name].float() * scale
    save_file(stored, copied / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    (copied / "config.json").write_text(json.dumps(config))
    proxy = load_proxy(copied, dtype="float32", device="cpu")
    assert proxy.weights == "fp8"
    assert relative(sketch(proxy.model), at(folder, used)) <= FP32_RELATIVE
