"""`gvendi plan`: every figure follows from inputs that say where they come from."""

import json

import pytest

from gvendi_fast.analysis import measured_rate
from gvendi_fast.analysis.corpus_size import BLOCK, BLOCKS, _lines
from gvendi_fast.analysis.planning import (
    ASSUMED,
    COMPUTED,
    DEVICES,
    GIVEN,
    MEASURED,
    MOST_ROWS,
    SCALED,
    STORES,
    Figure,
    Work,
    Worker,
    load_rates,
    plan,
    worker_of,
)
from gvendi_fast.data import stored_sketches
from gvendi_fast.sketching import unit_size

RATES = {
    "sketching": [
        {
            "device": "cpu",
            "model": "small",
            "parameters": 1e6,
            "dtype": "bfloat16",
            "tokens_per_second": 4000.0,
        },
        {
            "device": "cpu",
            "model": "large",
            "parameters": 1e9,
            "dtype": "bfloat16",
            "tokens_per_second": 10.0,
        },
        # 200 TFLOP/s.
        {
            "device": "h200",
            "model": "of a GPU",
            "parameters": 1e9,
            "dtype": "bfloat16",
            "tokens_per_second": 5e4,
        },
    ],
    "reading parts": {"value": 1e8, "unit": "bytes/s", "what": "parts"},
    "products": {"value": 1e10, "unit": "FLOP/s", "what": "products"},
    "indexing": {"value": 1e8, "unit": "bytes/s", "what": "lines"},
    "relaxed": {"most passes": 12},
    "bytes": {
        "beside the sketch": {"value": 76.0, "what": "ids"},
        "a unit in memory": {"value": 300.0, "what": "units"},
        "a row of a pool": {"value": 136.0, "what": "ids"},
    },
}
WHERE = {"machine": "M", "source": "file.json", "commit": "c0ffee"}
for _entry in (*RATES["sketching"], *RATES["bytes"].values()):
    _entry.update(WHERE)
for _name in ("reading parts", "products", "indexing"):
    RATES[_name].update(WHERE)
RATES["sketching"][0]["threads"] = 2


def given(value, unit):
    return Figure(value, unit, GIVEN)


def work(**changed):
    """A million rows of 100 tokens; a worker does 1,000 tokens a second."""
    usual = {
        "rows": given(1e6, "rows"),
        "tokens_per_row": given(100.0, "tokens"),
        "bytes_per_row": given(500.0, "bytes"),
        "parameters": given(1e6, "parameters"),
        "worker": Worker("cpu", given(1000.0, "tokens/s")),
        "workers": 10,
        "dim": 1000,
        "clusters": 500,
    }
    return Work(**{**usual, **changed})


def test_a_plan_worked_by_hand():
    made = plan(work(), RATES)
    found = {name: figure.value for name, figure in made.results.items()}
    assert found["tokens"] == 1e8
    assert found["core hours"] == pytest.approx(1e5 / 3600)
    # 600 rows in a minute, so that a worker that begins its last one late takes so much longer.
    assert (found["a work unit"], found["work units"]) == (600, 1667)
    assert found["wall time"] == pytest.approx(1e4 + 60)
    assert found["sketches"] == 1e6 * (4000 + 76)
    assert found["a part"] == 600 * 4076
    assert (found["objects"], found["changes of a store"], found["a listing"]) == (3334, 8335, 4)
    assert found["units in the driver"] == 1667 * 300
    assert found["pool of a selection"] == 1e6 * (136 + 64)
    assert found["indexing"] == pytest.approx(5e8 / 1e8 / 10)
    score, kmeans, relaxed = made.passes
    # 4.076 GB at 1 GB/s, then 2e12 products at 1e11 a second, over ten workers.
    assert score.seconds.value == pytest.approx(4.076 + 20)
    assert kmeans.seconds.value == pytest.approx(4.076 + 10)
    assert (score.passes, kmeans.passes, relaxed.passes) == (3, 50, 12)
    assert score.seconds.basis == COMPUTED


