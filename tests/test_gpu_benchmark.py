"""The GPU benchmark goes through its sections on any machine, and the report reads what it writes.

The results files in here are made up: a dry run's, relabelled as that of a GPU that does not exist.
"""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

from gvendi_fast.backends import ORDER, measured

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
GPU = "Made-up GPU"
MACHINE = {"gpu": GPU, "driver": "0", "cuda": "0", "triton": "0", "transformers": "0", "date": "made up"}


@pytest.fixture(scope="module")
def benchmarks():
    """The benchmark scripts, importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import gpu
        import gpu_report
        import report

        yield {"gpu": gpu, "gpu_report": gpu_report, "report": report}


def run(gpu, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu.py", *arguments])
        with pytest.raises(SystemExit) as done:
            gpu.main()
    return done.value.code


@pytest.fixture(scope="module")
def dry(benchmarks, tmp_path_factory):
    """The file of a dry run of all sections."""
    path = tmp_path_factory.mktemp("dry") / "dry.json"
    assert run(benchmarks["gpu"], "--dry-run", "--out", str(path)) == 0
    return path


@pytest.fixture
def made_up(dry):
    """A results file of a GPU that does not exist: triton as the dry run's kernels, cuda twice as fast."""
    content = json.loads(dry.read_text())
    content |= {"gpu": GPU, "capability": "9.9", "dry run": False}
    sections = content["sections"]
    for kind in ("checks", "other checks", "times"):
        own = next(sections.pop(name) for name in list(sections) if name.startswith(f"{kind} "))
        sections |= {f"{kind} {backend}": copy.deepcopy(own) for backend in ("triton", "cuda")}
    for entry in sections["times cuda"]["found"]["operations"]:
        if "milliseconds" in entry:
            entry["milliseconds"] = {q: value / 2 for q, value in entry["milliseconds"].items()}
    sections["end to end"]["found"]["peak memory bytes"] = 3 << 30
    for section in sections.values():
        section["machine"] |= MACHINE
    return content


def table(benchmarks, content: dict, folder: Path) -> dict[str, list[str]]:
    """{figure: the other cells} of the GPU table that the report makes of one results file."""
    (folder / "made-up-gpu.json").write_text(json.dumps(content))
    rendered = benchmarks["report"].render(folder).split("**On a GPU")[1]
    lines = [line.strip("| ").split(" | ") for line in rendered.splitlines() if line.startswith("|")]
    assert lines[0] == ["figure", "goal", "measured", "compared to"]
    return {line[0]: line[1:] for line in lines[2:]}


def test_dry_run_goes_through_every_section(dry):
    sections = json.loads(dry.read_text())["sections"]
    for name in ("end to end", "cpu and gpu", "spectral"):
        assert name in sections
    checked = next(s["found"] for name, s in sections.items() if name.startswith("checks "))
    assert checked["complete"]
    assert {op.split()[1] for op in checked["operations"]} == {"bf16", "fp16", "fp32"}
    assert not any(entry["failed"] for entry in checked["operations"].values())
    timed = next(s["found"] for name, s in sections.items() if name.startswith("times "))
    figures = [entry for entry in timed["operations"] if "milliseconds" in entry]
    assert len(figures) > 10
    for entry in figures:
        times = entry["milliseconds"]
        assert 0 < times["p20"] <= times["p50"] <= times["p80"]
        assert any(name.startswith("share of ") for name in entry)
    whole = sections["end to end"]["found"]
    assert whole["tokens"] == whole["samples"] * whole["length"]
    for section in sections.values():
        assert section["machine"]["commit"]


def test_one_section_again_replaces_that_section_alone(benchmarks, dry, tmp_path):
    path = tmp_path / "again.json"
    before = json.loads(dry.read_text())
    for section in before["sections"].values():
        section["machine"]["date"] = "made up"
    path.write_text(json.dumps(before))
    assert run(benchmarks["gpu"], "--dry-run", "--out", str(path), "--sections", "spectral") == 0
    after = json.loads(path.read_text())["sections"]
    assert after.pop("spectral")["machine"]["date"] != "made up"
    before["sections"].pop("spectral")
    assert after == before["sections"]


def test_a_run_without_time_keeps_what_was_measured(benchmarks, dry, tmp_path):
    path = tmp_path / "late.json"
    path.write_text(dry.read_text())
    assert run(benchmarks["gpu"], "--dry-run", "--out", str(path), "--seconds", "-1") == 0
    assert json.loads(path.read_text()) == json.loads(dry.read_text())


def test_a_section_cut_short_does_not_replace_a_whole_one(benchmarks, tmp_path):
    results = benchmarks["gpu"].Results(tmp_path / "made_up.json", GPU, "9.9", True)
    for found in ({"complete": False}, {"complete": True, "x": 1}, {"complete": False}):
        results.keep("times cuda", found, 1.0)
    assert json.loads(results.path.read_text())["sections"]["times cuda"]["found"] == {
        "complete": True,
        "x": 1,
    }


