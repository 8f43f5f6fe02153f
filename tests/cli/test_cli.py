"""The command as a user meets it: output, errors, exit codes."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.cli.options import parse_max_rejected


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"{i} * 3?", "completion": f"It is {3 * i}.", "source": "even" if i % 2 == 0 else "odd"}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_is_one_object_on_stdout_and_nothing_else(gvendi, data):
    orders = ("--order", 2, "--order", "inf")
    code, out, err = gvendi(
        "score", data, "--proxy", "tiny", "--dim", 256, "--by", "source", *orders, "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    assert set(result) == {
        *(
            "gvendi",
            "low",
            "high",
            "entropy",
            "n",
            "dim",
            "tokens",
            "seconds",
            "tokens_per_second",
        ),
        *("unlimited_k", "centered", "diagnosis", "growth", "limits", "norm_shares"),
        *("rejected", "by", "coverage", "spec", "orders"),
        *("rejected_by_reason", "rejected_sizes", "units_done", "units_total", "unreadable", "damaged"),
        "warnings",
    }
    assert result["n"] == 20
    assert result["dim"] == 256
    assert set(result["by"]) == {"even", "odd"}
    assert result["by"]["odd"]["n"] == 10
    assert set(result["by"]["odd"]) == {
        *("gvendi", "low", "high", "draws", "n", "rows", "unlimited_k", "centered")
    }
    assert result["gvendi"] > result["orders"]["2"] > result["orders"]["inf"] > 1
    assert "sketching 20 rows" in err


def test_text_output_sketch_and_score_of_the_directory(gvendi, data, tmp_path):
    out_dir = tmp_path / "run"
    code, out, err = gvendi(
        "sketch", data, "--proxy", "tiny", "--dim", 256, "--out", out_dir, "--by", "source"
    )
    assert code == 0, err
    assert f"gvendi score {out_dir}" in out
    code, out, _ = gvendi("score", out_dir, "--by", "source")
    assert code == 0
    assert "of order" not in out
    assert re.match(r"G-Vendi \d\.\d\d  95 % interval \d\.\d\d to \d\.\d\d  n = 20  K = 256\n", out)
    assert "for another 20 rows of the same source" in out
    assert "at n = 10 rows each" in out
    first = out
    code, out, err = gvendi(
        "score", data, "--proxy", "tiny", "--dim", 256, "--out", out_dir, "--by", "source"
    )
    assert code == 0
    assert "20 of them are done already" in err
    assert out.split("\n")[0] == first.split("\n")[0]


def test_groups_with_rows_to_choose_from_show_the_interval_of_another(gvendi, data):
    with data.open("a") as stream:
        rows = ({"prompt": f"{i} + 1?", "completion": f"It is {i + 1}.", "source": "odd"} for i in range(10))
        stream.write("".join(json.dumps(row) + "\n" for row in rows))
    _, out, err = gvendi("score", data, "--proxy", "tiny", "--dim", 64, "--by", "source", "--order", "inf")
    assert re.search(r"of order inf +\d+\.\d\d", out), err
    assert "at n = 10 rows each, mean of 20 draws" in out
    assert re.search(r"odd .* \d+\.\d\d .* \d+\.\d\d to \d+\.\d\d .* 20 ", out)
    assert re.search(r"even .* \d+\.\d\d .* \d+\.\d\d to \d+\.\d\d .* 10 ", out)


@pytest.mark.parametrize("field", ["source", "[/no] tag"])
def test_names_of_groups_are_no_markup(gvendi, tmp_path, field):
    names = ["[red]loud[/red]", "[/nothing]", "[link=x]y"]
    rows = [{"prompt": f"{i} * 3?", "completion": f"{3 * i}.", field: names[i % 3]} for i in range(12)]
    path = tmp_path / "[bold]data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = gvendi("score", path, "--proxy", "tiny", "--dim", 64, "--by", field)
    assert code == 0, err
    assert f"by {field}, at n = 4 rows each" in out
    assert all(name in out for name in names)


def test_dim_auto_says_its_choice_on_stderr_and_leaves_json_alone(gvendi, data, tmp_path):
    out_dir = tmp_path / "run"
    code, out, err = gvendi("score", data, "--proxy", "tiny", "--dim", "auto", "--out", out_dir, "--json")
    assert code == 0, err
    assert json.loads(out)["dim"] == 512
    assert "K = 512, the smallest of 512 and above with a bias below 5 %" in err
    code, _, err = gvendi("sketch", data, "--proxy", "tiny", "--dim", "auto", "--out", out_dir)
    assert code == 0, err
    assert f"K = 512, as the sketches in '{out_dir}'" in err
    code, _, err = gvendi("score", out_dir, "--dim", "auto")
    assert code == 1
    assert "--dim does not go with the score of a run directory" in err


def test_one_mean_for_all_scores(gvendi, data, tmp_path):
    run, mean = tmp_path / "run", tmp_path / "own.mean"
    sketched = ("--proxy", "tiny", "--dim", 64, "--out", run)
    plain = json.loads(gvendi("score", data, *sketched, "--save-mean", mean, "--json")[1])
    # The corpus' own mean, from the file, gives what none gives.
    code, out, err = gvendi("score", run, "--mean", mean, "--json")
    assert code == 0, err
    again = json.loads(out)
    assert again["centered"] == {
        **plain["centered"],
        "value": pytest.approx(plain["centered"]["value"], rel=1e-9),
    }
    assert again["gvendi"] == plain["gvendi"]
    assert "rows less the mean of own.mean" in gvendi("score", run, "--mean", mean)[1]
    code, _, err = gvendi("score", data, "--proxy", "tiny", "--dim", 128, "--mean", mean)
    assert code == 1
    assert "the mean is of rows of another spec" in err
    assert "sketch.dim: the mean has 64, the rows have 128" in err
    code, out, err = gvendi("score", run, "--mean", tmp_path / "none.mean")
    assert (code, out) == (1, "")
    assert "none.mean' is not a file; give one that 'gvendi score --save-mean FILE' wrote" in err


def test_limit_takes_the_first_rows(gvendi, data):
    _, out, _ = gvendi("score", data, "--proxy", "tiny", "--dim", 64, "--limit", 5, "--json")
    assert json.loads(out)["n"] == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["score", "nowhere.jsonl", "--proxy", "tiny"], "nowhere.jsonl"),
        (["score", "{data}", "--proxy", "tiny", "--dim", "1000"], "dim must be a power of two"),
        (
            ["score", "{data}", "--proxy", "tiny", "--dim", "large"],
            "--dim must be a whole number such as 1024, or auto",
        ),
        (["score", "{data}", "--proxy", "tiny", "--max-rejected", "some"], "--max-rejected must be a count"),
        (["score", "{data}", "--proxy", "tiny", "--batch-tokens", "0"], "--batch-tokens must be at least 1"),
        (["score", "{data}", "--proxy", "./no/such/model"], "no/such/model"),
        (
            ["score", "{data}", "--proxy", "tiny", "--dtype", "float32", "--attention", "flash_attention_2"],
            "attention='flash_attention_2' cannot be used",
        ),
        (
            ["score", "{data}", "--proxy", "tiny", "--exclude", "nothing*"],
            "'nothing\\*' matches no parameter",
        ),
    ],
)
def test_errors_are_one_message_on_stderr_with_exit_code_1(
    gvendi, data, args, message, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    code, out, err = gvendi(*[a.format(data=data) for a in args])
    assert code == 1
    assert out == ""
    assert message.replace("\\", "") in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err


def test_usage_errors_come_from_the_parser(gvendi, data):
    code, _, err = gvendi("score", data, "--dtype", "int8")
    assert code == 2
    assert "--dtype" in err


def test_max_rejected_forms():
    assert parse_max_rejected(None) is None
    assert parse_max_rejected("25") == 25
    assert parse_max_rejected("2.5%") == pytest.approx(0.025)
    for text in ("x", "-1", "2.5", "%", "1e3"):
        with pytest.raises(GvendiError, match="--max-rejected"):
            parse_max_rejected(text)


def test_info_and_version_and_help(gvendi):
    _, out, _ = gvendi("info")
    assert "backend cpu" in out
    assert "--dtype auto" in out
    assert "--attention auto" in out
    assert "gvendi-fast" in gvendi("--version")[1]
    for command in ("score", "sketch"):
        text = gvendi(command, "--help")[1]
        for option in ("--proxy", "--dim", "--max-tokens", "--by", "--out"):
            assert option in text


def test_what_a_run_directory_cannot_take_is_said(gvendi, data, tmp_path):
    run = tmp_path / "run"
    code, _, err = gvendi("sketch", data, "--proxy", "tiny", "--dim", 64, "--unit-rows", 8, "--out", run)
    assert code == 0, err
    code, _, err = gvendi("score", run, "--limit", 5)
    assert (code, "--limit does not go with" in err) == (1, True)
    assert gvendi("score", run, "--seed", 3)[0] == 0
    (run / "parts" / "part-000001.parquet").unlink()
    for command in (
        ("score", run),
        ("score", run, "--json"),
        ("select", run, "--size", 2, "--out", tmp_path / "c.jsonl"),
    ):
        code, _, err = gvendi(*command)
        assert (code, "is not finished: 2 of 3 work units are done" in err) == (0, True), command


def test_a_wrong_path_is_known_before_a_proxy_is_loaded(gvendi, tmp_path):
    code, _, err = gvendi("score", tmp_path / "nope.jsonl", "--proxy", "no/such-model")
    assert code == 1
    assert "nope.jsonl" in err
    assert "no/such-model" not in err
    code, _, err = gvendi(
        "sketch", tmp_path / "nope.jsonl", "--proxy", "no/such-model", "--out", tmp_path / "run"
    )
    assert "nope.jsonl" in err


def test_few_rows_have_a_wide_interval_and_reasons_stand_beside_the_count(gvendi, tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": f"{i} + {i}?", "completion": f"{2 * i}"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    code, out, err = gvendi("score", path, "--proxy", "tiny", "--dim", 64)
    assert code == 0, err
    low, high = map(
        float,
        re.search(r"95 % interval (\d+\.\d\d) to (\d+\.\d\d)  n = 6 ", out).groups(),
    )
    assert 1 <= low < high <= 6
    assert high > 1.3 * low, "six rows say little"
    assert "report no numbers made with it" in out
    assert re.search(r"rejected rows +1 \(.+: 1\)", out)


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(gvendi, data, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = gvendi("sketch", data, "--proxy", "tiny", "--out", tmp_path / "file" / "run")
    assert code == 1
    assert f"'{tmp_path / 'file' / 'run'}" in err
    assert "cannot be used: a part of the path is a file, not a folder" in err


@pytest.mark.parametrize(
    ("words", "before"),
    [
        (["sketch", "c.jsonl", "--out", ""], "--out"),
        (["sketch", "c.jsonl", "--out="], "--out"),
        (["sketch", "", "--out", "run"], "sketch"),
        (["score", "c.jsonl", "--proxy", ""], "--proxy"),
        (["check", ""], "check"),
        ([""], "gvendi"),
    ],
    ids=" ".join,
)
def test_a_word_that_is_empty_is_not_the_current_folder(words, before, gvendi, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, told = gvendi(*words)
    assert (code, out) == (2, "")
    assert f"what follows '{before}' is empty" in told
    assert not list(tmp_path.iterdir())


def test_a_python_without_docstrings_is_refused(gvendi, monkeypatch):
    from gvendi_fast.cli import app

    monkeypatch.setattr(
        app, "sys", types.SimpleNamespace(flags=types.SimpleNamespace(optimize=2), argv=["gvendi", "info"])
    )
    code, out, told = gvendi("info")
    assert (code, out) == (1, "")
    assert "PYTHONOPTIMIZE=2" in told


def test_a_backend_that_matplotlib_does_not_know_is_named_before_any_work(tmp_path):
    run = "from gvendi_fast.report.page import output_paths; output_paths('r.html')"
    done = subprocess.run(
        [sys.executable, "-c", run],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "nonsense", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert "GvendiError: matplotlib" in done.stderr
    assert "(MPLBACKEND is 'nonsense')" in done.stderr
