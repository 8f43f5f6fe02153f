"""A broken model folder is one sentence that names it, no code of it runs, and threads may load at once."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from places import PACKAGE
from safetensors.torch import load_file, save_file

from gvendi_fast.analysis.scoring import score
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.proxy.load import load_proxy

TINY = PACKAGE / "assets" / "tiny"
WEIGHTS = "model.safetensors"


class Code:
    """A pickle that would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def config(**values):
    def change(folder):
        whole = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**whole, **values}))

    return change


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def cut(size):
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def flip(place):
    def change(folder):
        content = bytearray((folder / WEIGHTS).read_bytes())
        content[place] ^= 0xFF
        (folder / WEIGHTS).write_bytes(content)

    return change


def entry(value):
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        tensors[sorted(tensors)[0]].view(-1)[3] = value
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def pickled(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"a": Code(folder / "ran")}, folder / "pytorch_model.bin")


def not_pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")


def shards(index):
    def change(folder):
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(index)

    return change


def twice(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for factor, name in enumerate(names, 1):
        save_file({key: x * factor for key, x in tensors.items()}, folder / name, metadata={"format": "pt"})
    places = {key: names[n % 2] for n, key in enumerate(sorted(tensors))}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def foreign(folder):
    config(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil")(folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n")


def loop(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")


BROKEN = {
    "config empty": text("config.json", ""),
    "config broken": text("config.json", "{"),
    "config a list": text("config.json", "[]"),
    "config a number": text("config.json", "5"),
    "config without a type": text("config.json", "{}"),
    "config deep": text("config.json", '{"model_type": "llama", "x": ' + "[" * 600 + "]" * 600 + "}"),
    "config very deep": text("config.json", '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "config in a loop": loop,
    "unknown architecture": config(model_type="nonsense"),
    "no causal model": config(model_type="vit"),
    "width a word": config(hidden_size="a"),
    "no heads": config(num_attention_heads=0),
    "negative layers": config(num_hidden_layers=-1),
    "no vocabulary": config(vocab_size=None),
    "other widths": config(hidden_size=1024),
    "weights empty": cut(0),
    "weights cut in the header": cut(5000),
    "weights cut at the end": cut(-100),
    "length of the header flipped": flip(4),
    "weights twice": twice,
    "quantized by a word": config(quantization_config="x"),
    "quantized by a number": config(quantization_config=5),
    "quantized by a list": config(quantization_config=[]),
    "quantized by nothing known": config(quantization_config={"quant_method": "nonsense"}),
    "quantized without a method": config(quantization_config={}),
    "quantized as a number": config(quantization_config={"quant_method": 5}),
    "NaN": entry(float("nan")),
    "infinity": entry(float("-inf")),
    "code in a pickle": pickled,
    "no pickle": not_pickled,
    "index empty": shards("{}"),
    "index broken": shards("no"),
    "index of absent shards": shards(
        '{"metadata": {}, "weight_map": {"lm_head.weight": "model-9.safetensors"}}'
    ),
    "weights a folder": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
    "tokenizer empty": text("tokenizer.json", ""),
    "tokenizer a list": text("tokenizer.json", "[]"),
    "tokenizer deep": text("tokenizer.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "tokenizer settings a list": text("tokenizer_config.json", "[]"),
    "generation settings a list": text("generation_config.json", "[]"),
    "an adapter alone": adapter,
    "GGUF alone": lambda folder: (folder / WEIGHTS).rename(folder / "model.gguf"),
    "code of its own": foreign,
}


@pytest.mark.parametrize(
    "name",
    ["config.json", WEIGHTS, "tokenizer.json", "chat_template.jinja", "generation_config.json", "merges.txt"],
)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n", "'git lfs pull'"),
        ("<!doctype html><html>Sign in</html>", "a web page"),
    ],
)
def test_a_pointer_in_a_folder_is_named(tmp_path, name, content, said):
    folder = shutil.copytree(TINY, tmp_path / "copy")
    (folder / name).write_text(content)
    with pytest.raises(GvendiError, match=f"cannot be loaded: {folder / name} is .*{said}"):
        load_proxy(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_named_in_one_sentence(change, tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "copy")
    change(folder)
    with pytest.raises(GvendiError) as error:
        load_proxy(folder, dtype="float32", device="cpu")
    said = str(error.value)
    assert str(folder) in said
    assert "\n" not in said
    assert len(said) < 900
    assert not (folder / "ran").exists()


def test_threads_load_at_once_and_get_what_one_alone_gets():
    default = torch.get_default_dtype()
    wanted = {
        d: load_proxy("tiny", dtype=d, device="cpu").model.state_dict() for d in ("float32", "bfloat16")
    }
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda d: (d, load_proxy("tiny", dtype=d, device="cpu")), [*wanted] * 6))
    for dtype, proxy in found:
        assert all(torch.equal(x, proxy.model.state_dict()[name]) for name, x in wanted[dtype].items())
    assert torch.get_default_dtype() is default
    assert len({id(proxy.model) for _, proxy in found}) == 12


def test_a_token_beyond_the_embedding_refuses_its_row_and_not_the_run(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 99999, "content": "<far>"})
    path.write_text(json.dumps(content))
    rows = [{"prompt": "a", "completion": f"b {word}"} for word in ("c", "<far>", "d", "e", "f")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = score(tmp_path / "data.jsonl", proxy=load_proxy(folder, dtype="float32"))
    assert (result.n, result.rejected) == (4, 1)
    assert "beyond the model's embedding of" in next(iter(result.rejected_by_reason))


def test_loading_shows_no_bars_where_there_is_no_terminal(capfd):
    load_proxy(TINY, dtype="float32")
    assert capfd.readouterr() == ("", "")
