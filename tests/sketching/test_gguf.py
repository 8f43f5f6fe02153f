"""A GGUF file as a proxy: the weights that the file has, its tokenizer, and errors for what is no whole model."""

import importlib.util
import re
import shutil

import pytest
import torch
import transformers
from gguf_files import write_gguf
from small_models import SPEC

from gvendi_fast import GradientSketcher, GvendiError, load_proxy, score
from gvendi_fast.sketching.corpus import Settings
from gvendi_fast.sketching.proxy.load import load_tokenizer

pytest.importorskip("gguf", reason="needs gguf, which is not installed")
pytest.importorskip("accelerate", reason="needs accelerate, which is not installed")

TEXT = "The quick brown fox, 123 jumps!\n\n  over the lazy dog's tail."


@pytest.fixture(scope="module")
def plain():
    """A small Llama with the tokenizer of tiny; (model, tokenizer)."""
    proxy = load_proxy("tiny", dtype="float32", device="cpu")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=proxy.vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), proxy.tokenizer


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_a_file_is_the_model_at_the_weights_that_it_has(plain, tmp_path, kind):
    model, tokenizer = plain
    path = tmp_path / "small.gguf"
    weights = write_gguf(path, model, tokenizer, kind)
    proxy = load_proxy(path, dtype="float32", device="cpu")
    assert proxy.weights == f"GGUF {kind}"
    assert proxy.parameters == sum(p.numel() for p in model.parameters())
    state = proxy.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    assert set(weights) == set(model.state_dict())
    ids = tokenizer(TEXT).input_ids
    read = proxy.tokenizer(TEXT).input_ids
    # transformers 4 puts a first token before every text of a Llama's file.
    assert read == ids or (transformers.__version__ < "5" and read[1:] == ids)
    assert proxy.tokenizer.chat_template == tokenizer.chat_template
    wanted = transformers.AutoModelForCausalLM.from_config(model.config)
    wanted.load_state_dict(weights)
    batch = torch.tensor([ids])
    assert torch.equal(
        GradientSketcher(proxy.model, SPEC)(batch, batch), GradientSketcher(wanted.eval(), SPEC)(batch, batch)
    )


def test_a_folder_with_one_file_is_that_file_and_says_what_it_is_of(plain, tmp_path):
    path = tmp_path / "model" / "small-Q8_0.gguf"
    path.parent.mkdir()
    write_gguf(path, *plain, "Q8_0")
    file, folder = (load_proxy(p, dtype="float32", device="cpu") for p in (path, path.parent))
    assert file.revision == folder.revision
    assert load_tokenizer(path).vocabulary == file.vocabulary
    rows = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(5)]
    run = score(rows, proxy=folder, settings=Settings(spec=SPEC), out=tmp_path / "run").n
    assert run == 5
    assert '"weights": "GGUF Q8_0"' in (tmp_path / "run" / "spec.json").read_text()
    shutil.copy(path, path.with_name("again.gguf"))
    with pytest.raises(GvendiError, match=r"a folder with 2 GGUF files \(again.gguf, small-Q8_0.gguf\)"):
        load_proxy(path.parent)
    with pytest.raises(GvendiError, match=r"quantised already \(GGUF Q8_0\)|needs bitsandbytes"):
        load_proxy(path, dtype="float32", device="cpu", quantize="8bit")


def test_what_is_no_whole_model_is_named(plain, tmp_path, monkeypatch):
    def message(path):
        with pytest.raises(GvendiError) as error:
            load_proxy(path, dtype="float32", device="cpu")
        said = str(error.value)
        assert "\n" not in said
        assert str(path) in said
        return said

    part = tmp_path / "big-00001-of-00003.gguf"
    part.write_bytes(b"GGUF")
    assert "one of 3 parts of a model" in message(part)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04")
    assert "is no GGUF file (it begins with b'PK\\x03\\x04')" in message(other)
    short = tmp_path / "short.gguf"
    write_gguf(short, *plain)
    content = short.read_bytes()
    short.write_bytes(content[: len(content) // 2])
    assert re.search("cannot be loaded|cannot be read", message(short))
    strange = tmp_path / "strange.gguf"
    write_gguf(strange, *plain, architecture="rwkv7")
    assert "rwkv7" in message(strange)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    assert 'pip install "gvendi-fast[gguf]"' in message(strange)
