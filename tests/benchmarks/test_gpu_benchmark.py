"""The GPU benchmark loses nothing: a rehearsal on any machine with failures planted in every section.

The results files in here are made up: a rehearsal's, relabelled as that of a GPU that does not exist.
"""

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hangs import HANG_S, wait_for
from places import PACKAGE, ROOT

from benchmarks.corpora import token_ids
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, results, timing
from benchmarks.gpu import section as section_of
from benchmarks.report import __main__ as report
from benchmarks.report import gpu as tables
from gvendi_fast.kernels.backends import ORDER, measured
from gvendi_fast.kernels.backends import backend as backend_called

GPU = "Made-up GPU"
# A failure of some kind in every section.
PLANTED = {
    "versions": "exception",
    "build": "exit",
    "smoke": "segfault",
    "end to end": "memory",
    "experts": "exception",
    "yardsticks": "exception",
    "checks": "check",
    "kernel times": "hang",
    "cpu and gpu": "memory",
    "spectral": "exception",
    "waiting": "exception",
    "other checks": "check",
}
WORDS = {
    "exception": "RuntimeError: planted",
    "exit": "process ended with code 7",
    "segfault": "crashed with SIGSEGV",
    "memory": "OutOfMemoryError: planted",
    "hang": "took too long, or hung",
}


@pytest.fixture(scope="module")
def benchmarks():
    """The benchmark's modules by name."""
    return {
        "corpus_ids": token_ids,
        "gpu": gpu,
        "gpu_checks": checks,
        "gpu_report": tables,
        "gpu_section": section_of,
        "gpu_timing": timing,
        "report": report,
        "results": results,
    }