def test_results_of_another_gpu_are_refused(benchmarks, dry, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**json.loads(dry.read_text()), "gpu": GPU}))
    assert "name another --out" in run(benchmarks["gpu"], "--dry-run", "--out", str(path))


def test_an_operation_whose_check_failed_is_not_timed(benchmarks, dry):
    checks = next(
        s["found"] for n, s in json.loads(dry.read_text())["sections"].items() if n.startswith("checks ")
    )
    verdict = benchmarks["gpu"].check.__globals__["verdict"]
    assert verdict(checks, "linear_sketch", "bf16") is None
    checks["operations"]["linear_sketch bf16"]["failed"] = {"some shape": {}}
    assert verdict(checks, "linear_sketch", "bf16") == "check failed: some shape"
    assert verdict(checks, "no_such_op", "bf16") == "not checked"


def test_a_kernel_that_errs_fails_the_run_and_is_not_timed(benchmarks, tmp_path, monkeypatch):
    from gvendi_fast import ops

    right = ops.fold_hadamard
    monkeypatch.setattr(ops, "fold_hadamard", lambda x, table: right(x, table) * 1.001)
    path = tmp_path / "wrong.json"
    name = benchmarks["gpu"].COMPILED["cuda" if torch.cuda.is_available() else "cpu"][0]
    code = run(benchmarks["gpu"], "--dry-run", "--out", str(path), "--sections", f"times {name}")
    assert code == 1
    found = json.loads(path.read_text())["sections"]
    reasons = {e["op"]: e.get("not timed") for e in found[f"times {name}"]["found"]["operations"]}
    assert reasons["fold_hadamard"].startswith("check failed")
    assert reasons["linear_sketch"] is None


def test_table_of_a_made_up_gpu(benchmarks, made_up, tmp_path):
    found = table(benchmarks, made_up, tmp_path)
    assert not any("not measured" in cell for cells in found.values() for cell in cells)
    assert found["times as fast as training on the same batch"][0] == "at least 1.3"
    assert "3.0 GiB" in next(cells[1] for figure, cells in found.items() if figure.startswith("peak memory"))
    for figure in ("kernel checks", "Qwen2.5", "all sketch", "`dense_sketch`", "entropy of", "entropies of"):
        assert any(name.startswith(figure) for name in found), figure
    sketched = next(cells[1] for figure, cells in found.items() if figure.startswith("`linear_sketch`"))
    assert "triton" in sketched
    assert "cuda" in sketched
    text = benchmarks["report"].render(tmp_path)
    assert f"Measured on {GPU}" in text


def test_table_says_what_is_not_measured(benchmarks, made_up, tmp_path):
    empty = {figure.split(",")[0] for figure in table(benchmarks, {**made_up, "dry run": True}, tmp_path)}
    del made_up["sections"]["times cuda"], made_up["sections"]["spectral"]
    made_up["sections"]["end to end"]["found"] = {"not measured": "some reason"}
    for entry in made_up["sections"]["times triton"]["found"]["operations"]:
        if entry["op"] == "linear_sketch":
            entry.pop("milliseconds", None)
            entry["not timed"] = "check failed: some shape"
    found = table(benchmarks, made_up, tmp_path)
    # Every figure has a line, whatever was measured.
    assert empty <= {figure.split(",")[0] for figure in found}
    assert found["entropy of a 1024 x 1024 matrix"][1] == "not measured"
    assert found["times as fast as training on the same batch"][1] == "not measured: some reason"
    sketched = next(cells[1] for figure, cells in found.items() if figure.startswith("`linear_sketch`"))
    assert sketched == "triton not timed (check failed: some shape)"


def test_dry_runs_are_not_reported(benchmarks, dry, tmp_path):
    (tmp_path / "dry.json").write_text(dry.read_text())
    assert benchmarks["gpu_report"].gpu_results(tmp_path) == []
    assert "**On a GPU**: not measured." in benchmarks["report"].render(tmp_path)


def test_record_of_a_made_up_gpu_puts_the_faster_backend_first(benchmarks, made_up, tmp_path):
    path = tmp_path / "made_up_record.json"
    path.write_text(json.dumps(benchmarks["gpu_report"].dispatch_record([made_up])))
    record = measured.load(path)
    found = measured.order("linear_sketch", ORDER["cuda"], GPU, "9.9", record)
    assert found.names == ("cuda", "triton", "reference")
    assert found.ratio == f"cuda measured 2.00 times as fast as triton on {GPU}"
    entry = record["9.9"][GPU]["linear_sketch"]
    assert entry["measured"]["cuda"]["date"] == "made up"
    assert entry["measured"]["cuda"]["commit"]


def test_without_a_gpu_s_results_the_record_is_empty(benchmarks):
    assert benchmarks["gpu_report"].dispatch_record([]) == {}
