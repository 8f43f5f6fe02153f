"""Sketches of whole models against autograd over all parameters: mixtures of experts, state spaces, odd parameters.

Each sample by itself, padded on either side, and in batches of two, four and five: docs/families.md has the table of
all families, of which these are what people use, and the kinds of parameters that a sketch must know.
"""

import pytest
import torch
from exactness import EXACT, LEFT, REFUSED, case_errors, judge
from small_models import FP32_RELATIVE, SPEC, pad, samples
from tiny_families import NotBuiltError, families, randomise, tiny_model

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients import small_parameters
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher

NAMED = (
    "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3", "qwen3_next", "qwen3_5_text", "lfm2", "mamba2", "mamba",
    "falcon", "gemma3", "apertus", "bert", "whisper",
)  # fmt: skip
ROWS = samples()[:4]


def built(kind: str) -> torch.nn.Module:
    if kind not in families():
        pytest.skip(f"this version of transformers has no {kind}")
    return tiny_model(kind)


@pytest.mark.parametrize("kind", NAMED)
def test_sketches_of_a_family_are_those_of_its_gradients(kind):
    model = built(kind)
    sketcher = GradientSketcher(model, SPEC)
    errors = case_errors(model, sketcher, ROWS)
    assert max(errors.values()) <= FP32_RELATIVE, errors
    assert LEFT in errors or sketcher._reading.reads_padding
    assert sketcher.coverage.share == 1


@pytest.mark.soak
@pytest.mark.parametrize("kind", families())
def test_no_family_is_sketched_wrong(kind):
    try:
        model = tiny_model(kind)
    except NotBuiltError as error:
        pytest.skip(f"no tiny model: {error}")
    try:
        model(input_ids=ROWS[0][0][None], use_cache=False)
    except Exception as error:
        pytest.skip(f"the model does not run on text alone: {type(error).__name__}: {error}")
    finding = judge(model, SPEC)
    assert finding.status in (EXACT, REFUSED), (finding.detail, finding.errors)


def test_adapters_of_a_model_are_sketched_exactly():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(
        tiny_model("llama"),
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    randomise(model)
    sketcher = GradientSketcher(model.eval(), SPEC)
    errors = case_errors(model, sketcher, ROWS)
    assert max(errors.values()) <= FP32_RELATIVE, errors
    assert all("lora" in name for name in sketcher.parameters)


def test_padding_that_a_model_reads_as_text_is_refused_on_the_left():
    sketcher = GradientSketcher(built("roberta"), SPEC)
    assert sketcher(*pad(ROWS)).shape == (len(ROWS), SPEC.dim)
    with pytest.raises(
        GvendiError, match=r"padding on the left, which RobertaForCausalLM reads .* pad on the right"
    ):
        sketcher(*pad(ROWS, side="left"))


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(GvendiError, match=r"XLMWithLMHeadModel reads text in both directions"):
        GradientSketcher(built("xlm"), SPEC)


def test_gradients_are_formed_for_a_small_share_of_a_model_alone(monkeypatch):
    model = built("mamba2")
    monkeypatch.setattr(small_parameters, "SMALL_COUNT", 100)
    with pytest.raises(
        GvendiError, match=r"of the model's [\d,]+ numbers .* 1% at most; the largest is .* exclude="
    ):
        GradientSketcher(model, SPEC)
    odd = ["*conv1d*", "*A_log", "*dt_bias", "*.D", "*mixer.norm*"]
    sketcher = GradientSketcher(model, SPEC, exclude=odd)
    assert max(case_errors(model, sketcher, ROWS).values()) <= FP32_RELATIVE
    assert sketcher.coverage.share < 1
