"""Every option that names a field: one that no row has ends the command before its work, with what the rows have."""

import json

import pytest

from gvendi_fast.analysis import scoring
from gvendi_fast.sketching import corpus as sketching

TINY = ("--proxy", "tiny", "--dim", 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, and a run of it that was sketched by a field, and one by a field that has no value left."""
    made = tmp_path_factory.mktemp("by")
    rows = [{"id": f"{i}", "prompt": f"{i}?", "completion": f"{i}.", "kind": "ab"[i % 2]} for i in range(8)]
    (made / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture(scope="module")
def runs(folder):
    from dataclasses import replace

    from gvendi_fast.data.index import Fields
    from gvendi_fast.kernels.sketch_matrix import SketchSpec
    from gvendi_fast.sketching.proxy.load import load_proxy

    settings = sketching.Settings(spec=SketchSpec(dim=64), fields=Fields(by="kind"))
    proxy = load_proxy("tiny", dtype="float32")
    sketching.sketch_corpus(folder / "data.jsonl", folder / "kind", proxy, settings)
    # As an earlier version left it: sketched by a field that no row has.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketching, "fault_of_named_fields", lambda manifest: None)
        nosuch = replace(settings, fields=Fields(by="nosuch"))
        sketching.sketch_corpus(folder / "data.jsonl", folder / "nosuch", proxy, nosuch)
    return folder


def refused(gvendi, *words) -> str:
    code, out, err = gvendi(*words)
    assert (code, out) == (1, ""), err
    return next(line for line in err.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize("command", [("score",), ("sketch", "--out", "OUT")], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("option", "name"), [("--by", "knid"), ("--id-field", "uid"), ("--text-field", "body")]
)
def test_a_corpus_is_not_sketched_by_a_field_that_no_row_has(
    gvendi, folder, tmp_path, monkeypatch, command, option, name
):
    monkeypatch.setattr(sketching, "GradientSketcher", None)
    words = [tmp_path / "run" if word == "OUT" else word for word in command]
    said = refused(gvendi, *words, folder / "data.jsonl", *TINY, option, name)
    assert said.startswith(f"error: {option} is '{name}', ")
    assert "the first rows have id, prompt, completion, kind" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["score", "measures", "weights", "report"])
def test_a_run_directory_is_not_scored_by_a_field_that_none_of_its_rows_has(
    gvendi, runs, monkeypatch, tmp_path, command
):
    monkeypatch.setattr(scoring, "_read", None)
    out = ("--out", tmp_path / "page.html") if command == "report" else ()
    assert refused(gvendi, command, runs / "nosuch", "--by", "nosuch", *out).startswith(
        "error: --by is 'nosuch', which no row of '"
    )
    assert "was sketched with --by kind, not --by knid" in refused(
        gvendi, command, runs / "kind", "--by", "knid", *out
    )


@pytest.mark.parametrize("name", ["nosuch", "knid"])
def test_rows_are_not_chosen_per_field_that_no_row_has(gvendi, runs, monkeypatch, tmp_path, name):
    from gvendi_fast import selection

    monkeypatch.setattr(selection, "select", None)
    words = ("select", runs / "nosuch", "--size", 2, "--out", tmp_path / "a.jsonl")
    assert (
        refused(gvendi, *words, "--per", name)
        == f"error: --per is '{name}', which no row has; name a field of the rows"
    )
    assert "field 'knid' is missing" in refused(gvendi, *words, "--quality", "knid")


def test_a_field_that_the_rows_have_makes_groups(gvendi, folder):
    code, out, err = gvendi("score", folder / "data.jsonl", *TINY, "--by", "kind")
    assert code == 0, err
    assert "by kind, at n = 4 rows each" in out


def test_a_report_of_a_run_whose_field_no_row_has_is_without_groups(gvendi, runs, tmp_path):
    code, _, err = gvendi("report", runs / "nosuch", "--out", tmp_path / "page.html")
    assert code == 0, err
    assert json.loads((tmp_path / "page.json").read_text())["groups"] is None