def start(out: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """A rehearsal in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT
    )


def rehearse(out: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """(exit code, printed lines) of a rehearsal."""
    process = start(out, *arguments, **environment)
    said, _ = process.communicate(timeout=HANG_S)
    return process.returncode, said.splitlines()


def plants(kinds: dict[str, str]) -> list[str]:
    return [word for section, kind in kinds.items() for word in ("--plant", f"{section}={kind}")]


@pytest.fixture(scope="module")
def corpus(benchmarks, tmp_path_factory):
    """Token ids of a corpus of 40 rows, half of each row supervised."""
    path = tmp_path_factory.mktemp("ids") / "corpus.npz"
    generator, samples = np.random.default_rng(0), []
    for row in range(40):
        ids = generator.integers(0, 500, 6 + row % 9).astype(np.int32)
        labels = np.where(np.arange(len(ids)) >= 3, ids, -100).astype(np.int32)
        samples.append(benchmarks["corpus_ids"].Sample(row, str(row), "", "made up", row + 1, ids, labels))
    benchmarks["corpus_ids"].save_samples(samples, path)
    return path


@pytest.fixture(scope="module")
def failing(corpus, tmp_path_factory):
    """(file, exit code, printed lines) of a rehearsal of everything with a failure in every section.

    A minute of two cores, so what needs it is a soak test; `stopped` rehearses a part every day.
    """
    path = tmp_path_factory.mktemp("failing") / "dry.json"
    code, said = rehearse(path, *plants(PLANTED), "--corpus", str(corpus), GVENDI_COMMIT="abc123")
    return path, code, said


@pytest.fixture
def made_up(failing):
    """A results file of a GPU that does not exist: triton as the rehearsal's kernels, cuda twice as fast."""
    content = json.loads(failing[0].read_text())
    content |= {"gpu": GPU, "capability": "9.9", "dry run": False}
    content["machines"]["run 1"] |= {"gpu": GPU, "driver": "0", "cuda": "0", "triton": "0", "date": "made up"}
    for name, section in content["sections"].items():
        figures = section["figures"]
        figures.pop("planted")
        for figure in [f for f in figures if f.split()[0] == "cpu" or " cpu " in f]:
            found = figures.pop(figure)
            for backend in ("triton", "cuda"):
                copied = copy.deepcopy(found)
                if "backend" in copied:
                    copied |= {"backend": backend}
                figures[figure.replace("cpu", backend)] = copied
        if name == "end to end":
            for figure, found in list(figures.items()):
                if "eager" in figure:
                    figures[figure.replace("eager", "compiled")] = copy.deepcopy(found)
        if name == "yardsticks":
            for figure, found in list(figures.items()):
                shown = figures["64k vmap + CountSketch"] if found.get("absent") else found
                for size in ("64k", "16k", "8k"):
                    figures[figure.replace("64k", size)] = copy.deepcopy(shown)
        if name == "waiting":
            figures["compiled"] = copy.deepcopy(figures["eager"])
    for figure, entry in content["sections"]["kernel times"]["figures"].items():
        if figure.startswith("cuda"):
            entry["milliseconds"] = {q: value / 2 for q, value in entry["milliseconds"].items()}
    for entry in content["sections"]["end to end"]["figures"].values():
        if "peak memory bytes" in entry:
            entry["peak memory bytes"] = 3 << 30
    return content


def table(benchmarks, content: dict, folder: Path) -> dict[str, list[str]]:
    """{figure: the other cells} of the GPU table that the report makes of one results file."""
    (folder / "made-up-gpu.json").write_text(json.dumps(content))
    rendered = benchmarks["report"].render(folder).split("## On a GPU")[1]
    lines = [line.strip("| ").split(" | ") for line in rendered.splitlines() if line.startswith("|")]
    assert lines[0] == ["figure", "goal", "measured", "compared to"]
    return {line[0]: line[1:] for line in lines[2:]}


def cell(found: dict[str, list[str]], start: str) -> str:
    return next(cells[1] for figure, cells in found.items() if figure.startswith(start))


@pytest.mark.soak
def test_a_failure_in_every_section_costs_that_figure_alone(failing):
    path, code, _ = failing
    content = json.loads(path.read_text())
    assert list(content["sections"]) == list(PLANTED)
    for name, section in content["sections"].items():
        assert section["ended"] == "complete", name
        # What was planned is there, in a section whose process died too.
        assert list(section["figures"]) == section["planned"], name
        planted = section["figures"].pop("planted")
        kind = PLANTED[name]
        if kind == "check":
            assert planted["check"] == "failed: planted"
        else:
            assert planted["not measured"].startswith(WORDS[kind]), name
        # Nothing else failed; what is absent says what it lacks.
        others = [f for f in section["figures"].values() if "not measured" in f and not f.get("absent")]
        assert not others, name
        measured_ones = [f for f in section["figures"].values() if "not measured" not in f]
        # A rehearsal builds nothing.
        assert measured_ones or name == "build", name
    assert code == 1, "a check failed"
    assert content["machines"]["run 1"]["commit"] == "abc123"
    # Where a process hung, its last words say where.
    hung = content["sections"]["kernel times"]["figures"]
    assert len(hung) > 15, "the kernel times behind the one that hung"
    assert any(
        "hangs" in line
        for line in json.loads(path.read_text())["sections"]["kernel times"]["figures"]["planted"]["stderr"]
    )


@pytest.mark.soak
def test_the_summary_is_the_last_30_lines(failing):
    _, _, said = failing
    first = next(i for i, line in enumerate(said) if line.startswith("== "))
    summary = said[first:]
    assert len(summary) <= 30
    assert "commit abc123" in summary[0]
    for start in (
        "checks passed: cpu",
        "64k eager: cpu",
        "10k eager: cpu",
        "x an eager training",
        "real corpus: ",
    ):
        assert any(line.startswith(start) for line in summary), start
    failed = next(line for line in summary if line.startswith("checks failed: "))
    assert failed.startswith("checks failed: 2; checks, planted: planted; other checks, planted")
    errors = next(line for line in summary if line.startswith("figures that failed: "))
    assert errors.startswith(f"figures that failed: {sum(kind != 'check' for kind in PLANTED.values())}; ")
    assert summary[-1].startswith("to go on: python -m benchmarks.gpu --dry-run")
    # Every section tells, while it runs, what a figure gave or why it gave nothing.
    assert any("segfault" not in line and "crashed with SIGSEGV" in line for line in said[:first])


@pytest.mark.soak
def test_figures_hold_what_the_table_shows(failing):
    sections = json.loads(failing[0].read_text())["sections"]
    checks = sections["checks"]["figures"]
    assert {name.split()[2] for name in checks if " " in name} == {"bf16", "fp16", "fp32"}
    timed = [f for f in sections["kernel times"]["figures"].values() if "milliseconds" in f]
    assert len(timed) > 15
    for entry in timed:
        times = entry["milliseconds"]
        assert 0 < times["p20"] <= times["p50"] <= times["p80"]
        assert any(name.startswith("share of ") for name in entry)
        # The checks of this run are written beside the times.
        assert entry["check"] == "passed"
    whole = sections["end to end"]["figures"]["64k cpu eager"]
    assert whole["tokens"] == whole["samples"] * whole["length"]
    assert set(whole["milliseconds"]) == {"sketch", "training", "forward + input gradients"}
    profile = sections["end to end"]["figures"]["64k cpu eager profile"]["profile"]
    assert len(profile) > 10
    assert profile == sorted(profile, key=lambda row: -row[2])
    yardsticks = sections["yardsticks"]["figures"]
    for name in ("training, compiled", "Kronecker projections", "vmap + CountSketch"):
        entry = yardsticks[f"64k {name}"]
        assert 0 < entry["speed over it"]["p20"] <= entry["speed over it"]["p80"]
    assert yardsticks["real corpus"]["rows"] == 40
    # Batches hold samples of one length or little more.
    assert yardsticks["real corpus"]["tokens"] <= yardsticks["real corpus"]["padded tokens"]


STOPPED = ["--sections", "spectral", "kernel times"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(file, exit code, printed lines, section's process) of a rehearsal that SIGTERM ended inside a section."""
    path = tmp_path_factory.mktemp("stopped") / "stopped.json"
    process = start(path, *STOPPED, "--plant", "spectral=deaf")
    wait_for(lambda: path.exists() and '"matrix"' in path.read_text(), "the first figure of the section")
    # The section's process now waits for what never comes.
    time.sleep(1)
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=HANG_S)[0].splitlines()
    return path, process.returncode, said, child


def test_a_signal_keeps_what_was_measured_and_ends_every_process(stopped):
    path, code, said, child = stopped
    assert code == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()
    sections = json.loads(path.read_text())["sections"]
    assert len(sections["kernel times"]["figures"]) > 15
    assert list(sections["spectral"]["figures"]) == ["matrix"]
    assert len(sections["spectral"]["planned"]) == 5
    assert any(line == "stopped by SIGTERM" for line in said)
    assert said[-1].startswith("to go on: python -m benchmarks.gpu")
    assert len(said) - next(i for i, line in enumerate(said) if line.startswith("== ")) <= 30


@pytest.mark.soak
def test_a_second_call_goes_on(stopped, tmp_path):
    path = tmp_path / "again.json"
    before = json.loads(stopped[0].read_text())
    # As if one of the section that was whole had failed.
    times = before["sections"]["kernel times"]["figures"]
    failed = next(iter(times))
    times[failed] = {"not measured": "made up", "machine": "run 1"}
    path.write_text(json.dumps(before))
    code, said = rehearse(path, *STOPPED)
    after = json.loads(path.read_text())["sections"]
    # What was there is not measured again; what was missing is, and what had failed is tried once more.
    for figure in set(times) - {failed}:
        assert after["kernel times"]["figures"][figure] == times[figure]
    assert "milliseconds" in after["kernel times"]["figures"][failed]
    spectral = after["spectral"]["figures"]
    assert spectral["matrix"] == before["sections"]["spectral"]["figures"]["matrix"]
    assert list(spectral) == after["spectral"]["planned"]
    assert len(spectral) == 4
    assert {after[name]["ended"] for name in ("spectral", "kernel times")} == {"complete"}
    assert code == 0
    assert "figures that failed: 0" in said[-30:]


@pytest.mark.soak
def test_a_process_that_nothing_inside_ends_is_ended_when_its_time_is_up(benchmarks, tmp_path):
    gpu = benchmarks["gpu"]
    args = argparse.Namespace(dry_run=True, corpus=None, tokenizer=None, plant={"spectral": "deaf"})
    # On a busy machine the process may not get to what is planted in the shorter time.
    for seconds in (8, 60, 600):
        results = gpu.Results(dry=True)
        results.open(tmp_path / f"{seconds}.json", {"gpu": GPU, "capability": None})
        began = time.monotonic()
        gpu.Run(args, results, tmp_path).section("spectral", began + seconds)
        taken = time.monotonic() - began
        if "planted" in results.figures("spectral"):
            break
    section = json.loads(results.path.read_text())["sections"]["spectral"]
    assert section["figures"]["planted"]["not measured"] == "did not end by itself after its time"
    assert "milliseconds" in section["figures"]["matrix"]
    assert taken >= seconds


@pytest.mark.soak
def test_a_run_without_time_keeps_what_was_measured(failing, tmp_path):
    path = tmp_path / "late.json"
    before = json.loads(failing[0].read_text())
    del before["sections"]["spectral"]
    path.write_text(json.dumps(before))
    code, said = rehearse(path, "--seconds", "-1", GVENDI_COMMIT="abc123")
    after = json.loads(path.read_text())["sections"]
    assert after.pop("spectral")["ended"] == "out of time"
    for name, section in after.items():
        if name != "versions":
            assert section["figures"] == before["sections"][name]["figures"], name
    assert code == 1, "checks had failed"
    assert any(line == "sections not complete: build (out of time), spectral (out of time)" for line in said)


@pytest.mark.soak
def test_results_of_another_gpu_are_refused(failing, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**json.loads(failing[0].read_text()), "gpu": GPU}))
    code, said = rehearse(path, "--sections", "versions")
    assert code == 1
    assert "name another --out" in said[-1]


