"""The proxy room: the embedded model, local folders, a hub played by a local server, precision."""

import json
import math
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from places import ROOT

from benchmarks.corpora import made_up as corpora
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.proxy import load as room
from gvendi_fast.sketching.proxy.load import folder_digest, load_proxy, resolve_device, resolve_dtype

TINY = ROOT / "gvendi_fast" / "assets" / "tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny() -> room.Proxy:
    return load_proxy("tiny", dtype="float32", device="cpu")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "copy"))


def test_tiny_is_small_and_complete(tiny):
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 4_000_000
    assert 1_000_000 < tiny.parameters < 1_400_000
    assert tiny.parameters == sum(p.numel() for p in tiny.model.parameters())
    assert not tiny.model.training
    assert tiny.dtype == next(tiny.model.parameters()).dtype == torch.float32
    assert tiny.model.lm_head.weight is tiny.model.model.embed_tokens.weight
    assert tiny.identity == tiny.revision == folder_digest(TINY)
    assert tiny.tokenizer.is_fast
    assert len(tiny.tokenizer) == tiny.model.config.vocab_size


def test_tiny_speaks_chatml_and_keeps_text(tiny):
    turns = [
        {"role": "user", "content": "It's 12 + 30?\n\n\tnaïve 日本"},
        {"role": "assistant", "content": "42."},
    ]
    text = tiny.tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == (
        "<|im_start|>user\nIt's 12 + 30?\n\n\tnaïve 日本<|im_end|>\n<|im_start|>assistant\n42.<|im_end|>\n"
    )
    ids = tiny.tokenizer(text)["input_ids"]
    assert tiny.tokenizer.decode(ids) == text
    assert tiny.tokenizer.eos_token == "<|im_end|>"
    assert ids.count(tiny.tokenizer.eos_token_id) == 2
    assert tiny.tokenizer.pad_token == "<|endoftext|>"
    prompt = tiny.tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_loaded_tokenizer_cuts_as_its_file_says(tiny):
    from tokenizers import Tokenizer

    text = "<|im_start|>user\nHe'll pay $1,250.75!\n\n  ok_now  <|im_end|>"
    raw = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert tiny.tokenizer(text)["input_ids"] == raw.encode(text).ids


def test_tiny_has_learnt(tiny):
    losses, jumbled = [], []
    order = torch.Generator().manual_seed(0)
    for row in corpora.varied(36, seed=987):
        turns = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        text = tiny.tokenizer.apply_chat_template(turns, tokenize=False)
        ids = torch.tensor([tiny.tokenizer(text)["input_ids"]])
        mixed = ids[:, torch.randperm(ids.shape[1], generator=order)]
        with torch.no_grad():
            losses.append(float(tiny.model(input_ids=ids, labels=ids).loss))
            jumbled.append(float(tiny.model(input_ids=mixed, labels=mixed).loss))
    # Below a uniform guess, and for the order of the tokens as well as for their frequency, on rows of a form that it
    # was not trained on last.
    mean = sum(losses) / len(losses)
    assert mean < 0.6 * math.log(tiny.model.config.vocab_size)
    assert mean < 0.5 * sum(jumbled) / len(jumbled)


def test_training_record_belongs_to_the_weights(tiny):
    record = json.loads((TINY / "training.json").read_text(encoding="utf-8"))
    assert record["parameters"] == tiny.parameters
    for name, loss in record["held_out_nats_per_token"].items():
        assert loss < 0.7 * record["unigram_nats_per_token"][name] < record["uniform_nats_per_token"]


def test_local_folder_equals_tiny_and_the_digest_sees_one_weight(copy, tiny):
    from safetensors.torch import load_file, save_file

    same = load_proxy(copy, dtype="float32", device="cpu")
    assert same.revision == tiny.revision
    assert same.name == str(copy)
    (copy / "training.json").unlink()
    assert folder_digest(copy) == tiny.revision
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = load_proxy(copy, dtype="float32", device="cpu")
    assert changed.revision != tiny.revision
    assert changed.model.model.norm.weight[0] != tiny.model.model.norm.weight[0]


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_folder_names_what_is_missing(copy, gone):
    (copy / gone).unlink()
    with pytest.raises(GvendiError, match=gone):
        load_proxy(copy)


def test_weights_that_do_not_cover_the_model_are_refused(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GvendiError, match=r"lack 1 of its parameters.*layers\.2\.mlp\.up_proj"):
        load_proxy(copy)


def test_weights_of_other_sizes_than_the_config_s_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 10}))
    with pytest.raises(GvendiError, match=r"embed_tokens\.weight is \[2048, 128\] in place of \[10, 128\]"):
        load_proxy(copy)


