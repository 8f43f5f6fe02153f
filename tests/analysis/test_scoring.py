"""From a file to a score: what is stored, what is refused, groups at equal n, resume and memory."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gvendi_fast.analysis.equal_n import DRAWS
from gvendi_fast.analysis.layers import choose_layers
from gvendi_fast.analysis.scoring import group_scores, score, score_run
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.inspection import InspectionWarning
from gvendi_fast.sketching.proxy.load import load_proxy
from gvendi_fast.vendi import VendiState, gvendi, unlimited_k
from gvendi_fast.vendi.centered import RowMean, centered

SPEC = SketchSpec(dim=256)


@pytest.fixture(scope="module")
def proxy():
    return load_proxy("tiny", dtype="float32")


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def arithmetic(count: int, start: int = 0) -> list[dict]:
    return [
        {"prompt": f"What is {i} plus {7 * i % 13}?", "completion": f"{i} + {7 * i % 13} = {i + 7 * i % 13}"}
        for i in range(start, start + count)
    ]


def test_stored_sketches_are_those_of_the_samples_in_input_order(proxy, tmp_path):
    rows = arithmetic(11)
    # Lengths that differ, so that batches change the order.
    for i, row in enumerate(rows):
        row["completion"] += " because" * (i * 5 % 7)
    data = write(tmp_path / "d.jsonl", rows)
    run = sketch_corpus(data, tmp_path / "run", proxy, Settings(spec=SPEC, unit_rows=4, batch_tokens=128))
    parts = list(run.iterate())
    assert [len(p.ids) for p in parts] == [4, 4, 3]
    assert [i for p in parts for i in p.ids] == [f"{data}:{i + 1}" for i in range(11)]
    from gvendi_fast.data.index import Row
    from gvendi_fast.sketching.proxy.encode import Encoder, collate

    encoder, sketcher = Encoder(proxy.tokenizer, 2048), GradientSketcher(proxy.model, SPEC)
    stored = np.concatenate([p.sketches for p in parts])
    for i, row in enumerate(rows):
        sample = encoder.encode(
            [Row(0, "x", "", "f", 1, prompt=row["prompt"], completion=row["completion"])]
        )[0]
        alone = sketcher.sketch(*collate([sample], 0))
        assert torch.cosine_similarity(alone.z[0], torch.as_tensor(stored[i]), dim=0) > 1 - 1e-6
        part = parts[i // 4]
        assert part.loss[i % 4] == pytest.approx(float(alone.loss[0]), rel=1e-4)
        assert part.tokens[i % 4] == sample.supervised
        assert part.length[i % 4] == sample.length
        assert part.gradient_norm[i % 4] == pytest.approx(float(alone.z[0].norm()), rel=1e-4)


def test_score_is_that_of_the_stored_sketches(proxy, tmp_path):
    data = write(tmp_path / "d.jsonl", arithmetic(40))
    result = score(data, proxy=proxy, out=tmp_path / "run", settings=Settings(spec=SPEC))
    sketches = np.concatenate([p.sketches for p in RunDirectory.load(tmp_path / "run").iterate(["sketch"])])
    assert result.gvendi == pytest.approx(gvendi(sketches), rel=1e-6)
    assert result.entropy == pytest.approx(np.log(result.gvendi))
    assert result.n == 40
    assert 1 <= result.low < result.gvendi < result.high <= 40
    assert result.coverage == 1.0
    assert result.units == (1, 1)
    assert result.tokens_per_second > 0
    again = score(data, proxy=proxy, out=tmp_path / "run", settings=Settings(spec=SPEC))
    assert (again.gvendi, again.low, again.high, again.tokens_per_second) == (
        result.gvendi,
        result.low,
        result.high,
        None,
    )


def test_a_run_directory_is_scored_as_it_is(proxy, tmp_path, monkeypatch):
    settings = Settings(spec=SPEC)
    run = sketch_corpus(arithmetic(20), tmp_path / "run", proxy, settings)
    wanted = score_run(run).to_dict()

    def load(*_):
        raise AssertionError("no proxy is needed")

    monkeypatch.setattr("gvendi_fast.analysis.scoring.load_proxy", load)
    for given in (run, tmp_path / "run", str(tmp_path / "run"), [tmp_path / "run"]):
        assert score(given).to_dict() == wanted
    assert score(run, proxy="tiny", orders=[2]).orders == score_run(run, orders=[2]).orders
    for more, said in (
        ({"out": tmp_path / "other"}, "out does not go with a run directory"),
        ({"settings": Settings()}, "settings does not go with a run directory"),
        ({"proxy": "some/other"}, "proxy is 'some/other', but the sketches of .* were made with 'tiny'"),
        ({"by": "source"}, "was sketched without --by"),
    ):
        with pytest.raises(GvendiError, match=said):
            score(run, **more)


def test_a_warning_of_the_rows_names_the_line_that_gave_them(proxy, tmp_path):
    rows = [{"prompt": "What?", "completion": "So."}] * 9
    with pytest.warns(InspectionWarning, match="are copies of another one") as caught:
        score(rows, proxy=proxy, settings=Settings(spec=SPEC))
    assert {item.filename for item in caught} == {__file__}
    assert all(item.lineno > 1 for item in caught)


def test_repeated_rows_score_as_the_distinct_ones(proxy, tmp_path):
    rows = arithmetic(30)
    once = score(write(tmp_path / "a.jsonl", rows), proxy=proxy, settings=Settings(spec=SPEC))
    thrice = score(write(tmp_path / "b.jsonl", rows * 3), proxy=proxy, settings=Settings(spec=SPEC))
    assert thrice.n == 90
    assert thrice.gvendi == pytest.approx(once.gvendi, rel=1e-5)
    same = score(write(tmp_path / "c.jsonl", rows[:1] * 20), proxy=proxy, settings=Settings(spec=SPEC))
    assert same.gvendi == pytest.approx(1, abs=1e-4)


def test_rejected_rows_are_listed_and_the_run_goes_on(proxy, tmp_path):
    rows = arithmetic(6)
    rows[1] = "{broken"
    rows[3] = {"prompt": "q", "completion": ""}
    rows[4] = {"prompt": "q", "completion": "long " * 400}
    data = write(tmp_path / "d.jsonl", rows)
    result = score(data, proxy=proxy, out=tmp_path / "r", settings=Settings(spec=SPEC, max_tokens=100))
    assert (result.n, result.rejected) == (3, 3)
    listed = [json.loads(line) for line in (tmp_path / "r" / "rejected.jsonl").read_text().splitlines()]
    assert [item["line"] for item in listed] == [2, 4, 5]
    assert listed[0]["reason"].startswith("broken JSON")
    assert listed[2]["reason"].startswith("too long")


@pytest.mark.parametrize(("allowed", "fails"), [(2, False), (1, True), (0.5, False), (0.2, True)])
def test_max_rejected_ends_the_run_and_keeps_what_was_done(proxy, tmp_path, allowed, fails):
    rows = arithmetic(6)
    rows[0] = rows[5] = "{broken"
    data = write(tmp_path / "d.jsonl", rows)
    settings = Settings(spec=SPEC, unit_rows=2, max_rejected=allowed)
    if not fails:
        assert sketch_corpus(data, tmp_path / "r", proxy, settings).units_done == 3
        return
    with pytest.raises(
        GvendiError, match=r"2 rows are rejected and --max-rejected allows 1(.|\n)*d\.jsonl:1: broken"
    ):
        sketch_corpus(data, tmp_path / "r", proxy, settings)
    assert len(list((tmp_path / "r" / "parts").glob("*.parquet"))) == 3


def test_gradients_that_are_zero_or_not_finite_are_rejected_by_name(proxy, tmp_path, monkeypatch):
    plain = GradientSketcher.sketch

    def spoiled(self, input_ids, labels, attention_mask=None):
        got = plain(self, input_ids, labels, attention_mask)
        lengths = attention_mask.sum(dim=1)
        got.z[lengths == lengths.max()] = 0
        got.z[lengths == lengths.min()] = float("nan")
        return got

    monkeypatch.setattr(GradientSketcher, "sketch", spoiled)
    rows = arithmetic(5)
    rows[1]["completion"], rows[3]["completion"] = "a much longer answer than all of the others have", "1"
    data = write(tmp_path / "d.jsonl", rows)
    result = score(data, proxy=proxy, out=tmp_path / "r", settings=Settings(spec=SPEC))
    assert (result.n, result.rejected) == (3, 2)
    listed = [json.loads(line) for line in (tmp_path / "r" / "rejected.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in listed] == [(2, "zero gradient"), (4, "non-finite gradient")]


def test_a_corpus_without_one_usable_row_is_an_error(proxy, tmp_path):
    data = write(tmp_path / "d.jsonl", ["{broken", "[]"])
    with pytest.raises(GvendiError, match=r"no row of .* could be scored, 2 were rejected"):
        score(data, proxy=proxy, out=tmp_path / "r", settings=Settings(spec=SPEC))


def test_a_model_with_broken_weights_is_refused(tmp_path):
    broken = load_proxy("tiny", dtype="float32")
    with torch.no_grad():
        broken.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(GvendiError, match="logits are not finite"):
        sketch_corpus(write(tmp_path / "d.jsonl", arithmetic(1)), tmp_path / "r", broken)


def test_groups_are_compared_at_equal_n(proxy, tmp_path):
    varied = [{**r, "meta": {"kind": "varied"}} for r in arithmetic(50)]
    narrow = [{**r, "meta": {"kind": "narrow"}} for r in arithmetic(2) * 20]
    few = [{**r, "meta": {"kind": "few"}} for r in arithmetic(3)]
    data = write(tmp_path / "d.jsonl", varied + narrow + few)
    result = score(data, proxy=proxy, out=tmp_path / "r", settings=Settings(spec=SPEC), by="meta.kind")
    assert {k: (v.n, v.rows) for k, v in result.by.items()} == {
        "few": (0, 3),
        "narrow": (40, 40),
        "varied": (40, 50),
    }
    assert {k: v.draws for k, v in result.by.items()} == {"few": 0, "narrow": 1, "varied": DRAWS}
    assert result.by["few"].gvendi is None
    # Two kinds of rows in equal numbers: of 40 others, the numbers would differ.
    assert 1 < result.by["narrow"].low < result.by["narrow"].gvendi
    assert result.by["varied"].low < result.by["varied"].gvendi < result.by["varied"].high
    assert result.by["varied"].gvendi > 1.2 * result.by["narrow"].gvendi
    run = RunDirectory.load(tmp_path / "r")
    part = next(run.iterate())
    narrow_rows = part.sketches[[i for i, g in enumerate(part.groups) if g == "narrow"]]
    assert result.by["narrow"].gvendi == pytest.approx(gvendi(narrow_rows))
    own = RowMean(SPEC.dim, run.sketch_spec).update(part.sketches)
    assert group_scores(run, 0, own) == result.by
    # Without a reference nothing is centred, and all else is the same.
    plain = {name: replace(score, centered=None) for name, score in result.by.items()}
    assert group_scores(run, seed=0) == plain
    assert result.by["narrow"].centered == pytest.approx(centered(narrow_rows, own).value, rel=1e-4)
    state = VendiState(SPEC.dim).update(narrow_rows)
    of = unlimited_k(state, distinct=len(np.unique(narrow_rows, axis=0)))
    # Draws are scored in float32.
    assert result.by["narrow"].unlimited_k == pytest.approx(of.value, rel=1e-4)
    assert group_scores(run, seed=1)["varied"].gvendi != result.by["varied"].gvendi
    shown = json.loads(json.dumps(result.to_dict()))["by"]
    assert shown["few"]["gvendi"] is None
    assert set(shown["varied"]) == set(vars(result.by["varied"]))
    assert shown["varied"]["low"] == result.by["varied"].low


def test_other_orders_stand_beside_order_1(proxy, tmp_path):
    data = write(tmp_path / "d.jsonl", arithmetic(20))
    result = score(
        data, proxy=proxy, out=tmp_path / "r", settings=Settings(spec=SPEC), orders=[0.5, 2.0, np.inf]
    )
    sketches = np.concatenate([p.sketches for p in RunDirectory.load(tmp_path / "r").iterate(["sketch"])])
    wanted = {"0.5": gvendi(sketches, 0.5), "2": gvendi(sketches, 2), "inf": gvendi(sketches, np.inf)}
    assert result.orders == pytest.approx(wanted, rel=1e-4)
    assert result.orders["0.5"] > result.gvendi > result.orders["2"] > result.orders["inf"] > 1
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["orders"] == result.orders
    with pytest.raises(GvendiError, match=r"orders holds 0.*wanted orders above 0"):
        score(data, proxy=proxy, orders=[2, 0])


@pytest.mark.parametrize("kind", ["one row", "copies", "one group", "few", "many"])
def test_every_score_is_json_of_finite_numbers(proxy, tmp_path, kind):
    rows = {"one row": arithmetic(1), "copies": arithmetic(1) * 20, "many": arithmetic(70)}.get(
        kind, arithmetic(9)
    )
    data = write(tmp_path / "d.jsonl", [{**row, "kind": "all"} for row in rows])
    by = "kind" if kind == "one group" else None
    result = score(data, proxy=proxy, settings=Settings(spec=SketchSpec(dim=64)), by=by)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert set(values) == {*vars(result), "units_done", "units_total"} - {"units"}
    assert (values["growth"] is None) == (len(rows) < 16)
    assert values["unlimited_k"]["low"] <= values["unlimited_k"]["value"] <= values["unlimited_k"]["high"]
    assert 1 <= values["low"] <= values["gvendi"] <= values["high"] <= len(rows) * (1 + 1e-9)
    assert all(isinstance(sentence, str) for sentence in values["limits"])
    if kind in ("one row", "copies"):
        assert values["centered"]["value"] is None
        assert "so nothing is left of" in values["centered"]["why_not"]
    if kind == "one group":
        assert values["by"]["all"]["gvendi"] == pytest.approx(values["gvendi"], rel=1e-6)
        assert values["by"]["all"]["unlimited_k"] == pytest.approx(values["unlimited_k"]["value"], rel=1e-6)
        assert values["by"]["all"]["centered"] == pytest.approx(values["centered"]["value"], rel=1e-6)


def test_by_must_be_the_field_that_was_sketched(proxy, tmp_path):
    data = write(tmp_path / "d.jsonl", arithmetic(3))
    run = sketch_corpus(data, tmp_path / "r", proxy, Settings(spec=SPEC))
    with pytest.raises(GvendiError, match="was sketched without --by"):
        score_run(run, by="source")


def test_other_settings_are_refused_with_both_values(proxy, tmp_path):
    data = write(tmp_path / "d.jsonl", arithmetic(3))
    sketch_corpus(data, tmp_path / "r", proxy, Settings(spec=SPEC))
    with pytest.raises(GvendiError, match=r"seed(.|\n)*0(.|\n)*5"):
        sketch_corpus(data, tmp_path / "r", proxy, Settings(spec=SketchSpec(dim=256, seed=5)))


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_tokens": 0},
        {"limit": 0},
        {"unit_rows": -1},
        {"rows_together": 0},
        {"max_rejected": -1},
        {"max_rejected": 1.5},
    ],
)
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(GvendiError, match=next(iter(bad))):
        Settings(**bad)


def test_more_tokens_than_the_proxy_reads_are_refused(proxy, tmp_path):
    data = write(tmp_path / "d.jsonl", arithmetic(1))
    with pytest.raises(GvendiError, match="max_tokens is 100000, but the proxy 'tiny' reads at most"):
        sketch_corpus(data, tmp_path / "r", proxy, Settings(spec=SPEC, max_tokens=100000))


def test_a_mean_that_does_not_fit_is_refused_before_a_row_is_sketched(proxy, tmp_path):
    data = write(tmp_path / "data.jsonl", arithmetic(4))
    other = RowMean.of_vector(torch.ones(256) / 16, 4, {"sketch": "of something else"})
    with pytest.raises(GvendiError, match="the mean is of rows of another spec"):
        score(data, proxy=proxy, out=tmp_path / "out", settings=Settings(spec=SPEC), mean=other)
    assert not (tmp_path / "out").exists()


def test_where_a_mean_cannot_be_saved_nothing_is_sketched_and_no_file_replaced(proxy, tmp_path):
    data = write(tmp_path / "data.jsonl", arithmetic(4))
    before = data.read_bytes()
    for path, words in [
        (tmp_path / "nowhere" / "mean", "does not exist; make it first"),
        (tmp_path, "a folder; give the name of a file"),
        (data, "exists and holds no mean"),
    ]:
        with pytest.raises(GvendiError, match=words):
            score(data, proxy=proxy, out=tmp_path / "out", settings=Settings(spec=SPEC), save_mean=path)
    assert not (tmp_path / "out").exists()
    assert data.read_bytes() == before
    mean = tmp_path / "mean.safetensors"
    for _ in range(2):
        found = score(data, proxy=proxy, out=tmp_path / "out", settings=Settings(spec=SPEC), save_mean=mean)
    # Its own mean, read back, gives the same value.
    again = score_run(RunDirectory.load(tmp_path / "out"), mean=RowMean.load(mean))
    assert again.centered.value == pytest.approx(found.centered.value, rel=1e-6)


def test_a_work_unit_without_a_usable_row_is_finished_with_sketches_by_group_too(proxy, tmp_path):
    # The last of three work units has refused rows alone.
    data = write(tmp_path / "data.jsonl", [*arithmetic(4), "{}", "{}"])
    settings = Settings(spec=SPEC, unit_rows=2, groups="kind-and-half")
    run = sketch_corpus(data, tmp_path / "out", proxy, settings)
    assert (run.units_done, run.units_total) == (3, 3)
    assert score_run(run).n == 4
    chosen = score_run(choose_layers(run, "no-embedding-or-head"))
    assert (chosen.n, chosen.rejected) == (4, 2)
