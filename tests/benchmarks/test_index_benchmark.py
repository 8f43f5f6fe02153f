"""The benchmark of the index, on a corpus of some kilobytes."""

import json

import pytest

from benchmarks.speed import index as benchmark


@pytest.mark.parametrize("has_ids", [False, True])
def test_a_corpus_is_measured_in_this_process(tmp_path, has_ids):
    size = benchmark.write_corpus(tmp_path, 40_000, 4, has_ids)
    files = sorted(tmp_path.iterdir())
    assert size == sum(file.stat().st_size for file in files)
    assert 40_000 < size < 50_000
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len({line.get("id") for line in lines}) == (len(lines) if has_ids else 1)
    found = benchmark.measure(tmp_path, {"this process": None}, 1, size)
    assert (found["bytes"], found["rows"], found["units"]) == (size, len(lines), 4)
    assert found["this process"]["MB/s"] > 0


@pytest.mark.soak
def test_worker_processes_find_the_same(tmp_path, capsys):
    out = tmp_path / "found.json"
    found = benchmark.main(
        ["--gb", "0.0001", "--files", "3", "--rounds", "1", "--workers", "2", f"--out={out}"]
    )
    assert json.loads(out.read_text()) == found
    assert found["with ids"]["2 workers"]["MB/s"] > 0
    assert json.loads(capsys.readouterr().out) == found
