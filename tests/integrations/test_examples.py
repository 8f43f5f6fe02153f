"""The examples of docs/examples run, and show what they say."""

import json
import os
import runpy
import subprocess
import sys

import pytest
from places import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_a_plain_loop_in_short():
    [first, last] = main_of("plain_loop")(4)
    assert first["step"] == 2
    assert last["samples/window"] == 16
    assert 1 < last["gvendi/window"] <= 16


@pytest.mark.soak
def test_a_plain_loop_shows_that_its_data_gets_poorer():
    series = main_of("plain_loop")(60)
    half = len(series) // 2
    # Of windows that lie in one half, filled.
    rich, poor = series[half - 1], series[-1]
    assert poor["gvendi/window"] < 0.6 * rich["gvendi/window"]
    assert poor["loss"] < rich["loss"]


@pytest.mark.soak
def test_packing_shows_the_source_that_repeats_itself():
    pytest.importorskip("trl", reason="needs trl, whose trainer it runs")
    last = main_of("sft_packing")(20)[-1]
    per_sample = {
        source: last[f"diversity/gvendi/source/{source}"] / last[f"diversity/samples/source/{source}"]
        for source in ("sums", "days", "pleasantries")
    }
    assert min(per_sample, key=per_sample.__getitem__) == "pleasantries"


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_lightning_shows_the_narrow_source():
    pytest.importorskip("lightning", reason="needs lightning, whose trainer it runs")
    figures = main_of("lightning_module")(16)
    assert figures["samples/window"] == 16 * 8
    assert figures["similarity/source/ten sentences"] > figures["similarity/source/sums"]


@pytest.mark.soak
def test_two_processes_agree_on_what_both_have_seen():
    code = (
        "import json, runpy; "
        f"print('series', json.dumps(runpy.run_path({str(EXAMPLES / 'torchrun_two.py')!r})['main'](4)))"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--no-python", sys.executable, "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [
        json.loads(line.partition("series ")[2]) for line in done.stdout.splitlines() if "series [" in line
    ]
    assert len(found) == 2
    for (own, joined), (other, again) in zip(*found, strict=True):
        assert joined == again
        assert max(own, other) < joined