def test_passes_are_as_they_were_measured():
    measured = {"value": 4e-5, "flops": 2 * 1000**2, "what": "readings", **WHERE}
    rates = {**RATES, "passes": {"score": measured, "clusters": measured}}
    on_gpus = work(worker=Worker("h200", given(1e6, "tokens/s")), clusters=500)
    score, kmeans, relaxed = plan(on_gpus, rates).passes
    # Ten workers with a core each, whatever sketches.
    assert (score.seconds.value, score.seconds.basis) == (pytest.approx(4.0), MEASURED)
    assert (kmeans.seconds.value, kmeans.seconds.basis) == (pytest.approx(2.0), SCALED)
    assert relaxed.seconds.basis == COMPUTED
    assert plan(work(dim=2000), rates).passes[0].seconds.value == pytest.approx(16.0)


def test_stores_take_a_half_and_a_quarter():
    assert tuple(STORES) == stored_sketches.STORES
    sizes = {store: plan(work(store=store), RATES).results["sketches"].value for store in STORES}
    assert sizes == {"float32": 4.076e9, "float16": 2.080e9, "int8": 1.080e9}


def test_a_row_that_takes_long_is_a_work_unit_and_a_part_is_bounded():
    slow = plan(work(tokens_per_row=given(1e6, "tokens")), RATES)
    assert slow.results["a work unit"].value == 1
    assert any("a work unit is one row" in note for note in slow.notes)
    usual = plan(work(worker=Worker("h100", given(1e9, "tokens/s"))), RATES)
    assert usual.results["a work unit"].value == MOST_ROWS == unit_size.MOST_ROWS
    fast = plan(work(worker=Worker("h100", given(1e9, "tokens/s")), unit_seconds=60.0), RATES)
    assert fast.results["a work unit"].value > MOST_ROWS
    assert fast.results["a part"].value <= 1 << 28
    assert "GPU hours" in fast.results


def test_what_breaks_is_said():
    made = plan(work(rows=given(1e9, "rows"), worker=Worker("cpu", given(100.0, "tokens/s"))), RATES)
    said = " ".join(made.notes)
    assert "objects in one folder" in said
    assert "200 GB: select within shards first" in said
    assert not plan(work(), RATES).notes


def test_rates_are_those_of_the_nearest_proxy_and_say_so():
    same, scaled = worker_of("cpu", 1e6, rates=RATES), worker_of("cpu", 2e6, rates=RATES)
    # Of two threads this is the share of one.
    assert (same.rate.value, same.rate.basis) == (2000.0, MEASURED)
    assert (scaled.rate.value, scaled.rate.basis) == (1000.0, SCALED)
    assert worker_of("cpu", 5e8, rates=RATES).rate.value == pytest.approx(20.0)
    assert worker_of("h200", 1e9, rates=RATES).rate.basis == MEASURED
    # As much of its peak as the measured GPU: 200 of 989 TFLOP/s, of 312.
    other = worker_of("a100", 1e9, rates=RATES).rate
    assert (other.value, other.basis) == (pytest.approx(5e4 * 312 / 989), ASSUMED)
    assert "commit c0ffee" in other.source
    assert worker_of("h200", 1e9, utilisation=0.5, rates=RATES).rate.value == pytest.approx(989e12 / 2 / 4e9)


def test_the_rates_of_the_package_are_whole():
    rates = load_rates()
    for device in DEVICES:
        assert plan(work(worker=worker_of(device, 5e8))).results["work units"].value > 0
    entries = [*rates["sketching"], *rates["bytes"].values(), rates["products"]]
    assert all({"machine", "source", "commit", "date"} <= set(entry) for entry in entries)


def _corpus(folder, rows=200):
    path = folder / "data.jsonl"
    lines = (json.dumps({"prompt": f"{i} + 1?", "completion": f"{i + 1}"}) + "\n" for i in range(rows))
    path.write_text("".join(lines))
    return path


