"""The self-check of a proxy: a sound one passes, and each way of being unfit is caught by the check that is for it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import PACKAGE
from torch import nn

from gvendi_fast import SketchSpec, load_proxy
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Row
from gvendi_fast.sketching import self_check as module
from gvendi_fast.sketching.self_check import builtin_rows, self_check

SPEC = SketchSpec(dim=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random Llama with the tokenizer of `tiny`."""
    import transformers

    path = tmp_path_factory.mktemp("proxy")
    source = PACKAGE / "assets" / "tiny"
    for file in source.glob("tokenizer*"):
        shutil.copy(file, path / file.name)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=vocabulary, max_position_embeddings=128, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One timed batch, a small one."""
    monkeypatch.setattr(module, "TRIAL", (2, 16))
    monkeypatch.setattr(module, "LONG", 0.0)


def proxy_of(folder, dtype="float32"):
    return load_proxy(folder, dtype=dtype, device="cpu")


def verdicts(found) -> dict[str, bool | None]:
    return {check.name: check.passed for check in found.checks}


def failed(found) -> set[str]:
    return {check.name for check in found.checks if check.passed is False}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_model_passes_and_says_what_it_covers_and_costs(folder, dtype):
    found = self_check(proxy_of(folder, dtype), spec=SPEC)
    assert found.passed
    checks = ["taps", "gradients", "two runs", "batch", "right padding", "left padding", "BOS", "autograd"]
    assert list(verdicts(found)) == checks
    by_name = {check.name: check for check in found.checks}
    assert by_name["batch"].value >= by_name["batch"].least
    assert by_name["autograd"].value >= 0.999
    assert (found.dtype, found.device, found.rows, found.compiled) == (dtype, "cpu", 6, False)
    assert {kind.name for kind in found.kinds} == {"embedding", "head", "attention", "mlp", "norm"}
    assert sum(kind.norm_share for kind in found.kinds) == pytest.approx(1, abs=1e-6)
    assert sum(kind.parameters for kind in found.kinds) == found.coverage.sketched == found.parameters
    whole, *parts = found.layers
    assert whole.path == ""
    assert {part.path.split(".")[-1] for part in parts} >= {"self_attn", "mlp"}
    assert [part.total for part in parts] == sorted((part.total for part in parts), reverse=True)
    assert all(part.forward > 0 and part.backward > 0 for part in parts)
    assert found.tokens_per_second > 0
    assert found.trial_tokens == 32
    assert found.batch_tokens == 2048
    assert json.loads(json.dumps(found.to_dict()))["passed"] is True


def test_the_model_is_as_it_was(folder):
    proxy = proxy_of(folder)
    before = {name: (p.requires_grad, p.clone()) for name, p in proxy.model.named_parameters()}
    self_check(proxy, spec=SPEC)
    for name, p in proxy.model.named_parameters():
        assert (p.requires_grad, p.grad) == (before[name][0], None)
        assert torch.equal(p, before[name][1])
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in proxy.model.modules()
    )


def mlp_of(proxy) -> nn.Module:
    return proxy.model.model.layers[0].mlp


def test_experts_with_a_capacity_are_caught(folder):
    proxy = proxy_of(folder)

    def served(mlp, args, out):
        # The first 40 tokens of a batch are served, in the order in which they come.
        kept = torch.arange(out.shape[0] * out.shape[1]).view(out.shape[:2]) < 40
        return out * kept[..., None]

    mlp_of(proxy).register_forward_hook(served)
    found = self_check(proxy, spec=SPEC)
    assert not found.passed
    assert "batch" in failed(found)
    (check,) = (check for check in found.checks if check.name == "batch")
    assert check.value < check.least
    assert "--batch-tokens 1" in check.remedy


def test_routing_by_a_row_s_place_in_the_batch_is_caught(folder):
    proxy = proxy_of(folder)

    def routed(mlp, args, out):
        # Rows after the second go to another expert.
        return out * (1 + 8 * (torch.arange(len(out)) > 1))[:, None, None]

    mlp_of(proxy).register_forward_hook(routed)
    assert "batch" in failed(self_check(proxy, spec=SPEC))


def test_dropout_that_is_always_on_is_caught(folder):
    proxy = proxy_of(folder)
    mlp_of(proxy).register_forward_hook(lambda mlp, args, out: nn.functional.dropout(out, 0.5, training=True))
    assert "two runs" in failed(self_check(proxy, spec=SPEC))


def test_a_mask_that_is_passed_over_is_told_and_costs_nothing_as_runs_pad_after_rows(folder):
    proxy = proxy_of(folder)

    def without(model, args, kwargs):
        return args, {name: value for name, value in kwargs.items() if name != "attention_mask"}

    proxy.model.model.register_forward_pre_hook(without, with_kwargs=True)
    found = self_check(proxy, spec=SPEC)
    (check,) = (check for check in found.checks if check.name == "left padding")
    assert (found.passed, check.passed) == (True, None)
    assert "padding on the left" in check.said


def test_a_model_that_computes_otherwise_where_its_weights_take_gradients_is_caught(folder):
    proxy = proxy_of(folder)
    mlp_of(proxy).register_forward_hook(
        lambda mlp, args, out: out * (1 + 8 * mlp.up_proj.weight.requires_grad)
    )
    found = self_check(proxy, spec=SPEC)
    assert failed(found) == {"autograd"}
    (check,) = (check for check in found.checks if check.name == "autograd")
    assert check.value < check.least


def test_a_model_that_cannot_be_sketched_says_why(folder):
    proxy = proxy_of(folder)
    for block in proxy.model.model.layers:
        block.register_forward_hook(lambda block, args, out: out + out.mean(dim=1, keepdim=True))
    found = self_check(proxy, spec=SPEC)
    assert verdicts(found) == {"taps": False}
    assert "reads text in both directions" in found.checks[0].said
    assert (found.coverage, found.tokens_per_second, found.layers) == (None, None, ())


def test_refused_parameters_are_named_and_can_be_left_out(folder):
    proxy = proxy_of(folder)
    block = proxy.model.model.layers[1]
    block.gate = nn.Parameter(torch.ones(32, 4))
    block.register_forward_hook(lambda block, args, out: out + torch.einsum("bti,oj->bto", out, block.gate))
    found = self_check(proxy, spec=SPEC)
    assert "model.layers.1.gate" in found.checks[0].said
    assert self_check(proxy, spec=SPEC, exclude=["*.gate"]).passed


def test_layers_are_those_of_a_run(folder):
    found = self_check(proxy_of(folder), spec=SPEC, layers="attention")
    assert found.passed
    assert [kind.name for kind in found.kinds] == ["attention"]
    assert found.coverage.share < 1


def test_bos_is_told_both_ways(folder):
    proxy = proxy_of(folder)
    row = [Row(0, "a", "", "here", 1, text="One sentence, and no more of it.")]
    assert "no BOS" in self_check(proxy, row, spec=SPEC).checks[-2].said
    tokenizer = proxy.tokenizer
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
    (bos,) = (c for c in self_check(proxy, row, spec=SPEC).checks if c.name == "BOS")
    assert bos.passed is None
    assert bos.value < 1
    assert "does not begin each row" in bos.said


def test_rows_of_ones_own_are_measured_with_and_unreadable_ones_are_an_error(folder):
    proxy = proxy_of(folder)
    rows = [
        Row(i, f"{i}", "", "here", i, prompt="Say it.", completion=f"It is {i}." * (i + 1)) for i in range(3)
    ]
    assert self_check(proxy, rows, spec=SPEC).rows == 3
    with pytest.raises(GvendiError, match="none of the 1 rows can be read by the proxy"):
        self_check(proxy, [replace(rows[0], prompt=None, completion=None, text="a")], spec=SPEC)
    assert len(builtin_rows()) == 6


def test_the_command_prints_verdicts_and_ends_with_1_where_one_fails(gvendi, folder, monkeypatch):
    code, out, err = gvendi("inspect", "--model", folder, "--dtype", "float32", "--dim", 128)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("fit to be a proxy")
    for words in ("passed  batch", "told    BOS", "kind of layer", "slowest layers", "tokens/s"):
        assert words in out
    monkeypatch.setattr(module, "LEAST", dict.fromkeys(module.LEAST, 1.5))
    code, out, _ = gvendi("inspect", "--model", folder, "--dtype", "float32", "--dim", 128)
    assert code == 1
    assert "FAILED  batch" in out
    assert "--batch-tokens 1" in out


def test_rows_of_a_file_are_measured_with(gvendi, folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": "Say.", "completion": f"It is {i}."}) + "\n" for i in range(4))
    )
    code, out, err = gvendi("inspect", data, "--model", folder, "--dtype", "float32", "--dim", 128, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["rows"], found["passed"], found["coverage"]["left_out"]) == (4, True, [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "tiny", "--strict"], "--strict does not go with --model"),
        (["--dim", "512", "data.jsonl"], "--dim does not go with a look at rows"),
        ([], "give DATA, or the model to measure with --model"),
    ],
)
def test_options_of_the_other_use_are_refused(gvendi, words, said):
    code, _, err = gvendi("inspect", *words)
    assert code == 1
    assert said in " ".join(err.split())
