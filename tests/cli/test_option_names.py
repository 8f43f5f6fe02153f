"""An error names the option as it is typed, not the argument of the library behind it."""

import pytest
import typer

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.cli.app import app
from gvendi_fast.cli.option_names import in_options
from gvendi_fast.data.leases import Terms

TINY = ("--proxy", "tiny")
# Words with DATA, RUN and OUT, where the option that is wrong comes last; what the message begins with.
WRONG = [
    *((("score", "RUN", "--order", value), "--order holds ") for value in ("0", "-1", "nan")),
    (("score", "DATA", *TINY, "--dim", "63"), "--dim must be a power of two"),
    (("score", "DATA", *TINY, "--max-tokens", "0"), "--max-tokens must be at least 1"),
    (("sketch", "DATA", *TINY, "--out", "OUT", "--batch-tokens", "0"), "--batch-tokens must be at least 1"),
    (("sketch", "DATA", *TINY, "--out", "OUT", "--limit", "0"), "--limit must be at least 1"),
    (("sketch", "DATA", *TINY, "--out", "OUT", "--unit-rows", "0"), "--unit-rows must be at least 1"),
    (("score", "DATA", *TINY, "--max-row-bytes", "0"), "--max-row-bytes must be at least 1"),
    (("score", "DATA", *TINY, "--max-rejected", "100%"), "--max-rejected must be "),
    (("score", "DATA", *TINY, "--exclude", "*"), "--exclude leaves no parameter"),
    (("score", "DATA", *TINY, "--exclude", "no"), "--exclude pattern 'no' matches"),
    (("score", "DATA", *TINY, "--layers", "x"), "--layers is 'x'"),
    (("score", "DATA", *TINY, "--sketch-groups", "x"), "--sketch-groups is 'x'"),
    (("score", "RUN", "--save-mean", "."), "--save-mean is '.'"),
    (("score", "RUN", "--mean", "DATA"), "--mean: "),
    (("cluster", "RUN", "--out", "OUT.parquet", "--clusters", "100"), "--clusters is 100"),
    (("report", "RUN", "--out", "OUT.html", "--clusters", "100"), "--clusters is 100"),
    (("report", "RUN", "--out", "OUT.html", "--clusters", "0"), "--clusters is 0"),
    (("select", "RUN", "--out", "OUT.jsonl", "--size", "0"), "--size is 0"),
    (
        (
            "select",
            "RUN",
            "--out",
            "OUT.jsonl",
            "--size",
            "3",
            "--objective",
            "logdet",
            "--method",
            "relaxed",
        ),
        "--method is 'relaxed'",
    ),
    (("select", "RUN", "--out", "OUT.jsonl", "--size", "3", "--memory", "1KB"), "--memory is 1,000 bytes"),
    (("compare", "RUN", "OTHER", "--no-text", "--n", "0"), "--n is 0"),
    (("measures", "RUN", "--no-text", "--n", "0"), "--n is 0"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_the_option_is_named_as_it_is_typed(gvendi, monkeypatch, run, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    (tmp_path / "other").symlink_to("run")
    (tmp_path / "nowhere.jsonl").write_text("1")
    places = {"DATA": "data.jsonl", "RUN": "run", "OTHER": "other"}
    code, out, err = gvendi(*(places.get(word, word.replace("OUT", "out")) for word in words))
    assert (code, out) == (1, "")
    assert next(line for line in err.splitlines() if line.startswith("error: ")).startswith(
        f"error: {said}"
    ), err


def test_only_an_argument_that_is_an_option_of_the_command_is_renamed():
    """Every command's options, by the words that the library's messages begin with."""
    command = typer.main.get_command(app)
    select = {p.name: p.opts[0] for p in command.commands["select"].params}
    assert in_options("size is 3; wanted 4", select) == "--size is 3; wanted 4"
    sketch = {p.name: p.opts[0] for p in command.commands["sketch"].params}
    for seconds in ("inf", "1e+300"):
        with pytest.raises(GvendiError) as raised:
            Terms(float(seconds), hang_after_s=float(seconds))
        assert in_options(str(raised.value), sketch).startswith(f"--lease is {seconds}; wanted seconds")
    for text in (
        "groups has 2 labels for 3 rows",
        "n_clusters is 3",
        "sizes is 3",
        "size of a row",
        "'size' is damaged",
        "corpus: 'size' does not exist",
        "the size is 3",
        "directory is 3",
        "",
    ):
        assert in_options(text, select) == text