@pytest.mark.parametrize("content", ["[]", "{}", '{"model_type": "llama", "hidden_size": -3}'])
def test_a_config_that_no_model_can_have_is_named(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(GvendiError, match="config of the proxy") as caught:
        load_proxy(copy)
    assert "\n" not in str(caught.value)


def test_damaged_files_give_one_line(copy):
    (copy / "model.safetensors").write_bytes(b"\0" * 5)
    with pytest.raises(GvendiError, match="model of the proxy") as caught:
        load_proxy(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./no-such-folder", "~/no/such", "a/b/c", str(ROOT / "nothing")])
def test_missing_folder(name):
    with pytest.raises(GvendiError, match="does not exist"):
        load_proxy(name)


def test_a_file_and_a_stray_revision_are_refused():
    with pytest.raises(GvendiError, match="is a file"):
        load_proxy(__file__)
    with pytest.raises(GvendiError, match="revision='main'"):
        load_proxy("tiny", revision="main")


def test_an_empty_name_is_not_the_current_folder(copy, monkeypatch):
    monkeypatch.chdir(copy)
    with pytest.raises(GvendiError, match="name is empty"):
        load_proxy("")


def test_slow_tokenizer_is_refused(copy, monkeypatch):
    from transformers import AutoTokenizer

    class Slow:
        is_fast = False

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Slow())
    with pytest.raises(GvendiError, match="only a slow tokenizer"):
        load_proxy(copy)


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as loading needs, over the files of `tiny`."""

    def _reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        names = [*sorted(p.name for p in TINY.iterdir()), "onnx/model.onnx"]
        if "/locked" in path and "/resolve/" in path:
            self._reply(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
        elif "/absent" in path:
            self._reply(404, X_Error_Code="RepoNotFound", X_Error_Message="none")
        elif "/revision/" in path and not path.endswith(("main", COMMIT)):
            self._reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="none")
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": n, "size": (TINY / n).stat().st_size, "oid": n} for n in names[:-1]
            ]
            self._reply(200, json.dumps(entries).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/"):
            info = {"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            self._reply(200, json.dumps(info).encode(), Content_Type="application/json")
        elif "/resolve/" not in path:
            self._reply(404)
        else:
            file = TINY / path.rsplit("/", 1)[1]
            self._reply(200, file.read_bytes(), ETag=f'"{file.name}"', X_Repo_Commit=COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[ThreadingHTTPServer]:
    from huggingface_hub import constants, file_download

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_hub_name_gives_the_commit_and_survives_a_lost_network(hub, monkeypatch, tiny):
    from huggingface_hub import constants

    online = load_proxy("some/model", dtype="float32", device="cpu")
    assert online.revision == COMMIT
    assert online.identity == f"some/model@{COMMIT}"
    assert torch.equal(online.model.model.norm.weight, tiny.model.model.norm.weight)
    hub.shutdown()
    hub.server_close()
    with pytest.warns(UserWarning, match="cannot be reached"):
        cached = load_proxy("some/model", dtype="float32", device="cpu")
    assert cached.revision == COMMIT
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_proxy("some/model", revision=COMMIT, device="cpu").revision == COMMIT
    with pytest.raises(GvendiError, match=r"HF_HUB_OFFLINE is set.*proxy 'tiny'.*local model folder"):
        load_proxy("some/other")


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("some/absent", None, r"unknown to the Hugging Face hub.*proxy 'tiny'"),
        ("some/locked", None, r"is gated.*proxy 'tiny'"),
        ("some/model", "v9", r"no revision 'v9'"),
        ("not a name", None, r"neither a folder nor a possible hub name"),
    ],
)
def test_hub_refusals_are_one_sentence(hub, name, revision, words):
    with pytest.raises(GvendiError, match=words) as caught:
        load_proxy(name, revision=revision)
    assert "\n" not in str(caught.value)


def test_unreachable_hub(hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(GvendiError, match=r"cannot be reached.*proxy 'tiny'.*local model folder") as caught:
        load_proxy("some/model")
    assert "\n" not in str(caught.value)


def test_resolve_dtype_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for flags, want in (
        (["avx2"], torch.float32),
        (["avx512_bf16"], torch.bfloat16),
        (["bf16"], torch.bfloat16),
    ):
        monkeypatch.setattr(room, "_cpu_flags", lambda flags=flags: frozenset(flags))
        dtype, reason = resolve_dtype("auto", "cpu")
        assert dtype == want
        assert "bf16" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_dtype("auto", "cuda")[0] == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_dtype("auto", "cuda")[0] == (
        torch.bfloat16 if torch.version.hip is None else torch.float32
    )


def test_resolve_dtype_takes_names_and_refuses_fp16():
    assert resolve_dtype("float32")[0] == resolve_dtype(torch.float32)[0] == torch.float32
    assert resolve_dtype(torch.bfloat16)[0] == torch.bfloat16
    for bad in ("float16", torch.float16, torch.int64, "half"):
        with pytest.raises(GvendiError, match="dtype="):
            resolve_dtype(bad)


def test_resolve_device():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(GvendiError, match="not a torch device"):
        resolve_device("fridge")


def test_corpora_are_stable_distinct_and_of_two_kinds():
    rows = corpora.varied(1800, seed=0)
    assert rows[:36] == corpora.varied(36, seed=0)
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 1800
    assert len({row["family"] for row in rows}) == len(corpora.FAMILIES) >= 16
    assert not any("{" in row["prompt"] or " // " in row["completion"] for row in rows)
    assert rows[0] != corpora.varied(1, seed=1)[0]
    narrow = corpora.narrow(200, seed=0)
    assert len({row["prompt"] for row in narrow}) == 200
    assert all("how much" in p or "total cost" in p for p in (row["prompt"].lower() for row in narrow))
