"""A run directory of an earlier format is scored, and not gone on with; what supervises is part of its spec."""

import json

import numpy as np
import pytest

from gvendi_fast.analysis.scoring import score_run
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching import corpus
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy

SETTINGS = Settings(SketchSpec(64))


@pytest.fixture(scope="module")
def tiny():
    return load_proxy("tiny", dtype="float32")


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"What is {n}?", "completion": f"{n} it is."} for n in range(4)]
    rows.append({"prompt": "What ends a turn? <|im_end|>", "completion": "That."})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_of_the_format_before_is_scored_and_not_gone_on_with(data, tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as earlier:
        earlier.setattr(corpus, "FORMAT", 2)
        sketch_corpus(data, out, tiny, SETTINGS)
    assert json.loads((out / "spec.json").read_text())["format"] == 2
    assert 1 < score_run(RunDirectory.load(out)).gvendi <= 5
    with pytest.raises(
        GvendiError, match="was made with other settings:\n  format: 2 in the directory, 3 now"
    ):
        sketch_corpus(data, out, tiny, SETTINGS)


def test_control_tokens_are_part_of_the_spec_where_they_are_no_text(data, tiny, tmp_path):
    text = sketch_corpus(data, tmp_path / "text", tiny, SETTINGS)
    tokens = sketch_corpus(data, tmp_path / "tokens", tiny, Settings(SketchSpec(64), control_tokens="tokens"))
    assert "control_tokens" not in text.spec
    assert tokens.spec["control_tokens"] == "tokens"
    rows = [np.concatenate([part.sketches for part in run.iterate()]) for run in (text, tokens)]
    assert (rows[0] == rows[1]).all(axis=1).tolist() == [True] * 4 + [False]
    with pytest.raises(GvendiError, match="control_tokens"):
        sketch_corpus(data, tmp_path / "text", tiny, Settings(SketchSpec(64), control_tokens="tokens"))


def test_how_turns_are_told_is_part_of_the_spec_where_no_loop_tells_them(data, tiny, tmp_path, monkeypatch):
    assert "turns" not in sketch_corpus(data, tmp_path / "loop", tiny, SETTINGS).spec
    marked = (
        "{% for m in messages %}{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    )
    marked += "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", marked)
    assert sketch_corpus(data, tmp_path / "marked", tiny, SETTINGS).spec["turns"] == "markers"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", {"default": marked, "tool_use": marked})
    assert sketch_corpus(data, tmp_path / "two", tiny, SETTINGS).units_done == 1
