"""The studies of choosing while training: their arithmetic, tables and picture, and rows of real text as tokens."""

import json

import pytest
import torch
from places import ROOT

pytest.importorskip("matplotlib", reason="draws the picture of the series")


@pytest.fixture
def here(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


class Letters:
    """A tokenizer of letters."""

    eos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        return type("Encoded", (), {"input_ids": [ord(c) for c in text]})


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_rows_are_cut_and_supervised_behind_the_prompt(here, tmp_path):
    from benchmarks.corpora.real_rows import Reader, collate

    long = {"prompt": "p" * 40, "completion": "left out"}
    short = {"prompt": "ab", "completion": "c" * 60}
    write(tmp_path / "a.jsonl", [long, short, {"prompt": "x", "completion": "yz"}])
    rows = sorted(Reader(tmp_path, Letters(), 48).rows("a.jsonl", "s"), key=lambda row: len(row.ids))
    assert [row.text[0] for row in rows] == ["x", "ab"]
    assert [len(row.ids) for row in rows] == [5, 48]
    batch = collate(rows)
    assert batch["labels"][0, :6].tolist() == [-100, -100, ord("y"), ord("z"), 1, -100]
    assert batch["attention_mask"].sum(1).tolist() == [5, 48]
    assert torch.equal(batch["labels"][1, 3:], batch["input_ids"][1, 3:])


def run_of(seed: int, loss: float, tokens: int) -> dict:
    return {
        "seed": seed, "loss": {"AQuA": loss}, "rows": 4, "tokens": tokens, "different texts": 3, "seconds": 10.0,
        "seconds of choosing": 1.0, "gvendi of the rows": 2.5,
    }  # fmt: skip


def test_differences_are_paired_by_seed(here):
    from benchmarks.report.__main__ import table
    from benchmarks.report.training import sampler_line, sampler_table
    from benchmarks.studies.gain_sampler import compared

    runs = {
        "random": [run_of(0, 1.0, 5), run_of(1, 2.0, 5), run_of(2, 3.0, 5)],
        "gain": [run_of(0, 0.9, 7), run_of(1, 1.8, 7), run_of(2, 3.0, 7)],
    }
    found = compared(runs)["AQuA"]
    # Of -0.1, -0.2 and 0: mean -0.1, standard deviation 0.1, and Student's 0.975 quantile of two degrees is 4.3027.
    assert found["difference"] == pytest.approx(-0.1)
    assert found["high"] == pytest.approx(-0.1 + 4.3027 * 0.1 / 3**0.5, abs=1e-4)
    settings = {"m": 4, "window": 8, "dim": 16, "steps": 2, "batch": 2, "student": "tiny", "proxy": "tiny"}
    result = {
        "settings": settings, "pool": {"GSM8K": 9}, "different texts of the pool": 8, "runs": runs,
        "compared": {"AQuA": found}, "held out": {"AQuA": 6}, "loss before": {"AQuA": 4.0},
    }  # fmt: skip
    assert "5 and 7 tokens" in sampler_line(result)
    assert "10.0 % of training's processor time" in sampler_line(result)
    shown = sampler_table(result, table).splitlines()[-1]
    assert shown == "| AQuA (6 rows) | 4.000 | 2.000 | 1.900 | -0.100 (-0.348 to +0.148) | 2 of 3 |"
    assert "not measured" in sampler_line({})


def test_series_become_a_table_and_a_picture(here, tmp_path):
    from benchmarks.report.__main__ import table
    from benchmarks.report.training import series_line, series_table
    from benchmarks.report.training_picture import draw

    sources = ["a", "repeated"]
    figures = {"n": 5, "gvendi": 3.25, "similarity": 0.5, "surprisal": 1.0, "gain": -0.125}
    series = {
        f"{kind}/source/{name}": [None, 1.0, 2.0] for kind in ("gvendi", "similarity") for name in sources
    }
    watched = {"steps": [1, 2, 3], "series": series, "last": dict.fromkeys(sources, figures)}
    found = {
        "settings": {
            "model": "tiny", "steps": 3, "batch": 2, "repeated": 1, "times": 3, "window": 10, "dim": 16,
            "every": 2, "window of others": 7,
        },
        "rows": dict.fromkeys(sources, 3), "watched": {"tap": watched, "other": watched},
    }  # fmt: skip
    assert "one batch in 2, in a window of 7" in series_line(found)
    assert (
        series_table(found, table).splitlines()[-1]
        == "| other | repeated | 5 | 3.2 | 0.500 | 1.00 | -0.125 |"
    )
    draw(found, tmp_path / "new" / "a.svg")
    draw(found, tmp_path / "b.svg")
    assert (tmp_path / "new" / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "b.svg").read_text().count("repeated") == 1