def test_a_process_that_cannot_even_begin_ends_its_section_alone(benchmarks, tmp_path, monkeypatch):
    gpu = benchmarks["gpu"]
    # Every process of a section fails before it has a plan.
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit) as done:
        gpu.main()
    assert "this machine cannot be described" in done.value.code
    assert not (tmp_path / "none.json").exists()


def test_the_driver_imports_no_torch():
    ask = "import sys, benchmarks.gpu.__main__; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "False"


def test_a_figure_stays_until_it_is_measured_again(benchmarks, tmp_path):
    results = benchmarks["results"].Results(dry=True)
    path, machine = tmp_path / "made_up.json", {"gpu": GPU, "capability": "9.9", "tree": "a"}
    results.open(path, machine)
    results.take("spectral", {"planned": ["x", "y"], "figures": {"x": {"found": 1}, "y": {"found": 1}}})
    changed = benchmarks["results"].Results(dry=True)
    changed.open(path, {**machine, "tree": "b"})
    # Nothing of another source counts as done, and all of it is still there.
    assert changed.figures("spectral") == {}
    changed.take("spectral", {"planned": ["x", "y"], "figures": {"x": {"found": 2}}})
    figures = json.loads(path.read_text())["sections"]["spectral"]["figures"]
    assert figures == {"x": {"found": 2, "machine": "run 2"}, "y": {"found": 1, "machine": "run 1"}}
    again = benchmarks["results"].Results(dry=True)
    again.open(path, {**machine, "tree": "b"})
    assert list(again.figures("spectral")) == ["x"]


