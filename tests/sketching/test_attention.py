"""The choice of attention: what is taken, what is refused and why; all choices differ in rounding only."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.proxy import attention as room
from gvendi_fast.sketching.proxy.attention import FLASH, resolve_attention, why_no_flash
from gvendi_fast.sketching.proxy.load import load_proxy

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HALF = torch.bfloat16
QWEN, GEMMA = transformers.Qwen2Config(), transformers.Gemma2Config()


class Unknown(transformers.PretrainedConfig):
    """A config whose model transformers does not bring."""


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0 with flash-attn 2.8.3, as far as the choice looks; its parts can be changed."""
    found = SimpleNamespace(capability=(9, 0), installed=True, usable=True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found.capability)
    plain = room.metadata.distributions

    def distributions(name=None):
        if name != "flash-attn":
            return plain() if name is None else plain(name=name)
        return iter([SimpleNamespace(version="2.8.3")] if found.installed else [])

    monkeypatch.setattr(room.metadata, "distributions", distributions)
    monkeypatch.setattr(room.metadata, "version", lambda name: "2.8.3")
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: found.usable)
    return found


def test_flash_attn_is_taken_where_it_can_be_used(gpu):
    assert resolve_attention(None, GPU, HALF, QWEN) == (FLASH, "flash-attn 2.8.3 is installed")
    assert resolve_attention(None, GPU, HALF)[0] == FLASH
    assert resolve_attention(None, GPU, HALF, GEMMA)[0] == FLASH
    assert resolve_attention(FLASH, GPU, HALF, QWEN) == (FLASH, "requested")
    assert resolve_attention("sdpa", GPU, HALF, QWEN) == ("sdpa", "requested")


@pytest.mark.parametrize(
    ("change", "device", "dtype", "config", "reason"),
    [
        ({}, CPU, HALF, QWEN, "needs a CUDA device, but this one is cpu"),
        ({}, GPU, torch.float32, QWEN, "takes bfloat16, not float32"),
        ({"capability": (7, 5)}, GPU, HALF, QWEN, "compute capability 8.0"),
        ({"installed": False}, GPU, HALF, QWEN, "flash-attn is not installed"),
        ({"usable": False}, GPU, HALF, QWEN, "transformers cannot use the flash-attn 2.8.3"),
        ({}, GPU, HALF, Unknown(), "the model does not support flash-attn"),
    ],
)
def test_otherwise_sdpa_and_the_reason(gpu, change, device, dtype, config, reason):
    vars(gpu).update(change)
    assert reason in why_no_flash(device, dtype, config)
    name, why = resolve_attention(None, device, dtype, config)
    assert name == "sdpa"
    assert reason in why
    with pytest.raises(GvendiError, match=f"{FLASH}.*cannot be used.*{reason}.*--attention auto.*'sdpa'"):
        resolve_attention(FLASH, device, dtype, config)


def test_a_cap_on_attention_scores_is_not_left_out(gpu):
    gpu.installed = False
    name, why = resolve_attention(None, GPU, HALF, GEMMA)
    assert name == "eager"
    assert "caps attention scores" in why
    with pytest.raises(GvendiError, match=r"leaves out the cap.*'eager'"):
        resolve_attention("sdpa", GPU, HALF, GEMMA)
    with pytest.raises(GvendiError, match="or give 'eager'"):
        resolve_attention(FLASH, GPU, HALF, GEMMA)


def test_unknown_names_are_refused():
    with pytest.raises(GvendiError, match="attention='flash' is unknown; give one of 'sdpa', 'eager'"):
        load_proxy("tiny", attention="flash")


def test_the_proxy_says_what_it_runs():
    plain, eager = load_proxy("tiny", device="cpu"), load_proxy("tiny", device="cpu", attention="eager")
    assert plain.attention == plain.model.config._attn_implementation == "sdpa"
    assert "needs a CUDA device" in plain.attention_reason
    assert (eager.attention, eager.attention_reason) == ("eager", "requested")
    assert eager.model.config._attn_implementation == "eager"


def test_choices_give_the_same_sketches_and_one_spec(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": f"{i}, {i + 2}?", "completion": f"It is {2 * i}." * (1 + i % 3)} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(spec=SketchSpec(dim=256), unit_rows=3)
    runs = [
        sketch_corpus(
            path, tmp_path / name, load_proxy("tiny", dtype="float32", device="cpu", attention=name), settings
        )
        for name in ("sdpa", "eager")
    ]
    assert runs[0].spec == runs[1].spec
    for one, other in zip(*(run.iterate() for run in runs), strict=True):
        cosine = torch.cosine_similarity(torch.tensor(one.sketches), torch.tensor(other.sketches))
        assert cosine.min() > 1 - 1e-6


@pytest.mark.skipif(
    not torch.cuda.is_available() or why_no_flash(GPU, HALF) is not None,
    reason="needs a GPU with flash-attn",
)
def test_flash_attn_gives_the_sketches_of_sdpa():
    ids = torch.randint(3, 2000, (4, 50), generator=torch.Generator().manual_seed(0))
    flash, plain, exact = (
        GradientSketcher(
            load_proxy("tiny", dtype=dtype, device="cuda", attention=name).model, SketchSpec(dim=256)
        )(ids, ids)
        for name, dtype in ((FLASH, "bfloat16"), ("sdpa", "bfloat16"), ("sdpa", "float32"))
    )
    # Both are bfloat16 roundings of one function, so they stand equally far from it.
    lost = 1 - torch.cosine_similarity(plain, exact)
    assert (1 - torch.cosine_similarity(flash, exact) <= 2 * lost + 1e-4).all()
