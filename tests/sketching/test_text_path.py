"""What the loss of a text cannot reach is left out by itself, and nothing else is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from exactness import case_errors
from multimodal_models import MULTIMODAL, SEES, WIDE, WITH_EXPERTS, multimodal
from places import PACKAGE
from small_models import FP32_RELATIVE, SPEC, build, samples
from torch import nn

from gvendi_fast import load_proxy
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.gradients.text_path import LeftOut, find_text_path, text_ids
from gvendi_fast.sketching.proxy import load

# Below the tokens that stand for images. A long row and the shortest, which the padding of either side surrounds.
ROWS = samples(55)
FEW = [ROWS[0], ROWS[2]]


def names_without_gradient(model) -> set[str]:
    ids = text_ids(model, 2, 16)
    model(input_ids=ids, use_cache=False).logits.float().square().sum().backward()
    found = {name for name, p in model.named_parameters() if p.grad is None}
    model.zero_grad()
    return found


# Of families that are built alike one is tried every time.
ALIKE = (
    "llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "mistral3", "idefics3", "smolvlm", "internvl",
    "qwen3_vl_moe", "qwen3_omni",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.soak] * (name in ALIKE)) for name in (*MULTIMODAL, *WITH_EXPERTS)],
)
def test_a_checkpoint_that_also_sees_is_sketched_exactly_over_all_that_text_reaches(name):
    model = multimodal(name)
    sketcher = GradientSketcher(model, SPEC)
    out = names_without_gradient(model)
    assert out
    assert set(sketcher.parameters) == {n for n, _ in model.named_parameters()} - out
    # Positions of sounds are a constant, a parameter that requires no gradient.
    sizes = {n: p.numel() * p.requires_grad for n, p in model.named_parameters()}
    coverage = sketcher.coverage
    assert coverage.sketched == coverage.total == sum(sizes[n] for n in sketcher.parameters)
    assert sum(part.parameters for part in coverage.left_out) == sum(sizes[n] for n in out)
    errors = case_errors(model, sketcher, FEW)
    assert max(errors.values()) <= FP32_RELATIVE, errors
    # The head's logits live a chunk at a time, with the cap and the scale of the nested configuration. (Transformers 4
    # gives the language models of some of these other hidden states than they make by themselves.)
    assert sketcher._head is not None or transformers.__version__ < "5"


def test_what_is_left_out_is_told_by_the_largest_part_that_text_does_not_reach():
    sketcher = GradientSketcher(multimodal("llava_next"), SPEC)
    tower, projector, newline = sketcher.coverage.left_out
    assert [part.part.removeprefix("model.") for part in (tower, projector, newline)] == [
        "vision_tower",
        "multi_modal_projector",
        "image_newline",
    ]
    assert newline.parameters == 32
    assert sketcher.coverage.as_dict()["left_out"] == {
        p.part: p.parameters for p in sketcher.coverage.left_out
    }
    assert GradientSketcher(build("qwen3"), SPEC).coverage.as_dict().keys() == {"sketched", "total"}


def test_explicitly_excluded_parts_count_as_they_did():
    model = multimodal("llava")
    sketcher = GradientSketcher(model, SPEC, exclude=["*vision_tower*"])
    assert [part.part.split(".")[-1] for part in sketcher.coverage.left_out] == ["multi_modal_projector"]
    tower = sum(p.numel() for n, p in model.named_parameters() if "vision_tower" in n)
    assert sketcher.coverage.total - sketcher.coverage.sketched == tower


def trial(model) -> set[str]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return set(find_text_path(model, dict(model.named_parameters())).names)


class Experts(nn.Module):
    """An MLP of experts, each a module of its own; a token's id chooses one through its hidden state's first sign."""

    def __init__(self, width: int, count: int, chosen: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))
        self.chosen = chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.gate(x).softmax(dim=-1)[..., self.chosen : self.chosen + 1]
        return weight * self.experts[self.chosen](x)


def test_an_expert_that_no_token_of_the_trial_chose_is_reached_and_a_block_that_never_runs_is_not():
    model = build("llama_untied")
    blocks = model.model.layers
    for block in blocks:
        block.mlp = Experts(32, 6, chosen=2)
    further = build("llama_untied").model.layers[0]
    # A head that predicts further ahead, behind the blocks that run (transformers' own forward cuts the list).
    blocks.append(further)
    model.mtp = nn.ModuleList([build("llama_untied").model.layers[0]])
    out = trial(model)
    assert out == {f"model.layers.2.{n}" for n, _ in further.named_parameters()} | {
        f"mtp.0.{n}" for n, _ in model.mtp[0].named_parameters()
    }
    sketcher = GradientSketcher(model, SPEC)
    assert "model.layers.1.mlp.experts.5.weight" in sketcher.parameters
    size = sum(p.numel() for p in further.parameters())
    # The same sizes: the paths are in the model's order.
    assert set(sketcher.coverage.left_out) == {LeftOut("model.layers.*", size), LeftOut("mtp", size)}
    # The experts that others choose later are sketched: not one token of the trial chose this one.
    for block in blocks:
        if isinstance(block.mlp, Experts):
            block.mlp.chosen = 5
    ids, labels = ROWS[0]
    model.zero_grad()
    got = sketcher(ids[None], labels[None])[0].double()
    without = GradientSketcher(model, SPEC, exclude=["*experts.5.*"])(ids[None], labels[None])[0].double()
    assert (got - without).norm() > 1e-3 * got.norm()


def test_unlike_neighbours_numbered_or_not_are_no_experts():
    model = build("llama_untied")
    mlp = model.model.layers[0].mlp
    mlp.spare_proj = nn.Linear(32, 80, bias=False)
    mlp.extra = nn.ModuleList([nn.Linear(32, 8), nn.Linear(32, 9)])
    assert trial(model) == {
        "model.layers.0.mlp.spare_proj.weight",
        *(f"model.layers.0.mlp.extra.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")),
    }


def test_a_part_that_a_later_batch_runs_after_all_is_an_error_that_names_it():
    model = build("llama_untied")
    block = model.model.layers[0]
    block.mlp.spare = nn.Linear(32, 32, bias=False)
    sketcher = GradientSketcher(model, SPEC)
    ids, labels = ROWS[0]
    sketcher(ids[None], labels[None])
    block.register_forward_hook(lambda block, args, out: out + block.mlp.spare(out))
    with pytest.raises(GvendiError, match=r"'model\.layers\.0\.mlp\.spare' was left out .* exclude="):
        sketcher(ids[None], labels[None])
    assert torch.isfinite(GradientSketcher(model, SPEC)(ids[None], labels[None])).all()


def test_a_model_that_reads_in_both_directions_is_refused():
    model = build("llama_untied")
    for block in model.model.layers:
        block.register_forward_hook(lambda block, args, out: out + out.mean(dim=1, keepdim=True))
    with pytest.raises(GvendiError, match="reads text in both directions"):
        GradientSketcher(model, SPEC)


def test_a_model_that_needs_more_than_text_is_refused():
    model = build("llama_untied")

    def needs(module, args, kwargs):
        raise ValueError("give pixel_values")

    model.register_forward_pre_hook(needs, with_kwargs=True)
    with pytest.raises(GvendiError, match=r"does not read text by itself \(ValueError: give pixel_values\)"):
        GradientSketcher(model, SPEC)


def test_training_parts_that_text_does_not_reach_is_an_error():
    model = multimodal("llava")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" in name)
    with pytest.raises(
        GvendiError, match=r"no text reaches any of the \d+ parameters that require a gradient"
    ):
        GradientSketcher(model, SPEC)


def with_tokenizer(folder: Path) -> Path:
    for file in (PACKAGE / "assets" / "tiny").glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    return folder


def saved(name: str, folder: Path, vocabulary: int | None = None) -> Path:
    model = multimodal(name)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model.save_pretrained(folder)
    return with_tokenizer(folder)


@pytest.mark.parametrize("name", ["gemma3", "llava", "paligemma"])
def test_a_folder_of_a_checkpoint_that_also_sees_loads_as_a_proxy(name, tmp_path):
    proxy = load_proxy(saved(name, tmp_path), dtype="float32", device="cpu")
    assert type(proxy.model) is type(multimodal(name))
    assert (proxy.vocabulary, proxy.attention) == (61, "sdpa")
    tokenizer = load.load_tokenizer(tmp_path)
    assert (tokenizer.vocabulary, tokenizer.positions) == (61, 64)
    ids, labels = ROWS[0]
    got = GradientSketcher(proxy.model, SPEC)(ids[None], labels[None])
    wanted = GradientSketcher(multimodal(name), SPEC)(ids[None], labels[None])
    assert torch.allclose(got, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_llama_4_loads_as_its_language_model_and_keeps_no_tower(tmp_path):
    proxy = load_proxy(saved("llama4", tmp_path), dtype="float32", device="cpu")
    assert not any("vision" in name for name, _ in proxy.model.named_parameters())


def test_score_says_what_is_out_of_a_texts_reach_and_the_run_records_it(gvendi, tmp_path):
    proxy = saved("llava", tmp_path / "proxy", vocabulary=len(load.load_tokenizer("tiny").tokenizer))
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f"{2 * i}."} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    words = ["--dtype", "float32", "--dim", 128, "--out", run]
    code, out, _ = gvendi("score", data, "--proxy", proxy, *words)
    assert code == 0
    reach = "out of its reach: model.vision_tower (11,528), model.multi_modal_projector (1,600)"
    assert f"coverage        100.0 % of the proxy's parameters that a text reaches; {reach}" in out
    coverage = json.loads((run / "spec.json").read_text())["coverage"]
    assert coverage["left_out"] == {"model.vision_tower": 11528, "model.multi_modal_projector": 1600}
    assert coverage["sketched"] == coverage["total"]
    # The run goes on, and a plain model's says no more than it did.
    assert gvendi("score", data, "--proxy", proxy, *words)[0] == 0
    assert f"; {reach}" in gvendi("score", run)[1]


def test_of_a_model_that_also_speaks_the_part_that_reads_is_loaded(tmp_path):
    from safetensors.torch import save_file

    model = multimodal("qwen3_omni")
    module = transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe
    config = module.Qwen3OmniMoeConfig(thinker_config=model.config.to_dict(), enable_audio_output=False)
    config.save_pretrained(tmp_path)
    # As the files on the hub have it, beside a talker.
    weights = {f"thinker.{name}": w.contiguous() for name, w in model.state_dict().items()}
    save_file(weights, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    proxy = load_proxy(with_tokenizer(tmp_path), dtype="float32", device="cpu")
    assert type(proxy.model) is type(model)
    loaded = proxy.model.state_dict()
    assert all(torch.equal(w, loaded[name]) for name, w in model.state_dict().items())


def test_blocks_that_only_an_image_runs_are_left_out(tmp_path):
    text = {**WIDE, "cross_attention_layers": [1]}
    sees = {**SEES, "vision_output_dim": 32, "num_global_layers": 1, "attention_heads": 2}
    config = transformers.MllamaConfig(
        text_config=text, vision_config={**sees, "intermediate_layers_indices": [0]}, image_token_index=60
    )
    torch.manual_seed(1)
    transformers.MllamaForConditionalGeneration(config).save_pretrained(tmp_path)
    model = load_proxy(with_tokenizer(tmp_path), dtype="float32", device="cpu").model
    sketcher = GradientSketcher(model, SPEC)
    (part,) = sketcher.coverage.left_out
    assert part.parameters == sum(p.numel() for p in model.model.layers[1].parameters())
    assert max(case_errors(model, sketcher, FEW).values()) <= FP32_RELATIVE


def test_an_encoder_with_a_decoder_is_refused_by_name(tmp_path):
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**SEES), transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4)
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(GvendiError, match="encodes one text and decodes another"):
        load_proxy(with_tokenizer(tmp_path), dtype="float32", device="cpu")