def test_exit_code_says_whether_a_check_or_a_figure_failed(benchmarks):
    gpu = benchmarks["gpu"]

    def code(found: dict, ended: str = "complete") -> int:
        results = gpu.Results(dry=True)
        results.open(None, {"gpu": GPU, "capability": None})
        results.take("smoke", {"planned": ["x", "y"], "figures": {"x": found, "y": {"check": "passed"}}})
        results.section("smoke")["ended"] = ended
        return gpu.exit_code(results, ["smoke"])

    assert code({"found": 1}) == 0
    assert code({"not measured": "not installed", "absent": True}) == 0
    assert code({"not measured": "an error"}) == 3
    assert code({"found": 1}, "out of time") == 3
    assert code({"check": "failed: some shape"}, "out of time") == 1


def test_an_error_of_a_figure_is_written_down_and_a_lost_device_is_seen(benchmarks, monkeypatch):
    import torch

    section, timing = benchmarks["gpu_section"], benchmarks["gpu_timing"]
    bench = timing.Bench(torch.device("cpu"), dry=True)

    def absent() -> dict:
        raise timing.NotMeasuredError("not here")

    def wrong() -> dict:
        raise ValueError("first line\nsecond line")

    assert section.measure(timing.Figure("x", absent), bench, 60)[0]["absent"]
    found, lost = section.measure(timing.Figure("x", wrong), bench, 60)
    assert found["not measured"] == "ValueError: first line"
    assert not lost

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench, "wait", broken)
    found, lost = section.measure(timing.Figure("x", lambda: {"found": 1}), bench, 60)
    assert "illegal memory access" in found["not measured"]
    assert lost


