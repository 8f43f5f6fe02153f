"""--parameters and --quantize on the command line, and a folder with an adapter as a proxy."""

import json

import pytest


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """tiny's folder with an adapter beside it, and a few rows."""
    peft = pytest.importorskip("peft", reason="needs peft, which is not installed")
    from gvendi_fast import load_proxy

    made = tmp_path_factory.mktemp("forms")
    proxy = load_proxy("tiny", dtype="float32", device="cpu")
    proxy.model.save_pretrained(made / "base")
    proxy.tokenizer.save_pretrained(made / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    peft.get_peft_model(proxy.model, config).save_pretrained(made / "adapter")
    path = made / "adapter" / "adapter_config.json"
    # As from the folder itself, wherever both are moved to.
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "../base"}))
    rows = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(6)]
    (made / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_adapters_or_their_base_are_sketched(home, gvendi):
    def spec(out, *options):
        given = ("--proxy", home / "adapter", "--dtype", "float32", "--dim", 64, *options)
        code, _, error = gvendi("sketch", home / "data.jsonl", *given, "--out", out)
        assert code == 0, error
        return json.loads((out / "spec.json").read_text())

    adapters, base = spec(home / "run"), spec(home / "of_base", "--parameters", "base")
    assert "parameters" not in adapters
    assert base["parameters"] == "base"
    assert adapters["coverage"]["sketched"] < base["coverage"]["sketched"]
    assert adapters["proxy"] == base["proxy"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--parameters", "--parameters is 'all'; wanted one of trainable, adapters, base"),
        ("--quantize", "--quantize is 'all'; wanted one of 4bit, 8bit"),
    ],
)
def test_a_word_that_is_no_choice_is_named(option, said, tmp_path, gvendi):
    (tmp_path / "data.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    code, _, error = gvendi(
        "sketch", tmp_path / "data.jsonl", "--proxy", "tiny", option, "all", "--out", tmp_path / "o"
    )
    assert code != 0
    assert said in error
