"""Layers chosen after a run, shares of the squared norm, and what old directories and bad choices are told."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gvendi_fast.analysis.layers import choose_layers, norm_shares
from gvendi_fast.analysis.scoring import score_run
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.gradients.layers import GROUPINGS, PRESETS
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.proxy.encode import Encoder, collate
from gvendi_fast.sketching.proxy.load import load_proxy
from gvendi_fast.vendi.state import VendiState

PLAIN = Settings(SketchSpec(dim=256), unit_rows=5)
FP32_RELATIVE = 1e-5


@pytest.fixture(scope="module")
def proxy():
    return load_proxy("tiny", dtype="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "data.jsonl"
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def runs(proxy, data, tmp_path_factory):
    """{groups: a run that keeps them}."""
    root = tmp_path_factory.mktemp("runs")
    return {
        groups: sketch_corpus(data, root / str(groups), proxy, replace(PLAIN, groups=groups))
        for groups in (None, *GROUPINGS)
    }


def joined(run: RunDirectory, name: str) -> np.ndarray:
    columns = {"sketch": "sketches", "gradient_norm": "gradient_norm", "group_sketches": "group_sketches"}
    return np.concatenate([getattr(part, columns[name]) for part in run.iterate([name])])


def test_the_sketch_has_the_same_bits_whatever_is_kept_beside_it(runs, proxy, data):
    wanted = joined(runs[None], "sketch")
    for groups in GROUPINGS:
        run = runs[groups]
        assert np.array_equal(joined(run, "sketch"), wanted)
        kept = joined(run, "group_sketches").reshape(len(wanted), len(run.spec["groups"]["names"]), -1)
        assert np.abs(kept.sum(axis=1) - wanted).max() <= FP32_RELATIVE * np.abs(wanted).max()
        assert sum(run.spec["groups"]["sketched"]) == run.spec["coverage"]["sketched"]
    # Nor does a default run's record say anything that an earlier version's did not.
    assert not {"layers", "groups"} & set(runs[None].spec)
    (first, *_) = runs[None].iterate(["group_sketches"])
    assert first.group_sketches is None
    # A sketcher without any group.
    from gvendi_fast.data.index import index_corpus, read_unit

    manifest = index_corpus([data])
    samples = Encoder(proxy.tokenizer, 256).encode(list(read_unit(manifest, manifest.units[0])))
    alone = GradientSketcher(proxy.model, PLAIN.spec)(*collate(samples[:1], 0))
    assert (torch.from_numpy(wanted[:1]) - alone).norm() <= FP32_RELATIVE * alone.norm()


def test_a_preset_chosen_afterwards_is_the_run_of_the_preset(runs, proxy, data, tmp_path):
    direct = sketch_corpus(data, tmp_path / "run", proxy, replace(PLAIN, layers="last-half"))
    chosen = choose_layers(runs["kind-and-half"], "last-half")
    assert chosen.spec == direct.spec
    for name in ("sketch", "gradient_norm"):
        wanted = joined(direct, name)
        assert np.abs(joined(chosen, name) - wanted).max() <= FP32_RELATIVE * np.abs(wanted).max()
    everything = next(iter(chosen.iterate()))
    assert np.array_equal(everything.sketches, next(iter(chosen.iterate(["sketch"]))).sketches)
    assert everything.ids == next(iter(direct.iterate(["id"]))).ids
    got, wanted = score_run(chosen), score_run(direct)
    assert got.gvendi == pytest.approx(wanted.gvendi, rel=1e-6)
    assert got.coverage == wanted.coverage < 1
    assert got.gvendi != pytest.approx(score_run(runs[None]).gvendi, rel=1e-6)
    assert norm_shares(chosen) == pytest.approx(norm_shares(direct), abs=1e-6)


def test_a_resumed_run_has_the_bytes_of_one_without_the_break(runs, proxy, data, tmp_path):
    whole, broken = runs["kind-and-half"].path, tmp_path / "broken"
    shutil.copytree(whole, broken)
    (broken / "parts" / "part-000001.parquet").unlink()
    sketch_corpus(data, broken, proxy, replace(PLAIN, groups="kind-and-half"))
    for path in sorted((whole / "parts").iterdir()):
        assert (broken / "parts" / path.name).read_bytes() == path.read_bytes()
    assert pq.read_schema(path.with_name("part-000001.parquet")).names[-2:] == [
        "norm_share",
        "group_sketches",
    ]


def test_directories_that_keep_groups_compare_with_those_that_keep_none(runs):
    plain, kept = as_pool(runs[None]), as_pool(runs["kind"])
    assert kept.spec == plain.spec == runs[None].spec
    states = [
        VendiState(pool.dim, spec=pool.spec).update(pool.take(range(len(pool)))) for pool in (plain, kept)
    ]
    assert states[0].merge(states[1]).n == 2 * len(plain)


def test_what_cannot_be_chosen_says_why(runs, proxy, data, tmp_path):
    assert choose_layers(runs[None], "all") is runs[None]
    with pytest.raises(GvendiError, match=r"keeps no sketches by group.*--sketch-groups kind-and-half"):
        choose_layers(runs[None], "mlp")
    with pytest.raises(GvendiError, match=r"would split the sketch group 'rest'"):
        choose_layers(runs["embedding"], "mlp")
    with pytest.raises(GvendiError, match="wanted one of all, no-embedding"):
        choose_layers(runs["kind"], "middle")
    # Neither presets nor groups mix in one directory.
    for change in ({"layers": "mlp"}, {"groups": "embedding"}):
        with pytest.raises(GvendiError, match=rf"made with other settings:\n(.*\n)*  {next(iter(change))}"):
            sketch_corpus(data, runs["kind"].path, proxy, replace(PLAIN, **{"groups": "kind", **change}))
    with pytest.raises(GvendiError, match="layers is 'x'"):
        Settings(layers="x")
    with pytest.raises(GvendiError, match="groups is 'x'"):
        Settings(groups="x")


def test_shares_are_those_of_the_exact_gradient(runs, proxy, data):
    shares = norm_shares(runs[None])
    assert sum(shares.values()) == pytest.approx(1)
    sketcher = GradientSketcher(proxy.model, PLAIN.spec, groups="kind")
    from gvendi_fast.data.index import index_corpus, read_unit

    manifest = index_corpus([data])
    samples = Encoder(proxy.tokenizer, 256).encode(list(read_unit(manifest, manifest.units[0])))
    names, exact = sketcher.groups.names, []
    parameters = {name: p for name, p in proxy.model.named_parameters() if name in sketcher.groups.of}
    for sample in samples:
        ids, labels, _ = collate([sample], 0)
        logits = proxy.model(input_ids=ids, use_cache=False).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], reduction="sum")
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        squares = np.zeros(len(names))
        for name, gradient in zip(parameters, gradients, strict=True):
            squares[sketcher.groups.of[name]] += float(gradient.double().square().sum())
        exact.append(squares / squares.sum())
    wanted = dict(zip(names, np.mean(exact, axis=0), strict=True))
    assert set(shares) == set(wanted)
    # A row's squared norm has a relative error of sqrt(2 / K) = 0.09, and rows share one sketch.
    for kind, share in shares.items():
        assert share == pytest.approx(wanted[kind], abs=0.3 * wanted[kind] + 0.002), kind
    # Halves add up to their kinds.
    assert norm_shares(runs["kind-and-half"]) == pytest.approx(shares, rel=0.3)
    assert set(norm_shares(runs["embedding"])) == {"embedding", "rest"}


def test_a_directory_of_an_earlier_version_has_no_shares_and_goes_on(runs, proxy, data, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(runs[None].path, old)
    for path in sorted((old / "parts").glob("*.parquet")):
        table = pq.read_table(path).drop_columns(["norm_share"])
        # Without its stamp, which parts of earlier versions lack too.
        pq.write_table(table.replace_schema_metadata(None), path)
    assert norm_shares(old) is None
    wanted = score_run(runs[None]).gvendi
    assert score_run(RunDirectory.load(old)).gvendi == wanted
    # A part that is made again has shares, the others none: what cannot be said of all rows is not said.
    next((old / "parts").glob("part-000001.parquet")).unlink()
    run = sketch_corpus(data, old, proxy, PLAIN)
    assert score_run(run).gvendi == wanted
    assert norm_shares(run) is None


def test_the_command_chooses_layers_before_and_after(gvendi, data, tmp_path):
    sketched = ("--proxy", "tiny", "--dim", 256, "--dtype", "float32")
    run = tmp_path / "run"
    code, _, err = gvendi("sketch", data, *sketched, "--sketch-groups", "kind-and-half", "--out", run)
    assert code == 0, err
    code, out, err = gvendi("score", run, "--layers", "mlp", "--json")
    assert code == 0, err
    after = json.loads(out)
    code, out, err = gvendi("score", data, *sketched, "--layers", "mlp", "--json")
    assert code == 0, err
    before = json.loads(out)
    assert after["gvendi"] == pytest.approx(before["gvendi"], rel=1e-6)
    assert after["spec"] == before["spec"]
    assert after["spec"]["layers"] == "mlp"
    code, _, err = gvendi("score", run, "--sketch-groups", "kind")
    assert code != 0
    assert "--sketch-groups does not go with the score of a run directory" in err
    code, _, err = gvendi("sketch", data, *sketched, "--layers", "middle", "--out", tmp_path / "other")
    assert code != 0
    assert "wanted one of all, no-embedding" in err
    # The commands' help names every choice.
    _, out, _ = gvendi("sketch", "--help")
    words = set(out.replace(",", " ").replace("(", " ").replace("│", " ").split())
    assert {*PRESETS, *GROUPINGS} <= words
