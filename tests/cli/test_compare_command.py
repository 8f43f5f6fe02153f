"""`gvendi compare` as a user meets it."""

import json
import shutil

import pytest

from gvendi_fast.analysis.compare import compare, difference
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.cli.compare import sentence, set_names
from gvendi_fast.vendi.jackknife import Interval


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two run directories of one name, a/run and b/run; row 5 of b is row 3 of a."""
    from gvendi_fast.kernels.sketch_matrix import SketchSpec
    from gvendi_fast.sketching.corpus import Settings, sketch_corpus
    from gvendi_fast.sketching.proxy.load import load_proxy

    root, proxy = tmp_path_factory.mktemp("compare"), load_proxy("tiny", dtype="float32")
    texts = {
        "a": [(f"What is {i} times [bold]?", f"It is {3 * i}.") for i in range(16)],
        "b": [(f"Name {i} birds.", "Crow. " * (i + 1)) for i in range(12)],
    }
    texts["b"][5] = texts["a"][3]
    for name, rows in texts.items():
        (root / name).mkdir()
        lines = [
            json.dumps({"prompt": p, "completion": c, "id": f"{name}{i}"}) for i, (p, c) in enumerate(rows)
        ]
        (root / name / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        settings = Settings(spec=SketchSpec(dim=64))
        sketch_corpus([str(root / name / f"{name}.jsonl")], root / name / "run", proxy, settings)
    return root


def test_json_has_names_values_and_texts(gvendi, runs):
    code, out, err = gvendi("compare", runs / "a/run", runs / "b/run", "--pairs", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["n"] == 12
    assert set(found["sets"]) == {"a/run", "b/run"}
    assert found["sets"]["a/run"]["rows"] == 16
    assert found["sets"]["b/run"]["path"] == str(runs / "b/run")
    (overlap,) = found["overlaps"]
    assert (overlap["same_ids"], overlap["same_sketches"]) == (0, 1)
    best = overlap["pairs"][0]
    assert (best["first_id"], best["second_id"]) == ("a3", "b5")
    assert best["first_text"] == best["second_text"] == "What is 3 times [bold]?\nIt is 9."
    assert len(overlap["pairs"]) == 2


def test_text_output_says_what_it_found(gvendi, runs):
    code, out, err = gvendi("compare", runs / "a/run", runs / "b/run", "--pairs", 1)
    assert code == 0, err
    assert "n = 12 rows of each" in out
    assert "What is 3 times [bold]? It is 9." in out
    assert "1 equal sketches" in out
    (found,) = compare({"a/run": runs / "a/run", "b/run": runs / "b/run"}).differences
    assert sentence(found) in out
    code, out, _ = gvendi("compare", runs / "a/run", runs / "b/run", "--no-text", "--n", 8)
    assert code == 0
    assert "n = 8 rows of each" in out
    assert "a3" in out
    assert "[bold]" not in out


def test_three_sets_get_a_table_of_differences(gvendi, runs, tmp_path):
    shutil.copytree(runs / "a/run", tmp_path / "again")
    code, out, err = gvendi("compare", runs / "a/run", runs / "b/run", tmp_path / "again", "--pairs", 0)
    assert code == 0, err
    assert "of 3 differences" in out
    assert "16 ids" in out


@pytest.fixture
def moved(runs, tmp_path):
    """The folder that the corpora of `runs` lie in for the time of a test."""
    for name in "ab":
        (runs / name / f"{name}.jsonl").rename(tmp_path / f"{name}.jsonl")
    yield tmp_path
    for name in "ab":
        (tmp_path / f"{name}.jsonl").rename(runs / name / f"{name}.jsonl")


def test_the_corpus_must_be_there_unless_it_is_not_wanted(gvendi, runs, moved):
    args = ["compare", runs / "a/run", runs / "b/run"]
    code, out, err = gvendi(*args)
    assert code == 1
    assert out == ""
    assert "--corpus" in err
    assert gvendi(*args, "--corpus", moved)[0] == 0
    assert gvendi(*args, "--no-text")[0] == 0
    assert gvendi(*args, "--pairs", 0)[0] == 0


def test_what_is_refused(gvendi, runs):
    code, _, err = gvendi("compare", runs / "a/run")
    assert code == 1
    assert "wanted two or more" in err
    code, _, err = gvendi("compare", runs / "a/run", runs / "b/../a/run")
    assert code == 1
    assert "given twice" in err
    code, _, err = gvendi("compare", runs / "a/run", runs / "a")
    assert code == 1
    assert "is not a run directory" in err
    assert "--pairs" in gvendi("compare", "--help")[1]


def test_names_are_the_shortest_that_tell_paths_apart():
    assert set_names(["x/one", "y/two/"]) == ["one", "two"]
    assert set_names(["x/a/run", "y/a/run", "y/b/run", "z"]) == ["x/a/run", "y/a/run", "b/run", "z"]
    with pytest.raises(GvendiError, match="given twice"):
        set_names(["x", "./x"])


def test_the_sentence_puts_the_more_diverse_set_first():
    small, large = (Interval(value, value, value, 0.01, 100) for value in (10.0, 20.0))
    for d in (difference("s", small, "l", large), difference("l", large, "s", small)):
        assert sentence(d).startswith(
            "l is more diverse than s: 2.00 times (95 % interval 1.95 to 2.06, p < 0.0001)"
        )
    assert "do not differ by more than noise" in sentence(difference("a", small, "b", small))
