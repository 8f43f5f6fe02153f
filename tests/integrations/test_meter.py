"""`DiversityMeter` against the definitions over random streams, and what resuming, merging and labels have to keep."""

import copy
import io
import math
import pickle
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from meter_definitions import Stream, entropy, figures, similarity
from pages_of_docs import ROOT, blocks

import gvendi_fast
from gvendi_fast import DiversityMeter, GvendiError, VendiState
from gvendi_fast.integrations.meter_figures import FIGURES, QUANTILES
from gvendi_fast.sketching.gradients.sketches import Sketches

DIM = 12
# Rows are kept in float32; of what is compared, differences of entropies and surprisals of unseen directions lose most.
CLOSE = {"rel": 2e-5, "abs": 2e-6}


def sketches(count: int, seed: int = 0, dim: int = DIM) -> torch.Tensor:
    """Rows of unequal directions and lengths."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1) ** -0.5
    return torch.randn(count, dim, generator=generator) * scale * (1 + torch.arange(count)[:, None] % 5)


def labels_of(count: int, seed: int) -> list[str]:
    return [("web", "code", "math")[(seed + k * k) % 3] for k in range(count)]


def fed(meter: DiversityMeter, sizes, seed: int = 0) -> DiversityMeter:
    for step, size in enumerate(sizes):
        meter.update(sketches(size, 100 * seed + step), labels_of(size, step))
    return meter


def same_to_the_bit(one: DiversityMeter, other: DiversityMeter) -> bool:
    return one.compute(FIGURES) == other.compute(FIGURES)


@pytest.mark.parametrize(
    ("window", "sizes"),
    [
        (1, [1, 1, 3]),
        (6, [2, 3, 1, 4, 0, 2]),
        (6, [9, 4, 20]),
        (40, [7, 7, 7, 7, 7, 7, 7]),
        (40, [13, 0, 1, 300, 5]),
        (500, [30, 60]),
    ],
)
def test_figures_are_those_of_the_definition(window, sizes):
    meter, stream = DiversityMeter(window=window, decay=0.97), Stream(window, 0.97, DIM)
    for step, size in enumerate(sizes):
        rows, labels = sketches(size, step), labels_of(size, step)
        meter.update(rows, labels)
        stream.add(rows, labels)
        found, wanted = meter.compute(FIGURES), stream.figures()
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            # A direction that no row of the window has counts with 36 nats, so rows' rounding to float32 shows there.
            close = {"rel": 1e-3} if name == "surprisal" and window < DIM else CLOSE
            assert found[name] == pytest.approx(value, **close), (step, name)


@pytest.mark.parametrize("seed", range(12))
def test_a_random_stream_ends_as_the_definition_says(seed):
    generator = np.random.Generator(np.random.Philox(seed))
    window, decay = int(generator.integers(1, 90)), float(generator.uniform(0.5, 0.999))
    meter, stream = DiversityMeter(window=window, decay=decay), Stream(window, decay, DIM)
    for step in range(int(generator.integers(1, 60))):
        size = int(generator.integers(0, 30))
        rows, labels = sketches(size, 1000 * seed + step), labels_of(size, step)
        meter.update(rows, labels)
        stream.add(rows, labels)
        if generator.random() < 0.1:
            meter = pickle.loads(pickle.dumps(meter))
    found, wanted = meter.compute(FIGURES), stream.figures()
    assert set(found) == set(wanted)
    close = {name: {"rel": 1e-3} if name == "surprisal" and window < DIM else CLOSE for name in wanted}
    assert {name for name in wanted if found[name] != pytest.approx(wanted[name], **close[name])} == set()


def test_orders_are_those_of_the_definition_and_order_two_takes_no_spectrum(monkeypatch):
    rows = sketches(30)
    meter = DiversityMeter(window=20, orders=(2, 0.5, math.inf)).update(rows[:10]).update(rows[10:])
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
    found = meter.compute(("window", "batch"))
    assert found["gvendi_q2/window"] == pytest.approx(math.exp(entropy(unit[-20:], q=2)), rel=1e-6)
    assert found["gvendi_q0.5/batch"] == pytest.approx(math.exp(entropy(unit[-20:], q=0.5)), rel=1e-5)
    assert found["gvendi_qinf/window"] < found["gvendi_q2/window"]
    assert "gvendi/window" not in found
    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, None)
    fresh = DiversityMeter(window=20).update(rows)
    assert fresh.compute(("window", "average"), orders=[2])["gvendi_q2/window"] == pytest.approx(
        found["gvendi_q2/window"], rel=1e-12
    )


def test_an_update_takes_no_spectrum_and_a_batch_s_figures_none_of_the_window(monkeypatch):
    sizes = []
    for name in ("eigh", "eigvalsh"):
        own = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda x, own=own: sizes.append(len(x)) or own(x))
    meter = fed(DiversityMeter(window=30), [5] * 10)
    assert sizes == []
    meter(sketches(4), "web")
    assert sizes == [4]
    meter.compute()
    taken = len(sizes)
    meter.compute()
    meter.compute(("window", "novelty"))
    # Of the window with and without vectors, the one before, the average and the three sources.
    assert taken == 1 + 7
    assert len(sizes) == taken


def test_nothing_drifts_and_old_samples_leave_no_trace():
    long, short = DiversityMeter(window=40, decay=None), DiversityMeter(window=40, decay=None)
    for step in range(400):
        long.update(sketches(7, step) * 10.0 ** (step % 7), labels_of(7, step))
        if step >= 392:
            short.update(sketches(7, step) * 10.0 ** (step % 7), labels_of(7, step))
    before, after = (meter.compute(FIGURES) for meter in (long, short))
    assert before.pop("samples/seen") == 2800
    assert after.pop("samples/seen") == 56
    assert before == after


def test_the_window_and_the_average_do_not_depend_on_how_a_stream_is_cut():
    rows, labels = sketches(700), labels_of(700, 0)
    found = []
    for size in (1, 32, 256, 700):
        meter = DiversityMeter(window=100, decay=0.99)
        for i in range(0, 700, size):
            meter.update(rows[i : i + size], labels[i : i + size])
            if i % 5 == 0:
                meter.compute(("average",))
        found.append(meter.compute(("window", "average", "sources")))
    # The window's sum is made from what the last batch left in it and the batch, so its last bits may differ.
    for other in found[1:]:
        assert {k: v for k, v in other.items() if "average" in k} == {
            k: v for k, v in found[0].items() if "average" in k
        }
        assert other == pytest.approx(found[0], rel=1e-12)


@pytest.mark.filterwarnings("ignore:3 samples with a zero gradient")
def test_samples_without_direction_are_left_out_and_counted():
    rows, labels = sketches(9), labels_of(9, 0)
    rows[1] = rows[4] = 0
    rows[2, 3], rows[5, 0] = float("nan"), float("inf")
    meter, stream = DiversityMeter(window=30, decay=0.9), Stream(30, 0.9, DIM)
    with pytest.warns(UserWarning, match="2 samples with a zero gradient and 2 with one that is not finite"):
        found = meter.update(rows, labels).compute(FIGURES)
    stream.add(rows, labels)
    wanted = stream.figures() | {"samples/zero": 2, "samples/non_finite": 2}
    assert found == pytest.approx(wanted, **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert meter.update(torch.zeros(1, DIM)).compute()["samples/zero"] == 3
    assert "gvendi/batch" not in meter.compute()
    assert meter.compute()["samples/batch"] == 0


def test_before_the_first_batch_and_at_it_nothing_is_claimed():
    meter = DiversityMeter()
    nothing = {"samples/seen": 0, "samples/zero": 0, "samples/non_finite": 0}
    assert meter.compute() == nothing
    assert meter.by_source() == {}
    assert not {"surprisal", "gain"} & set(meter.update(sketches(3)).compute())
    assert {"surprisal", "gain"} < set(meter.update(sketches(3)).compute())
    assert meter.reset().compute() == nothing
    assert meter.update(torch.randn(2, 5)).compute()["samples/window"] == 2


def test_similarity_is_the_same_for_any_number_of_samples_and_a_source_that_repeats_itself_stands_out():
    pool = sketches(4000, dim=32)
    pool /= pool.norm(dim=1, keepdim=True)
    few = torch.tensor([similarity(pool[i : i + 10]) for i in range(0, 4000, 10)])
    many = similarity(pool)
    error = float(few.std()) / math.sqrt(len(few))
    assert abs(float(few.mean()) - many) < 4 * error
    meter = DiversityMeter(window=240)
    for step in range(30):
        fresh, again = pool[4 * step : 4 * step + 4], pool[1000:1004]
        meter.update(torch.cat([fresh, again]), ["fresh"] * 4 + ["again"] * 4)
    sources = meter.by_source()
    fresh, again = sources["fresh"], sources["again"]
    assert (fresh.n, again.n, fresh.share) == (120, 120, 0.5)
    assert again.gvendi <= 4 < 12 < fresh.gvendi
    assert again.similarity > 0.25 > 3 * fresh.similarity
    assert again.gain < 0 < fresh.gain
    assert again.surprisal < fresh.surprisal


def test_surprisals_of_sources_add_up_to_the_entropy_of_the_window():
    meter = fed(DiversityMeter(window=50), [8] * 12)
    total = sum(source.share * source.surprisal for source in meter.by_source().values())
    assert total == pytest.approx(math.log(meter.compute(("window",))["gvendi/window"]), abs=1e-9)


def test_labels_come_in_every_form():
    rows = sketches(4)
    forms = [
        (["1", "1", "2", "1"]),
        [1, 1, 2, 1],
        np.array([1, 1, 2, 1]),
        torch.tensor([1, 1, 2, 1]),
        (1, "1", np.int32(2), "1"),
    ]
    found = [DiversityMeter().update(rows, form).compute() for form in forms]
    tagged = Sketches(rows, None, None)
    found.append(DiversityMeter().update(SimpleNamespace(z=rows, tags=torch.tensor([1, 1, 2, 1]))).compute())
    assert all(one == found[0] for one in found)
    assert found[0]["samples/source/1"] == 3
    assert DiversityMeter().update(rows, "a").update(rows).compute()["share/source/a"] == 0.5
    assert not any("source" in name for name in DiversityMeter().update(tagged).compute())
    named = DiversityMeter(names={1: "web", 2: "code"}).update(rows, [1, 1, 2, 7])
    assert set(named.by_source()) == {"web", "code", "7"}


def test_ten_thousand_labels_have_bounded_figures_and_memory():
    meter = DiversityMeter(window=50, max_sources=3)
    rows = sketches(100)
    for step in range(100):
        labels = [*("big" for _ in range(10)), *(100 * step + k for k in range(90))]
        meter.update(rows, labels)
    with pytest.warns(UserWarning, match="has 41 sources: the 3 largest have figures of their own"):
        sources = meter.update(rows[:10], "big").compute(("sources",))
    # Ties go by name; the window has 40 samples with labels of their own.
    assert {name for name in sources if name.startswith("samples/source")} == {
        f"samples/source/{name}" for name in ("big", "9950", "9951", "other")
    }
    assert sources["samples/source/big"] == 10
    assert sources["samples/source/other"] == 38
    assert len(meter.state_dict()["names"]) < 3000


@pytest.mark.parametrize("how", ["state_dict", "file", "pickle", "deepcopy"])
def test_a_resumed_meter_goes_on_to_the_bit(how):
    kwargs = {"window": 40, "decay": 0.98, "spec": {"dim": DIM, "seed": 1}}
    meter = fed(DiversityMeter(**kwargs), [9] * 37)
    meter.compute()
    if how == "pickle":
        resumed = pickle.loads(pickle.dumps(meter))
    elif how == "deepcopy":
        resumed = copy.deepcopy(meter)
    else:
        state = meter.state_dict()
        if how == "file":
            torch.save(state, stream := io.BytesIO())
            state = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
        resumed = DiversityMeter(**kwargs).load_state_dict(state)
    assert same_to_the_bit(meter, resumed)
    for one in (meter, resumed):
        fed(one, [5, 60, 3], seed=7)
    assert same_to_the_bit(meter, resumed)
    # A state is a copy.
    if how == "state_dict":
        again = DiversityMeter(**kwargs).load_state_dict(state)
        assert again.compute()["samples/seen"] == 9 * 37


def test_an_empty_meter_is_saved_too():
    state = DiversityMeter(window=5).state_dict()
    meter = DiversityMeter(window=5).load_state_dict(state).update(sketches(3))
    assert same_to_the_bit(meter, DiversityMeter(window=5).update(sketches(3)))


def test_merged_meters_are_one_over_all_samples():
    meters, streams = [], []
    for rank, sizes in enumerate([[5, 6, 7], [3], [30, 2]]):
        meters.append(DiversityMeter(window=20, decay=0.9))
        streams.append(Stream(20, 0.9, DIM))
        for step, size in enumerate(sizes):
            rows, labels = sketches(size, 10 * rank + step), labels_of(size, rank + step)
            meters[-1].update(rows, labels)
            streams[-1].add(rows, labels)
    before = [meter.compute(FIGURES) for meter in meters[1:]]
    union = meters[0].merge_state([*meters[1:], DiversityMeter(window=20, decay=0.9)])
    assert union is meters[0]
    assert [meter.compute(FIGURES) for meter in meters[1:]] == before
    parts = [stream.parts() for stream in streams]
    batch, earlier, window = (torch.cat([part[i] for part in parts]) for i in range(3))
    labels = [label for part in parts for label in part[3]]
    wanted = figures(
        batch, earlier, window, labels, torch.cat([s.rows for s in streams]),
        torch.cat([s.weights() for s in streams]), torch.cat([s.norms for s in streams]), 53,
    )  # fmt: skip
    assert union.compute(FIGURES) == pytest.approx(wanted, **CLOSE)
    assert pickle.loads(pickle.dumps(union)).compute(FIGURES) == union.compute(FIGURES)
    for refused in (lambda: union.update(sketches(1)), union.state_dict, lambda: union.to("cpu")):
        with pytest.raises(GvendiError, match="merged"):
            refused()
    assert union.reset().update(sketches(2)).compute()["samples/window"] == 2


def test_states_are_what_other_rooms_take():
    meter = fed(DiversityMeter(window=30, spec={"seed": 3}), [10] * 5)
    state = meter.window_state()
    assert state.gvendi() == pytest.approx(meter.compute()["gvendi/window"], rel=1e-9)
    assert state.spec == {"seed": 3}
    state.update(sketches(4))
    assert meter.window_state().n == 30
    states = meter.source_states()
    assert {name: one.n for name, one in states.items()} == {n: s.n for n, s in meter.by_source().items()}
    assert all(isinstance(one, VendiState) for one in states.values())
    assert DiversityMeter(8).window_state().n == 0


def test_the_default_dtype_changes_no_figure():
    sizes = [7, 7, 30, 4]
    batches = [(sketches(size, step), labels_of(size, step)) for step, size in enumerate(sizes)]
    wanted = fed(DiversityMeter(window=20), sizes)
    torch.set_default_dtype(torch.float64)
    try:
        found = DiversityMeter(window=20)
        for rows, labels in batches:
            found.update(rows, labels)
        again = DiversityMeter(window=20).load_state_dict(found.state_dict())
        assert same_to_the_bit(found, wanted)
        assert same_to_the_bit(again, wanted)
        assert same_to_the_bit(found.sync(), wanted)
        assert found.merge_state([]).compute() == wanted.compute()
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_update_waits_for_no_device(monkeypatch):
    # Whatever reads a value of a tensor without values raises; that a meter refuses such tensors by name is put aside.
    monkeypatch.setattr(torch.Tensor, "is_meta", False)
    meter = DiversityMeter()
    for _ in range(10):
        meter.update(torch.empty(64, 8, device="meta"), labels_of(64, 0))
    assert meter.dim == 8
    assert meter.update(torch.empty(0, 8, device="meta"), "web").device == torch.device("meta")


def test_kept_sketches_are_copies_without_a_graph():
    rows = sketches(6).requires_grad_()
    meter = DiversityMeter().update(rows)
    with torch.no_grad():
        rows.zero_()
    assert meter.compute()["samples/zero"] == 0
    assert not any(tensor.requires_grad for tensor in meter.state_dict()["tensors"].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, np.float64, np.float16])
def test_sketches_of_every_float_type_are_taken(dtype):
    rows = sketches(20)
    given = rows.to(dtype) if isinstance(dtype, torch.dtype) else rows.numpy().astype(dtype)
    wanted = DiversityMeter().update(torch.as_tensor(given).float()).compute()["gvendi/batch"]
    assert DiversityMeter().update(given).compute()["gvendi/batch"] == pytest.approx(wanted, rel=1e-6)


SPEC = {"dim": DIM, "seed": 1}
WRONG = {
    "window is 0": lambda: DiversityMeter(window=0),
    "window is 2.5": lambda: DiversityMeter(window=2.5),
    "dim is -1": lambda: DiversityMeter(-1),
    "decay is 1": lambda: DiversityMeter(decay=1),
    "decay is nan": lambda: DiversityMeter(decay=float("nan")),
    "decay is '0.9'": lambda: DiversityMeter(decay="0.9"),
    "orders holds 0": lambda: DiversityMeter(orders=[0]),
    "max_sources is 0": lambda: DiversityMeter(max_sources=0),
    "figures holds 'windw'; wanted some of batch": lambda: DiversityMeter().compute(("windw",)),
    "spec cannot be written as JSON": lambda: DiversityMeter(spec={"dim": {1}}),
    "sketches is torch.float32 of shape .12,.": lambda: DiversityMeter().update(sketches(1)[0]),
    "sketches is torch.int64": lambda: DiversityMeter().update(torch.ones(2, 3, dtype=torch.int64)),
    "sketches is a list": lambda: DiversityMeter().update([[1.0, 2.0]]),
    "sketches is an array of int64": lambda: DiversityMeter().update(np.ones((2, 3), np.int64)),
    "K = 12, and this meter holds sketches of K = 8": lambda: DiversityMeter(8).update(sketches(2)),
    "sketches is on the meta device": lambda: DiversityMeter().update(torch.ones(2, 3, device="meta")),
    "group is on the meta device": lambda: DiversityMeter().update(
        sketches(2), torch.ones(2, dtype=torch.int64, device="meta")
    ),
    "names is .'x', 'y'.; wanted a mapping": lambda: DiversityMeter(names=["x", "y"]),
    "group has 2 labels for 3 samples": lambda: DiversityMeter().update(sketches(3), ["a", "b"]),
    "group holds None, a NoneType": lambda: DiversityMeter().update(sketches(2), ["a", None]),
    "group holds 1.5, a float": lambda: DiversityMeter().update(sketches(1), np.array([1.5])),
    "metrics holds a VendiState": lambda: DiversityMeter().merge_state([VendiState(4)]),
    "metrics holds this meter itself": lambda: (meter := DiversityMeter()).merge_state(meter),
    "meters differ in window: 5 in 0 and 6 in 1": lambda: DiversityMeter(window=5).merge_state(
        [DiversityMeter(window=6)]
    ),
    "meters differ in dim: 3 in 0 and 4 in 2": lambda: DiversityMeter(3).merge_state(
        [DiversityMeter(), DiversityMeter(4)]
    ),
    "meters differ in spec": lambda: DiversityMeter(spec=SPEC).merge_state(
        DiversityMeter(spec={**SPEC, "seed": 2})
    ),
    "the meter and state differ in decay: 0.9 in 0": lambda: DiversityMeter(decay=0.9).load_state_dict(
        DiversityMeter().state_dict()
    ),
    "state is .'rows'.; wanted what DiversityMeter.state_dict": lambda: DiversityMeter().load_state_dict(
        {"rows": 1}
    ),
    "seen no sketches and has no dim": lambda: DiversityMeter().window_state(),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_use_gets_one_sentence(words):
    with pytest.raises(GvendiError, match=words):
        WRONG[words]()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda state: state["tensors"].update(norms=torch.ones(1)), "norms has shape .1,., not .3,."),
        (
            lambda state: state["tensors"].update(codes=torch.tensor([0, 1, 7])),
            "codes has numbers of other than 1",
        ),
        (lambda state: state["tensors"].pop("average"), "tensors holds average_tail, batch, "),
        (lambda state: state["settings"].pop("spec"), "settings holds decay, dim, window"),
        (lambda state: state.update(version=2), "state is of version 2; wanted .* .version 1."),
    ],
    ids=["shape", "codes", "missing", "settings", "version"],
)
def test_a_damaged_state_is_refused_and_nothing_is_loaded(damage, words):
    state = DiversityMeter().update(sketches(3), "web").state_dict()
    damage(state)
    meter = DiversityMeter().update(sketches(2))
    with pytest.raises(GvendiError, match=words):
        meter.load_state_dict(state)
    assert meter.compute()["samples/seen"] == 2


def test_a_refused_update_changes_nothing():
    meter = DiversityMeter().update(sketches(3), "a")
    before = meter.compute(FIGURES)
    for rows, group in ((sketches(2, dim=5), None), (sketches(2), ["b"]), (sketches(2), ["b", 1.5])):
        with pytest.raises(GvendiError):
            meter.update(rows, group)
    assert meter.compute(FIGURES) == before
    assert meter.state_dict()["names"] == ["a"]


# Of the page: [sizes of spectra, with "+" those with eigenvectors].
SPECTRA = {
    "batch": ["5"],
    "norms": [],
    "novelty": ["12+"],
    "window": ["12"],
    "average": ["12"],
    "sources": ["12+", "10", "10", "10"],
    "source_gain": ["12", "12", "12", "12"],
}


@pytest.mark.parametrize("figure", FIGURES)
def test_each_figure_takes_the_spectra_that_the_page_says(figure, monkeypatch):
    meter = fed(DiversityMeter(window=30), [5] * 10)
    found = []
    for name, mark in (("eigh", "+"), ("eigvalsh", "")):
        own = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda x, own=own, mark=mark: found.append(f"{len(x)}{mark}") or own(x)
        )
    meter.compute((figure,))
    assert sorted(found) == sorted(SPECTRA[figure])


def test_the_page_prints_what_it_says(capsys):
    text = (ROOT / "docs" / "training" / "meter.md").read_text()
    names = {}
    for block in blocks(text):
        if block.language == "python":
            exec(compile(block.text, "meter.md", "exec"), names)
        else:
            assert capsys.readouterr().out == block.text
    sources = names["meter"].by_source()
    assert f"{sources['again'].similarity / sources['web'].similarity:.0f} times that of the first" in text
    assert DiversityMeter().decay == 0.999
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    said = {name for row in rows for name in re.findall("`(.+?)`", row)} | {
        f"gradient_norm/{q}" for q in QUANTILES
    }
    found = {re.sub("/source/.*", "/source/NAME", name) for name in names["meter"].compute(FIGURES)}
    assert found <= said
    assert said - found == {*FIGURES, "q50", "q95", "max"}


def test_the_meter_is_a_public_name():
    assert gvendi_fast.DiversityMeter is DiversityMeter
    assert "DiversityMeter" in dir(gvendi_fast)
