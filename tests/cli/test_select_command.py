"""`gvendi select`: the rows it writes, the file beside them, its summary, and its errors."""

import json
import os

import pytest
import torch

from gvendi_fast.analysis.scoring import Settings
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.cli.select import parse_bytes
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.rows import Fields
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy
from gvendi_fast.vendi.centered import RowMean


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder with data.jsonl and its run directory, lines of data.jsonl)."""
    folder = tmp_path_factory.mktemp("select")
    lines = [
        json.dumps(
            {
                "id": f"r{i:02d}",
                "prompt": f"{i} * 3?",
                "completion": f"It is {3 * i}.",
                "source": "even" if i % 2 == 0 else "odd",
                "meta": {"score": 1 + i % 5, "third": i % 3},
            }
        )
        for i in range(40)
    ]
    (folder / "data.jsonl").write_text("".join(line + "\n" for line in lines))
    settings = Settings(spec=SketchSpec(dim=64), fields=Fields(by="source"), unit_rows=16)
    sketch_corpus(folder / "data.jsonl", folder / "run", load_proxy("tiny", dtype="float32"), settings)
    return folder, lines


def test_rows_are_written_unchanged_in_rank_order(gvendi, corpus, tmp_path):
    import pyarrow.parquet as pq

    folder, lines = corpus
    out = tmp_path / "chosen.jsonl"
    code, text, err = gvendi("select", folder / "run", "--size", 12, "--out", out, "--json")
    assert code == 0, err
    summary = json.loads(text)
    assert summary["size"] == summary["n"] == 12
    assert summary["pool_rows"] == 40
    assert summary["random"]["draws"] == 20
    assert summary["gvendi"] > summary["random"]["gvendi_band"][1]
    assert "choosing 12 rows" in err
    written = out.read_text().splitlines()
    assert set(written) <= set(lines)
    table = pq.read_table(tmp_path / "chosen.parquet").to_pydict()
    assert table["id"] == [json.loads(line)["id"] for line in written]
    assert table["rank"] == list(range(1, 13))
    assert list(table) == ["id", "rank", "gain", "surprisal", "cluster"]
    assert table["cluster"] == [None] * 12
    # Fewer rows are the first of more.
    code, text, _ = gvendi("select", folder / "run", "--size", 5, "--out", tmp_path / "few.jsonl")
    assert (tmp_path / "few.jsonl").read_text().splitlines() == written[:5]
    assert text.startswith("5 of 40 rows")
    assert "random subsets" in text


@pytest.mark.parametrize(("field", "counts"), [("source", [6, 6]), ("meta.third", [4, 4, 4])])
def test_per_takes_equally_many_of_each_value(gvendi, corpus, tmp_path, field, counts):
    folder, _ = corpus
    out = tmp_path / "chosen.jsonl"
    code, _, err = gvendi("select", folder / "run", "--size", 12, "--per", field, "--out", out)
    assert code == 0, err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    values = [row["source"] if field == "source" else row["meta"]["third"] for row in rows]
    assert sorted(values.count(value) for value in set(values)) == counts


def test_quality_and_include(gvendi, corpus, tmp_path):
    folder, _ = corpus
    out = tmp_path / "chosen.jsonl"
    options = ("--quality", "meta.score", "--include", folder / "run", "--json")
    code, text, err = gvendi("select", folder / "run", "--size", 4, "--out", out, *options)
    assert code == 0, err
    summary = json.loads(text)
    assert summary["objective"] == "quality"
    assert summary["n"] == 44
    scores = [json.loads(line)["meta"]["score"] for line in out.read_text().splitlines()]
    assert summary["value"] == pytest.approx(summary["gvendi"] * sum(scores) / 4)
    assert sum(scores) / 4 > 4


def test_nothing_is_overwritten_unless_asked(gvendi, corpus, tmp_path):
    folder, _ = corpus
    out = tmp_path / "chosen.jsonl"
    out.write_text("mine\n")
    code, _, err = gvendi("select", folder / "run", "--size", 4, "--out", out)
    assert (code, out.read_text()) == (1, "mine\n")
    assert "chosen.jsonl' already exists" in err
    assert gvendi("select", folder / "run", "--size", 4, "--out", out, "--force")[0] == 0
    assert len(out.read_text().splitlines()) == 4
    code, _, err = gvendi("select", folder / "run", "--size", 4, "--out", folder / "data.jsonl", "--force")
    assert code == 1
    assert "is a file of the corpus itself" in err
    # As where the system ignores case.
    os.link(folder / "data.jsonl", folder / "DATA.jsonl")
    code, _, err = gvendi("select", folder / "run", "--size", 4, "--out", folder / "DATA.jsonl", "--force")
    (folder / "DATA.jsonl").unlink()
    assert code == 1
    assert "is a file of the corpus itself" in err


@pytest.mark.parametrize("link", ["chosen.jsonl", "chosen.parquet"])
@pytest.mark.parametrize("target", ["nowhere/deep", "itself"])
def test_a_link_to_nothing_or_in_a_circle_is_replaced(gvendi, corpus, tmp_path, link, target):
    (tmp_path / link).symlink_to(tmp_path / link if target == "itself" else target)
    code, _, err = gvendi("select", corpus[0] / "run", "--size", 4, "--out", tmp_path / "chosen.jsonl")
    assert (code, "error" in err) == (0, False), err
    assert not (tmp_path / link).is_symlink()
    assert len((tmp_path / "chosen.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--out", "chosen.json"), "ends in .jsonl"),
        (("--out", "no/chosen.jsonl"), "the folder 'no' does not exist"),
        (("--size", "99"), "size is 99; wanted 1 to 40"),
        (("--quality", "meta.color"), "data.jsonl:1: field 'meta.color' is missing"),
        (("--objective", "quality"), "--quality FIELD goes with --objective quality"),
        (("--max-passes", 3), "--max-passes 3 goes with --method relaxed, and the method is lazy"),
        (("--quality", "meta.score", "--objective", "logdet"), "--quality FIELD goes with"),
        (("--per", "color"), "--per is 'color', which no row has"),
        (("--memory", "much"), "--memory must be a size"),
        (("--include", "nowhere"), "'nowhere' is not a run directory"),
    ],
)
def test_errors_are_one_message_and_leave_nothing(gvendi, corpus, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    given = {"--size": "4", "--out": "chosen.jsonl", **dict(zip(args[::2], args[1::2], strict=True))}
    code, out, err = gvendi("select", corpus[0] / "run", *[word for pair in given.items() for word in pair])
    assert code == 1
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_that_changed_leaves_nothing(gvendi, corpus, tmp_path):
    folder, _ = corpus
    data = folder / "data.jsonl"
    content = data.read_bytes()
    data.write_bytes(content.replace(b"It is 3.", b"It is 4."))
    code, _, err = gvendi("select", folder / "run", "--size", 4, "--out", tmp_path / "chosen.jsonl")
    data.write_bytes(content)
    assert code == 1
    assert "has changed since it was sketched (other content)" in err
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_memory():
    assert parse_bytes("512MB") == 512 * 10**6
    assert parse_bytes("4GiB") == 4 << 30
    assert parse_bytes("1.5 kb") == 1500
    assert parse_bytes("1000") == 1000
    for text in ("", "GB", "-1GB", "1e3", "4 gigs"):
        with pytest.raises(GvendiError, match="--memory"):
            parse_bytes(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 19, "8388608TiB"])
def test_sizes_beyond_any_machine(text):
    with pytest.raises(GvendiError, match="--memory must be a size that a machine can have"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "name", ["batch_tokens", "unit_rows", "rows_together", "limit", "max_tokens", "max_row_bytes"]
)
def test_counts_beyond_any_file_are_refused_before_a_folder_is_made(name):
    with pytest.raises(GvendiError, match=f"{name} must be at most 2.62, got {2**62 + 1}"):
        Settings(**{name: 2**62 + 1})


@pytest.mark.parametrize("name", ["unit_rows", "limit", "max_row_bytes"])
def test_the_largest_counts_can_be_used(tmp_path, name):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x y", "completion": "z"}\n')
    settings = Settings(spec=SketchSpec(dim=64), **{name: 2**62})
    for _ in range(2):
        run = sketch_corpus(
            tmp_path / "a.jsonl", tmp_path / "run", load_proxy("tiny", dtype="float32"), settings
        )
        assert run.units_done == 1


def test_center_prints_both_scores_and_takes_a_saved_mean(gvendi, corpus, tmp_path):
    from gvendi_fast.vendi.centered_pool import pool_mean

    folder, _ = corpus
    mean = pool_mean(folder / "run")
    mean.save(tmp_path / "mean.safetensors")
    out = ("--out", tmp_path / "chosen.jsonl", "--force")
    code, text, err = gvendi("select", folder / "run", "--size", 6, *out, "--center", "--json")
    assert code == 0, err
    own = json.loads(text)
    assert own["value"] == own["centered"] != own["gvendi"]
    assert own["centered"] > own["random"]["centered_band"][1]
    assert own["details"]["center"] == {"mean_rows": 40, "left_out": 0, "left_out_given": 0}
    # The pool's own mean, saved.
    saved = ("--center", "--mean", tmp_path / "mean.safetensors")
    code, text, _ = gvendi("select", folder / "run", "--size", 6, *out, *saved, "--json")
    assert {**json.loads(text), "seconds": 0} == {**own, "seconds": 0}
    code, text, _ = gvendi("select", folder / "run", "--size", 6, *out, *saved, "--method", "relaxed")
    assert code == 0
    lines = text.splitlines()
    assert lines[1].startswith("  G-Vendi ")
    assert lines[2].startswith("  centred ")
    assert lines[3].startswith("  no choice of as many rows has a centred G-Vendi above ")
    assert (
        "chosen by their centred G-Vendi, and gain and surprisal are of centred rows: less the mean" in text
    )
    assert "the mean of 40 rows\n" in text
    code, text, _ = gvendi("select", folder / "run", "--size", 6, *out, "--center", "--objective", "facility")
    assert "chosen by facility of centred rows" in text
    assert text.splitlines()[3].startswith("  facility ")
    # Rows of the corpus whose sketch is the mean.
    one = RowMean(64, mean.spec).update(as_pool(folder / "run").take([7]))
    one.save(tmp_path / "one.safetensors")
    saved = ("--center", "--mean", tmp_path / "one.safetensors", "--include", folder / "run")
    code, text, _ = gvendi("select", folder / "run", "--size", 6, *out, *saved)
    assert "of 1 row; 1 row of the pool equal to it left out; 1 row of --include equal to it left out" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--mean", "m"), "--mean 'm' goes with --center"),
        (
            ("--center", "--mean", "m"),
            "--mean: 'm' is not a file; give one that 'gvendi score --save-mean FILE' wrote",
        ),
        (("--center", "--mean", "other.safetensors"), "the mean is of rows of another spec"),
    ],
)
def test_means_that_cannot_be_used(gvendi, corpus, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    RowMean(64, {"proxy": "other"}).update(torch.ones(1, 64)).save("other.safetensors")
    code, out, err = gvendi("select", corpus[0] / "run", "--size", 4, "--out", "chosen.jsonl", *args)
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


GAINS = {
    "vendi": "rise of -tr(A ln A) by this pick, in nats",
    "logdet": "rise of ln det(I + A / eps) by this pick, in nats",
    "facility": "rise by this pick of the mean cosine",
}


@pytest.mark.parametrize("objective", GAINS)
def test_a_gain_says_what_it_is_and_in_which_unit(gvendi, corpus, tmp_path, objective):
    import pyarrow.parquet as pq

    words = (
        "select",
        corpus[0] / "run",
        "--size",
        4,
        "--out",
        tmp_path / "a.jsonl",
        "--objective",
        objective,
    )
    code, text, err = gvendi(*words)
    assert code == 0, err
    assert f"  gain of a row: {GAINS[objective]}" in text
    about = pq.read_schema(tmp_path / "a.parquet").field("gain").metadata[b"description"].decode()
    assert f"  gain of a row: {about}\n" in text
    _, text, _ = gvendi(*words, "--force", "--json")
    assert json.loads(text)["gain_is"] == about


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "tokens", "length"])
def test_quality_may_be_what_the_run_knows_of_each_row(gvendi, corpus, tmp_path, name):
    from gvendi_fast.selection import select

    out = tmp_path / "a.jsonl"
    code, text, err = gvendi(
        "select", corpus[0] / "run", "--size", 4, "--out", out, "--quality", name, "--json"
    )
    assert code == 0, err
    pool = as_pool(corpus[0] / "run")
    wanted = select(pool, 4, "quality", quality=pool.numbers(name))
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == wanted.ids
    assert json.loads(text)["objective"] == "quality"


def test_a_field_of_the_rows_goes_before_a_number_of_the_run(gvendi, tmp_path):
    rows = [
        {"id": f"r{i}", "prompt": f"{i}?", "completion": f"{i}.", "loss": 1 + 99 * (i == 5)} for i in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(spec=SketchSpec(dim=64))
    sketch_corpus(tmp_path / "data.jsonl", tmp_path / "run", load_proxy("tiny", dtype="float32"), settings)
    out = tmp_path / "a.jsonl"
    code, _, err = gvendi("select", tmp_path / "run", "--size", 2, "--out", out, "--quality", "loss")
    assert code == 0, err
    assert json.loads(out.read_text().splitlines()[0])["id"] == "r5"
