"""The report: its numbers against their definitions, hostile texts, odd runs, and the page in a browser."""

import datetime
import hashlib
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pages import Page, check_in_browser

from gvendi_fast.analysis.equal_n import group_scores, pooled_sentence, saturation_sentence
from gvendi_fast.analysis.scoring import score_run
from gvendi_fast.analysis.set_numbers import Sample
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.shown import number
from gvendi_fast.clusters.kmeans import SphericalKMeans
from gvendi_fast.data import texts
from gvendi_fast.data.index import Fields
from gvendi_fast.data.pool import MatrixPool, as_pool
from gvendi_fast.data.rows import Rejected
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.data.run_files import write_warnings
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.report import figures, numbers, page
from gvendi_fast.report.data import _spectral, rejected_reasons, report_data
from gvendi_fast.report.page import render, write_report
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy
from gvendi_fast.vendi import VendiState, gvendi, jackknife

DAY = datetime.date(2020, 2, 29)
FIGURES = ("growth", "layers", "groups", "map", "clusters", "surprisal", "duplicates", "rejected", "spectrum")
HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>",
    "{{ 7 * 191 }} {% for x in y %} {# gone? #} ${7 * 191}",
    "\u202eright to left\u202c שלום עולם, مرحبا",
    "bell \x07, escape \x1b[31m, null \x00, delete \x7f",
    "</p></section></main></body></html> &amp; \"quoted\" 'too' $x^2$",
    "x" * 30_000,
    "数学 🎲 e\u0301 " + "\u0336" * 20,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDirectory:
    """126 rows of three groups under the tiny proxy: 20 repeated ones, some hostile, 6 more that are rejected."""
    folder = tmp_path_factory.mktemp("report")
    rows = [
        {
            "prompt": f"What is {i} plus {7 * i % 13}?" + " Say why." * (i % 3),
            "completion": f"{i} + {7 * i % 13} = {i + 7 * i % 13}" + " because" * (i % 5),
            "meta": {"kind": "sum"},
        }
        for i in range(60)
    ]
    words = "red blue green tall small old young round kind quick".split()
    rows += [
        {
            "prompt": f"Who is {a}?",
            "completion": f"The {a} {b} one, not the {b} one.",
            "meta": {"kind": "<b onclick='window.hacked=3'>who</b> {{ 7 * 191 }}"},
        }
        for a in words
        for b in words[:4]
    ]
    rows += [{**rows[i], "id": f"again {i}"} for i in range(20)]
    rows += [
        {"id": f"<i>{text[:40]}", "prompt": text[:200], "completion": text, "meta": {"kind": HOSTILE[4]}}
        for text in HOSTILE[:5] + HOSTILE[6:]
    ]
    rows += [{"prompt": "<u>q</u>", "completion": "", "meta": {"kind": "sum"}}] * 2
    rows += [{"prompt": "q", "completion": HOSTILE[5]}] * 3
    lines = [json.dumps(row) for row in rows] + ["{<script>window.hacked = 4</script>"]
    (folder / "d.jsonl").write_text("\n".join(lines) + "\n")
    settings = Settings(spec=SketchSpec(dim=256), fields=Fields(by="meta.kind"), unit_rows=64, max_tokens=300)
    return sketch_corpus(folder / "d.jsonl", folder / "run", load_proxy("tiny", dtype="float32"), settings)


@pytest.fixture(scope="module")
def data(run) -> dict:
    return report_data(run, clusters=13)