def test_of_data(gvendi, tmp_path):
    path = _corpus(tmp_path)
    code, out, err = gvendi("plan", path, "--proxy", "tiny", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    inputs = found["inputs"]
    assert (inputs["rows"]["value"], inputs["rows"]["basis"]) == (200, "measured")
    assert inputs["bytes a row"]["value"] == path.stat().st_size / 200
    assert 5 < inputs["tokens a row"]["value"] < 30
    assert 1e6 < inputs["parameters"]["value"] < 1.3e6
    text = gvendi("plan", path, "--proxy", "tiny", "--tokens", 50)[1]
    assert "core hours  of cpu" in text
    assert "given: --tokens" in text
    assert "of 1,000 tokens" not in text


def test_parquet_says_how_many_rows_it_has_and_an_archive_does_not(gvendi, tmp_path):
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"text": [f"row {i}" for i in range(70)]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    out = gvendi("plan", tmp_path / "a.parquet", "--proxy", "tiny", "--json")[1]
    assert json.loads(out)["inputs"]["rows"]["value"] == 70
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(_corpus(tmp_path).read_bytes()))
    code, _, err = gvendi("plan", packed, "--proxy", "tiny")
    assert code == 1
    assert "give --rows as well" in err
    assert gvendi("plan", packed, "--proxy", "tiny", "--rows", 200)[0] == 0


def test_lines_of_a_large_corpus_are_counted_in_blocks(tmp_path):
    # Small files are read whole, across their borders; of large ones a part.
    files = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for file in files:
        file.write_bytes(b"x" * 99 + b"\n")
    assert _lines(files, [100, 100, 100]) == (3, 300)
    large = tmp_path / "large.jsonl"
    large.write_bytes((b"x" * 255 + b"\n") * ((BLOCK * BLOCKS + BLOCK) // 256))
    lines, read = _lines([large], [large.stat().st_size])
    assert read == BLOCK * BLOCKS
    assert lines == pytest.approx(read / 256, rel=1e-3)


def test_measured_now(gvendi, monkeypatch):
    monkeypatch.setattr(measured_rate, "TIMED_S", 0.0)
    monkeypatch.setattr(measured_rate, "MADE_UP", 4)
    code, out, _ = gvendi("plan", "--rows", 1000, "--tokens", 20, "--proxy", "tiny", "--measure", "--json")
    assert code == 0
    rate = json.loads(out)["inputs"]["rate of a worker"]
    assert rate["basis"] == "measured"
    assert rate["value"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give DATA, or both --rows and --tokens"),
        (("--rows", 10), "give DATA, or both --rows and --tokens"),
        (("--rows", 10, "--tokens", 5, "--proxy-parameters", 5, "--measure"), "leave one of them out"),
        (("--rows", 10, "--tokens", 5, "--tokens-per-second", 5, "--measure"), "three ways to a rate"),
        (
            ("--rows", 10, "--tokens", 5, "--proxy-parameters", 5, "--device", "abacus"),
            "give one of cpu, a100",
        ),
        (
            ("--rows", 10, "--tokens", 5, "--proxy-parameters", 5, "--utilisation", 0.5),
            "share of a GPU's peak",
        ),
        (("--rows", 10, "--tokens", 5, "--proxy-parameters", 5, "--store", "bits"), "wanted one of float32"),
        (("--rows", "inf", "--tokens", 5), "--rows is inf; wanted at most 1e+18"),
        (("--rows", 10, "--tokens", 5, "--row-bytes", 1e300), "--row-bytes is 1e+300; wanted"),
        (("--rows", 10, "--tokens", 5, "--workers", 10**400), "--workers is 1000"),
    ],
)
def test_what_cannot_be_planned(gvendi, words, said):
    code, _, err = gvendi("plan", *words)
    assert code == 1
    assert said in err