def test_a_kernel_that_errs_fails_its_check_and_marks_what_rests_on_it(benchmarks, monkeypatch):
    import torch

    from gvendi_fast.kernels import ops

    checks, report = benchmarks["gpu_checks"], benchmarks["gpu_report"]
    backend = next(
        name
        for name in ("cpu", "reference")
        if not backend_called(name).why_not("fold_hadamard", torch.zeros(1, 64))
    )
    size, right = [(20, 50, 64, 64)], ops.fold_hadamard

    def check() -> dict:
        return checks.check(torch.device("cpu"), backend, "fold_hadamard", "fp32", size)

    assert check()["check"] == "passed"
    monkeypatch.setattr(ops, "fold_hadamard", lambda x, table: right(x, table) * 1.001)
    wrong = check()
    assert wrong["check"] == "failed: 20x(50,64) K=64"

    def broken(x, table):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ops, "fold_hadamard", broken)
    assert "no such kernel" in next(iter(check()["failed"].values()))["error"]

    quantiles = {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    timed = {
        "op": "fold_hadamard",
        "dtype": "fp32",
        "shape": "1 x 1",
        "milliseconds": quantiles,
        "machine": "run 1",
    }
    content = {
        "gpu": GPU,
        "capability": "9.9",
        "machines": {"run 1": {}},
        "sections": {
            "checks": {"figures": {"triton fold_hadamard fp32": {**wrong, "machine": "run 1"}}},
            "kernel times": {
                "figures": {
                    name: {**timed, "backend": name, "kernels": {"fold_hadamard": name}}
                    for name in ("triton", "cuda")
                }
            },
        },
    }
    report.check_marks(content)
    marks = {n: f["check"] for n, f in content["sections"]["kernel times"]["figures"].items()}
    assert marks == {"triton": "failed: fold_hadamard on triton: 20x(50,64) K=64", "cuda": "not checked"}
    assert report.failed_checks(content) == ["checks, triton fold_hadamard fp32: 20x(50,64) K=64"]
    # It keeps its time, and is not chosen for it.
    assert set(report.dispatch_record([content])["9.9"][GPU]["fold_hadamard"]["milliseconds"]) == {"cuda"}


def test_token_ids_of_a_corpus_travel_in_one_file(benchmarks, tmp_path):
    script = benchmarks["corpus_ids"]
    tokenizer = PACKAGE / "assets" / "tiny"
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}."} for n in range(20)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no row\n")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.corpora.token_ids",
            str(rows),
            str(tokenizer),
            str(tmp_path / "ids.npz"),
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    read = script.load_samples(str(tmp_path / "ids.npz"), None, 1 << 20)
    encoded = script.load_samples(str(rows), str(tokenizer), 1 << 20)
    assert len(read) == len(encoded) == 20
    for one, other in zip(read, encoded, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()
    error = benchmarks["gpu_timing"].NotMeasuredError
    for given, words in (
        ((None, None, 9), "no --corpus given"),
        ((str(rows), None, 9), "no --tokenizer"),
        ((str(tmp_path / "ids.npz"), None, 9), "vocabulary ends at 8"),
    ):
        with pytest.raises(error, match=words):
            script.load_samples(*given)


def test_chunked_loss_and_its_gradients_are_those_of_torch(benchmarks):
    import torch

    from benchmarks.gpu.yardsticks import ChunkedCrossEntropy

    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (50, 3000))
    labels = torch.randint(0, 50, (3000,), generator=generator)
    whole = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    chunked = ChunkedCrossEntropy.apply(weight, hidden, labels)
    torch.testing.assert_close(chunked, whole)
    for got, wanted in zip(
        torch.autograd.grad(chunked, (weight, hidden)),
        torch.autograd.grad(whole, (weight, hidden)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@pytest.fixture
def small_model(benchmarks):
    """A model of one layer in float32, and ids [4, 16]."""
    import torch

    from benchmarks.gpu import model as gpu_model

    bench = benchmarks["gpu_timing"].Bench(torch.device("cpu"), dry=True)
    model = copy.deepcopy(gpu_model.random_model(bench)).float()
    return model, gpu_model.random_ids(bench, "64k")


def test_kronecker_yardstick_projects_the_per_sample_gradients(small_model):
    import torch

    from benchmarks.gpu.yardsticks import kronecker

    model, ids = small_model
    torch.manual_seed(0)
    got = kronecker(model, ids).call()
    torch.manual_seed(0)
    layers = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    pairs = [[torch.randn(width, 32) for width in (m.in_features, m.out_features)] for m in layers]
    model.requires_grad_(True)
    for sample, found in zip(ids, got, strict=True):
        logits = model(input_ids=sample[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, sample[1:], reduction="sum").backward()
        wanted = sum(b.T @ m.weight.grad @ a for m, (a, b) in zip(layers, pairs, strict=True))
        torch.testing.assert_close(found, wanted.flatten(), rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        model.zero_grad(set_to_none=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_batch_1_yardsticks_give_one_sketch(small_model):
    import torch

    from benchmarks.gpu.yardsticks import by_vmap, one_by_one

    found = []
    for make in (by_vmap, one_by_one):
        torch.manual_seed(0)
        found.append(make(*small_model).call())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


@pytest.mark.soak
def test_table_of_a_made_up_gpu(benchmarks, made_up, tmp_path):
    found = table(benchmarks, made_up, tmp_path)
    assert not {figure for figure, cells in found.items() if any("not measured" in cell for cell in cells)}
    assert (
        next(c[0] for f, c in found.items() if f.endswith("fast as an eager training step")) == "at least 1.3"
    )
    assert (
        next(c[0] for f, c in found.items() if f.endswith("fast as a compiled training step"))
        == "at least 1.0"
    )
    assert (
        next(c[0] for f, c in found.items() if "compiled: tokens sketched" in f)
        == "at least 200,000 on one H200"
    )
    assert "3.0 GiB" in cell(found, "peak memory")
    for start in (
        "kernel checks",
        "Qwen2.5",
        "all sketch",
        "`dense_sketch`",
        "entropy of",
        "entropies of",
        "kernels",
    ):
        assert cell(found, start), start
    assert "triton" in cell(found, "`linear_sketch`")
    assert "cuda" in cell(found, "`linear_sketch`")
    text = benchmarks["report"].render(tmp_path)
    assert f"Measured on {GPU}" in text
    assert "commits abc123" in text


@pytest.mark.soak
def test_table_says_what_is_not_measured(benchmarks, made_up, tmp_path):
    empty = {figure.split(",")[0] for figure in table(benchmarks, {**made_up, "dry run": True}, tmp_path)}
    sections = made_up["sections"]
    del sections["spectral"]
    for name, entry in sections["kernel times"]["figures"].items():
        if name.startswith("cuda linear_sketch"):
            entry.clear()
            entry.update({"not measured": "some reason", "machine": "run 1"})
        if name.startswith("triton linear_sketch"):
            entry["check"] = "failed: some shape"
    sections["yardsticks"]["figures"]["64k training, eager"] = {
        "not measured": "no memory",
        "machine": "run 1",
    }
    sections["checks"]["ended"] = "out of time"
    found = table(benchmarks, made_up, tmp_path)
    # Every figure has a line, whatever was measured.
    assert empty <= {figure.split(",")[0] for figure in found}
    assert cell(found, "entropy of a 1024 x 1024 matrix") == "not measured"
    assert "(not all were run)" in cell(found, "kernel checks")
    training = next(c[1] for f, c in found.items() if f.endswith("fast as an eager training step"))
    assert training.startswith("64k not measured: no memory; 16k ")
    sketched = [cells[1] for figure, cells in found.items() if figure.startswith("`linear_sketch`")]
    assert any("(check failed: some shape)" in cell for cell in sketched)
    assert any("cuda not measured: some reason" in cell for cell in sketched)


@pytest.mark.soak
def test_dry_runs_are_not_reported(benchmarks, failing, tmp_path):
    (tmp_path / "dry.json").write_text(failing[0].read_text())
    assert benchmarks["gpu_report"].gpu_results(tmp_path) == []
    assert "## On a GPU\n\nNot measured." in benchmarks["report"].render(tmp_path)


@pytest.mark.soak
def test_record_of_a_made_up_gpu_puts_the_faster_backend_first(benchmarks, made_up, tmp_path):
    path = tmp_path / "made_up_record.json"
    path.write_text(json.dumps(benchmarks["gpu_report"].dispatch_record([made_up])))
    record = measured.load(path)
    found = measured.order("linear_sketch", ORDER["cuda"], GPU, "9.9", record)
    assert found.names == ("cuda", "triton", "reference")
    assert found.ratio == f"cuda measured 2.00 times as fast as triton on {GPU}"
    entry = record["9.9"][GPU]["linear_sketch"]
    assert entry["measured"]["cuda"]["date"] == "made up"
    assert entry["measured"]["cuda"]["commit"] == "abc123"


def test_without_a_gpu_s_results_the_record_is_empty(benchmarks):
    assert benchmarks["gpu_report"].dispatch_record([]) == {}