@pytest.fixture(scope="module")
def written(data, tmp_path_factory) -> tuple[Path, Path]:
    """The report of `data` as files."""
    return write_report(data, tmp_path_factory.mktemp("written") / "page.html", date=DAY)


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures, which take most of the time, for tests of words."""
    blank = dict.fromkeys(page._FIGURES, lambda numbers: {"wide": "", "narrow": ""})
    monkeypatch.setattr(page, "_FIGURES", blank)


@pytest.fixture(scope="module")
def rows(run) -> np.ndarray:
    found = np.concatenate([part.sketches for part in run.iterate(["sketch"])]).astype(np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def made_run(path: Path, sketches: np.ndarray, groups: list[str] | None = None, **manifest) -> RunDirectory:
    """A run directory of these sketches, whose corpus is nowhere."""
    n, dim = sketches.shape
    spec = {
        "sketch": {"dim": dim, "kind": "hadamard"},
        "coverage": {"sketched": 1, "total": 1},
        "proxy": {"name": "none"},
        "dtype": "float32",
    }
    fields = vars(Fields(by="kind" if groups else None))
    source = {"path": "nowhere.jsonl", "kind": "jsonl", "size": 1, "rows": n, "digest": ""}
    whole = {"units_total": 1, "rows": n, "limit": None, "fields": fields, "files": [source]} | manifest
    made = RunDirectory.open(path, spec, whole)
    ones = np.ones(n)
    made.write_part(
        Part(
            0,
            ids=[f"row {i}" for i in range(n)],
            groups=groups or [""] * n,
            rows=np.arange(n),
            sketches=sketches,
            tokens=ones,
            length=ones,
            loss=ones,
            gradient_norm=ones,
        )
    )
    return made


def drawn(n: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def test_scores_and_spectrum_are_those_of_the_sketches(data, rows):
    n = len(rows)
    interval = jackknife(VendiState(256).update(rows), rows)
    score = data["score"]
    assert (score["n"], score["dim"], score["rejected"]) == (n, 256, 6)
    assert score["gvendi"] == pytest.approx(gvendi(rows), rel=1e-5)
    assert [score["low"], score["high"]] == pytest.approx([interval.low, interval.high], rel=1e-4)
    wanted = np.linalg.eigvalsh(rows.T @ rows / n)[::-1]
    found = np.array(data["spectrum"]["eigenvalues"])
    assert found == pytest.approx(wanted[: len(found)], abs=1e-6)
    assert len(found) <= n
    held = np.cumsum(wanted)
    for entry in data["spectrum"]["effective"]:
        assert held[entry["count"] - 1] >= entry["share"] - 1e-5 > held[entry["count"] - 2] - 2e-5


def test_surprisal_is_its_definition(data, rows):
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    wanted = ((rows @ vectors) ** 2 * -np.log(np.maximum(values, 2.0**-52))).sum(axis=1)
    found = data["surprisal"]
    assert found["mean"] == pytest.approx(data["score"]["entropy"], rel=1e-5)
    assert [e["surprisal"] for e in found["most"]] == pytest.approx(np.sort(wanted)[::-1][:10], rel=1e-4)
    assert [e["surprisal"] for e in found["least"]] == pytest.approx(np.sort(wanted)[:10], rel=1e-4)
    for entry in (*found["most"], *found["least"]):
        assert entry["surprisal"] == pytest.approx(wanted[entry["row"]], rel=1e-4)
    assert sum(found["counts"]) == len(rows)
    assert found["edges"][0] == pytest.approx(wanted.min(), rel=1e-4)


def test_growth_ends_in_the_points_of_the_score_behind_the_beginnings_of_five_orders(run, data, rows):
    n, points = len(rows), data["growth"]["points"]
    assert [p["n"] for p in points] == [7, 15, 32, 40, 64, 126]
    key = [hashlib.blake2b(f"growth|0|{draw}".encode(), digest_size=16).digest() for draw in range(5)]
    orders = [
        np.random.Philox(key=int.from_bytes(k, "little")).random_raw(n).argsort(kind="stable") for k in key
    ]
    for point in (points[0], points[1], points[3]):
        values = [gvendi(rows[order[: point["n"]]]) for order in orders]
        assert point["mean"] == pytest.approx(np.mean(values), rel=1e-5)
        assert [point["low"], point["high"], point["draws"]] == pytest.approx(
            [min(values), max(values), 5], rel=1e-5
        )
    known = score_run(run).growth
    assert [points[2], points[4]] == [vars(point) for point in known.points[:-1]]
    assert points[-1]["mean"] == data["score"]["gvendi"]
    assert data["growth"]["half"] == 64
    assert data["growth"]["last_doubling"] == pytest.approx(points[-1]["mean"] / points[-2]["mean"] - 1)
    assert data["growth"]["forecast"] == vars(known.forecast)
    assert data["growth"]["forecast"]["n"] == 252


def test_the_numbers_of_a_report_are_those_of_the_score(gvendi, run, written):
    """All that `gvendi score --json` says, but for what only a run of it can know."""
    code, out, error = gvendi("score", run.path, "--json", "--by", "meta.kind")
    assert code == 0, error
    score, report = json.loads(out), json.loads(written[1].read_text())
    elsewhere = {"by", "seconds", "tokens_per_second", "rejected_by_reason", "rejected_sizes", "orders"}
    assert {name: report["score"].pop(name, None) for name in set(score) - elsewhere} == {
        name: score[name] for name in set(score) - elsewhere
    }
    assert set(report["score"]) == {"limit"}
    groups = {group["group"]: group for group in report["groups"]["groups"]}
    assert {name: {key: groups[name][key] for key in by} for name, by in score["by"].items()} == score["by"]


def test_the_page_shows_the_numbers_of_its_json(data, undrawn):
    text = " ".join(" ".join(Page(render(data)).words).split())
    score = data["score"]
    of, ahead = score["unlimited_k"], data["growth"]["forecast"]
    for words in (
        f"95 % interval {number(score['low'])} to {number(score['high'])} for another 126 rows",
        f"95 % interval {number(of['low'])} to {number(of['high'])}: what exact gradients",
        f"are expected to score {number(ahead['value'])} "
        f"(95 % band {number(ahead['low'])} to {number(ahead['high'])})",
        f"without the first direction {number(score['diagnosis']['without_first'])}",
        f"centred (without the mean) {number(score['centered']['value'])}",
        f"{score['growth']['why_not']}.",
        "Squared gradient norm by kind of layer",
        *(sentence[1:] for sentence in score["limits"]),
    ):
        assert words in text
    assert score["limits"]
    for group in data["groups"]["groups"][:2]:
        assert (
            f"95 % interval {number(group['low'])} to {number(group['high'])} · unlimited K "
            f"{number(group['unlimited_k'])} · centred {number(group['centered'])}"
        ) in text


def test_fewer_rows_than_k_are_scored_without_a_matrix_of_k(tmp_path, monkeypatch):
    """The numbers are those of the K x K matrix, which at K = 8192 takes minutes."""
    rows = drawn(40, 64)
    found = report_data(made_run(tmp_path / "r", rows), clusters=2)
    monkeypatch.setattr(Sample, "of_rows", None)
    wide = made_run(tmp_path / "w", np.tile(rows, (2, 1)))
    state, pool = _spectral(as_pool(wide))
    assert (state.dim, pool.dim) == (64, 64)
    whole, small = state.spectrum().numpy(), np.array(found["spectrum"]["eigenvalues"])
    assert small == pytest.approx(whole[: len(small)], abs=1e-6)
    surprisal = numbers.surprisal(pool, state)[1]
    assert found["surprisal"]["most"][0]["surprisal"] == pytest.approx(
        surprisal["most"][0]["surprisal"], rel=1e-4
    )
    assert found["surprisal"]["mean"] == pytest.approx(surprisal["mean"], rel=1e-5)


def test_groups_are_those_of_the_score_with_their_parts_of_the_entropy(run, data, rows):
    groups, wanted = data["groups"]["groups"], group_scores(run)
    assert data["groups"]["field"] == "meta.kind"
    assert {g["group"]: (g["gvendi"], g["low"], g["high"], g["n"], g["rows"]) for g in groups} == {
        name: (g.gvendi, g.low, g.high, g.n, g.rows) for name, g in wanted.items()
    }
    compared = [g["gvendi"] for g in groups if g["gvendi"] is not None]
    assert len(compared) == 2
    assert compared == sorted(compared, reverse=True)
    assert [g["gvendi"] for g in groups[2:]] == [None]
    assert data["groups"]["notes"] == [
        pooled_sentence(wanted),
        *filter(None, [saturation_sentence(compared, groups[0]["n"], 256)]),
    ]
    assert sum(g["entropy_share"] for g in groups) == pytest.approx(1)
    state = VendiState(256).update(rows)
    names = np.array(as_pool(run).groups, dtype=object)
    for group in groups:
        mean = float(state.contributions(rows[names == group["group"]]).mean())
        assert group["surprisal"] == pytest.approx(mean, rel=1e-4)
        assert group["entropy_share"] == pytest.approx(group["row_share"] * mean / state.entropy(), rel=1e-4)
    assert data["groups"]["mixed"] == data["growth"]["points"][3]


def test_clusters_are_those_of_spherical_k_means(run, data, rows):
    model = SphericalKMeans(13, seed=0).fit(run)
    label = model.assign(run).label.numpy()
    found = data["clusters"]
    assert found["sizes"] == np.bincount(label, minlength=13).tolist()
    assert (len(found["largest"]), len(found["sparsest"])) == (5, 5)
    sizes = [c["size"] for c in (*found["largest"], *found["sparsest"])]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (max(found["sizes"]), min(found["sizes"]))
    assert found["sparse_rows"] == sum(sorted(found["sizes"])[:6])
    for cluster in (*found["largest"], *found["sparsest"]):
        members = np.flatnonzero(label == cluster["cluster"])
        cosine = rows[members] @ model.centroids[cluster["cluster"]].double().numpy()
        assert cluster["mean_cosine"] == pytest.approx(cosine.mean(), rel=1e-5)
        assert [r["cosine"] for r in cluster["rows"]] == pytest.approx(np.sort(cosine)[::-1][:3], rel=1e-5)
        assert {r["row"] for r in cluster["rows"]} <= set(members.tolist())


def test_map_is_the_first_two_principal_components(run, data, rows):
    centred = rows - rows.mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    for axis, name in enumerate("xy"):
        assert np.abs(data["map"][name]) == pytest.approx(np.abs(centred @ axes[axis]), abs=1e-5)
        share = values[axis] ** 2 / (values**2).sum()
        assert data["map"]["shares"][axis] == pytest.approx(share, rel=1e-4)
    names = as_pool(run).groups
    colours = data["map"]["colours"]
    assert [colours[c] for c in data["map"]["colour"]] == names


def test_large_runs_get_a_map_of_drawn_rows_and_clusters_fitted_to_some(undrawn, monkeypatch, tmp_path):
    monkeypatch.setattr(numbers, "MAP_POINTS", 50)
    monkeypatch.setattr(numbers, "CLUSTER_ROWS", 60)
    monkeypatch.setattr(numbers, "DUPLICATE_ROWS", 100)
    found = report_data(made_run(tmp_path / "r", drawn(200, 16)), clusters=4)
    assert (len(found["map"]["x"]), found["map"]["of"]) == (50, 200)
    assert len(set(found["map"]["ids"])) == 50
    assert (found["clusters"]["fitted_rows"], sum(found["clusters"]["sizes"])) == (60, 200)
    assert found["duplicates"] is None
    page = render(found)
    assert "50 rows drawn at random from 200" in page
    assert "centroids from 60 rows drawn at random" in page
    assert "which 200 rows are too many for" in page


def test_near_duplicates_are_counted_once_each(data, rows):
    near = rows @ rows.T >= 0.99
    np.fill_diagonal(near, False)
    assert data["duplicates"]["rows"] == near.any(axis=1).sum()
    assert data["duplicates"]["repeats"] == np.tril(near).any(axis=1).sum() >= 20
    assert sum(data["duplicates"]["counts"]) == len(rows)
    for family in data["duplicates"]["families"]:
        first, second = (row["row"] for row in family["rows"])
        assert first < second
        assert near[first, second]
    blocks = np.repeat(drawn(5, 16), 3, axis=0)
    found = numbers.duplicates(as_pool(blocks))
    assert (found["rows"], found["repeats"]) == (15, 10)
    assert [(f["size"], [r["row"] for r in f["rows"]]) for f in found["families"]] == [
        (3, [3 * i, 3 * i + 1]) for i in range(5)
    ]


def test_near_duplicates_do_not_depend_on_the_block(monkeypatch):
    rows = np.concatenate([drawn(20, 32), drawn(20, 32), drawn(30, 32, seed=1)])
    whole = numbers.duplicates(as_pool(rows))
    monkeypatch.setattr(numbers, "DUPLICATE_BLOCK", 7)
    parts = numbers.duplicates(as_pool(rows))
    assert (parts["rows"], parts["repeats"], parts["families"]) == (40, 20, whole["families"])


def test_rejected_rows_are_counted_by_kind_of_reason(data):
    found = {kind["reason"]: kind["count"] for kind in data["rejected"]["reasons"]}
    assert found == {"too long (--max-tokens is 300)": 3, "empty completion": 2, "broken JSON": 1}
    assert [len(kind["examples"]) for kind in data["rejected"]["reasons"]] == [3, 2, 1]
    assert data["rejected"]["count"] == 6
    ids = [Rejected("f", i, f"duplicate id 'a:{i}' (first at f:{i})", f"a:{i}") for i in range(9)]
    kinds = rejected_reasons(iter(ids))["reasons"]
    assert [(kind["reason"], kind["count"], len(kind["examples"])) for kind in kinds] == [
        ("duplicate id", 9, 3)
    ]


def test_rows_come_with_the_text_of_the_corpus(run, data):
    lines = [
        json.loads(line) for line in Path(run.manifest["files"][0]["path"]).read_text().splitlines()[:-1]
    ]
    assert data["texts_missing"] is None
    named = list(numbers.row_numbers(data))
    assert len(named) > 40
    for entry in named:
        source = lines[entry["row"]]
        assert entry["group"] == source["meta"]["kind"]
        assert entry["id"] == source.get("id", f"{run.manifest['files'][0]['path']}:{entry['row'] + 1}")
        for part in entry["text"]:
            assert part["text"] == source[part["role"]][:4000]
            assert part["length"] == len(source[part["role"]])


def test_long_texts_are_cut_and_say_so(undrawn, run, monkeypatch):
    monkeypatch.setattr(texts, "TEXT", 12)
    found = report_data(run)
    parts = [part for entry in numbers.row_numbers(found) for part in entry["text"]]
    assert {len(part["text"]) for part in parts if part["length"] > 12} == {12}
    longest = max(part["length"] for part in parts)
    assert f"… and {longest - 12} more characters in the corpus" in render(found)


def test_what_users_wrote_is_text_and_nothing_else(undrawn, data):
    # The hostile rows are few: every place that shows rows gets all of them.
    hostile = [
        {
            "row": i,
            "surprisal": 1.0,
            "id": text,
            "group": text,
            "text": [{"role": text, "text": text, "length": len(text)}],
        }
        for i, text in enumerate((*HOSTILE, ""))
    ]
    spoiled = json.loads(json.dumps(data))
    spoiled["surprisal"]["most"] = hostile
    spoiled["map"]["colours"] = [*HOSTILE[:6], ""]
    spoiled["rejected"]["reasons"][0]["examples"] = [
        {"file": text, "line": 1, "id": text, "reason": text} for text in HOSTILE
    ]
    page = render(spoiled, title=HOSTILE[0] + HOSTILE[4])
    seen = Page(page)
    assert not seen.tags & {"script", "img", "b onclick", "iframe", "object", "embed", "form", "i", "u"}
    assert not any(name.startswith("on") for name in seen.attributes)
    words = "".join(seen.words)
    for text in (*HOSTILE[:2], HOSTILE[4], HOSTILE[6], "\\u202eright to left\\u202c שלום"):
        assert text in words
    assert "bell \\x07, escape \\x1b[31m, null \\x00, delete \\x7f" in words
    assert "1337" not in words
    assert "(empty)" in words
    assert not set(page) & set(map(chr, (*range(9), 11, *range(13, 32), *range(127, 160))))


def test_the_same_run_gives_the_same_bytes(run, data, written, tmp_path):
    again = report_data(RunDirectory.load(run.path), clusters=13)
    for one, other in zip(written, write_report(again, tmp_path / "b" / "b.html", date=DAY), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert json.loads(written[1].read_text()) == json.loads(json.dumps(data))
    assert "2020-02-29" in written[0].read_text()
    other = report_data(run, clusters=13, seed=1)
    assert other["score"]["gvendi"] == data["score"]["gvendi"]
    assert other["growth"]["points"] != data["growth"]["points"]


def test_a_users_matplotlibrc_changes_nothing(data, written):
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        assert render(data, date=DAY) == written[0].read_text()


@pytest.mark.parametrize(
    ("sketches", "groups"),
    [
        (drawn(1, 16), None),
        (drawn(2, 16), ["a", "b"]),
        pytest.param(drawn(3, 16), None, marks=pytest.mark.soak),
        (np.repeat(drawn(1, 16), 40, axis=0), ["a"] * 20 + ["b"] * 20),
        (np.eye(16, dtype=np.float32), None),
        (drawn(300, 8), None),
        pytest.param(drawn(2000, 16), [f"group {i % 1000}" for i in range(2000)], marks=pytest.mark.soak),
    ],
    ids=["one row", "two rows", "three rows", "all equal", "all orthogonal", "no groups", "1000 groups"],
)
def test_odd_runs_have_a_report(tmp_path, sketches, groups):
    run = made_run(tmp_path / "r", sketches, groups)
    found = report_data(run, clusters=min(len(sketches), 20))
    page, numbers = write_report(found, tmp_path / "r.html")
    assert json.loads(numbers.read_text())["score"]["n"] == len(sketches)
    # Runs without shares by kind of layer are those of earlier versions.
    shown = set(FIGURES) - {"rejected", "layers"} - ({"groups"} if groups is None else set())
    shown -= {"map"} if len(sketches) < 3 else set()
    shown -= {"duplicates"} if len(sketches) < 2 else set()
    assert {name for name in FIGURES if f'data-figure="{name}"' in page.read_text()} == shown
    assert "None: every row that was read is in the score." in page.read_text()


def test_many_groups_show_both_ends_and_list_all(undrawn, tmp_path):
    found = report_data(made_run(tmp_path / "r", drawn(400, 16), [f"<{i % 100:02d}>" for i in range(400)]))
    page = render(found)
    assert len(found["groups"]["groups"]) == 100
    names = [group["group"] for group in found["groups"]["groups"]]
    for name in (*names[:20], *names[-20:]):
        assert f'data-group="&lt;{name[1:3]}&gt;"' in page
    assert page.count("data-group=") == 40
    assert "60 groups between these are in the JSON file" in page


def test_small_groups_are_compared_together_and_the_page_says_so(undrawn, tmp_path):
    groups = ["large"] * 40 + [f"small {i % 5}" for i in range(40)]
    found = report_data(made_run(tmp_path / "r", drawn(80, 16), groups))["groups"]
    by_name = {group["group"]: group for group in found["groups"]}
    assert by_name["(others)"]["rows"] == 40
    assert by_name["(others)"]["gvendi"] > 1
    small = [group for name, group in by_name.items() if name.startswith("small")]
    assert by_name["(others)"]["entropy_share"] == pytest.approx(sum(g["entropy_share"] for g in small))
    page = " ".join("".join(Page(render(report_data(tmp_path / "r"))).words).split())
    assert (
        "5 groups with too few rows to compare (40 rows in all, fewer than 40 each): counted together" in page
    )
    assert page.count(" · unlimited K ") == 2


def test_clusters_of_one_row_each(tmp_path):
    found = report_data(made_run(tmp_path / "r", drawn(30, 64)), clusters=30)["clusters"]
    assert found["sizes"] == [1] * 30
    assert {(c["size"], len(c["rows"])) for c in (*found["largest"], *found["sparsest"])} == {(1, 1)}
    assert (found["sparse"], found["sparse_rows"]) == (15, 15)


def test_a_changed_corpus_leaves_a_report_without_texts(undrawn, run, tmp_path):
    corpus = Path(run.manifest["files"][0]["path"])
    moved = corpus.rename(tmp_path / "moved.jsonl")
    try:
        found = report_data(run)
        assert corpus.name in found["texts_missing"]
        assert all(entry["text"] is None for entry in numbers.row_numbers(found))
        assert "No texts are shown" in render(found)
        corpus.write_text(moved.read_text().replace("What", "That"))
        assert "has changed" in report_data(run)["texts_missing"]
    finally:
        moved.replace(corpus)
    assert report_data(run)["texts_missing"] is None


def test_an_incomplete_run_says_so(undrawn, tmp_path):
    run = made_run(tmp_path / "r", drawn(20, 16), units_total=3)
    assert "1 of 3 work units are done" in render(report_data(run))
    unrecorded = RunDirectory.open(tmp_path / "unrecorded", run.spec)
    for part in run.iterate():
        unrecorded.write_part(part)
    found = report_data(unrecorded)
    assert "is not recorded, or is still being indexed" in render(found)
    assert "units.json" in found["texts_missing"]


def test_what_cannot_be_used_is_refused(run, tmp_path):
    with pytest.raises(GvendiError, match=r"sketched with --by meta\.kind, not --by source"):
        report_data(run, by="source")
    with pytest.raises(GvendiError, match="not a run directory"):
        report_data(tmp_path)
    with pytest.raises(GvendiError, match="not a file"):
        report_data(run, clusters="absent.parquet")
    (tmp_path / "broken.parquet").write_text("x")
    with pytest.raises(GvendiError, match="cannot be read"):
        report_data(run, clusters=tmp_path / "broken.parquet")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cosine": None}, "has columns id, cluster;"),
        ({"cosine": [math.nan] * 8}, "a cosine that is not from -1 to 1"),
        ({"cosine": ["a"] * 8}, "has string in its column cosine"),
        ({"cluster": [-1] * 8}, "a cluster that is not from 0 to 7"),
        ({"cluster": [2**40] * 8}, "a cluster that is not from 0 to 7"),
        ({"cluster": [0.5] * 8}, "has double in its column cluster"),
        ({"cluster": [None, *range(7)]}, "has nulls in its column cluster"),
        ({"id": [[1]] * 8}, "in its column id"),
        ({"id": ["x"] * 8}, "the 8 ids in .* are not those"),
    ],
)
def test_a_file_of_clusters_with_other_content_is_refused(tmp_path, changes, said):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pool = MatrixPool(drawn(8, 16))
    columns = {"id": pool.ids, "cluster": [0, 1] * 4, "cosine": [0.5] * 8}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    assert numbers.clusters(pool, tmp_path / "c.parquet", 0)[1]["sizes"] == [4, 4]
    columns = {name: value for name, value in (columns | changes).items() if value is not None}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    with pytest.raises(GvendiError, match=f"^--clusters: .*{said}") as caught:
        numbers.clusters(pool, tmp_path / "c.parquet", 0)
    assert "\n" not in str(caught.value)


def test_the_command_writes_both_files_and_overwrites_none(undrawn, run, gvendi, tmp_path):
    out = tmp_path / "pages" / "mine.html"
    assert gvendi("cluster", run.path, "--clusters", 9, "--out", tmp_path / "c.parquet")[0] == 0
    code, said, steps = gvendi("report", run.path, "--clusters", tmp_path / "c.parquet", "--out", out)
    assert (code, said) == (0, f"{out}, numbers in {out.with_suffix('.json')}\n")
    assert "report: scoring" in steps
    found = json.loads(out.with_suffix(".json").read_text())["clusters"]
    wanted = report_data(run, clusters=9)["clusters"]
    assert {**found, "file": None} == wanted
    code, _, error = gvendi("report", run.path, "--out", out)
    assert (code, "already exists" in error) == (1, True)
    code, _, error = gvendi("report", run.path, "--out", tmp_path / "report.pdf")
    assert (code, "ends in .html" in error) == (1, True)
    code, _, error = gvendi("report", run.path, "--out", out, "--force", "--title", "<Mine>")
    assert code == 0, error
    assert "<title>&lt;Mine&gt;</title>" in out.read_text()
    made_run(tmp_path / "other", drawn(5, 16))
    code, _, error = gvendi(
        "report", tmp_path / "other", "--clusters", tmp_path / "c.parquet", "--out", tmp_path / "o.html"
    )
    assert (code, "run 'gvendi cluster' on this run directory again" in error) == (1, True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(browser, written, width, scheme):
    check_in_browser(browser, written[0], width, scheme, set(FIGURES))


def test_a_page_can_be_drawn_again_from_its_json(written):
    page, numbers = written
    assert render(json.loads(numbers.read_text()), date=DAY) == page.read_text()


def test_figures_of_two_threads_are_those_of_one():
    import matplotlib

    # Threads change places within a figure, not between two.
    before, settings = sys.getswitchinterval(), dict(matplotlib.rcParams)

    def drawn(number):
        def draw(ax, narrow):
            ax.plot(range(20), [i**number for i in range(20)])
            ax.set(xlabel=f"to the {number}")

        return figures.both(f"figure-{number}", draw)

    alone = [drawn(number) for number in range(2)]
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(drawn, range(2))) == alone
    finally:
        sys.setswitchinterval(before)
    assert dict(matplotlib.rcParams) == settings


def test_what_the_look_at_rows_warned_of_is_on_the_page(tmp_path, undrawn):
    run = made_run(tmp_path / "run", np.eye(8, 64, dtype=np.float32))
    heading = "<h2>What a look at some rows warned of</h2>"
    assert heading not in render(report_data(run))
    write_warnings(
        run.path, [{"kind": "copies", "text": "8 of 8 rows are '<|im_end|>'; take \u202e them out"}]
    )
    said = render(report_data(run))
    assert heading in said
    assert "<li>8 of 8 rows are &#39;&lt;|im_end|&gt;&#39;; take \\u202e them out.</li>" in said
