"""The memory of a run does not grow with the corpus: nine times the rows leave the peak where it was."""

import json
import subprocess
import sys

import pytest

ROWS, DIM, UNIT_ROWS = 60, 8192, 20
# Sketches of the 8 N further rows would take this many bytes if they stayed.
KEPT = 8 * ROWS * DIM * 4
# What the allocator's fragments and caches may add; a run that kept a third of its sketches would exceed it.
BOUND = KEPT // 3

CODE = """
import resource, sys
import torch
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.proxy.load import load_proxy
from gvendi_fast.sketching.corpus import Settings, sketch_corpus

torch.set_num_threads(1)
proxy = load_proxy("tiny", dtype="float32", device="cpu")
settings = Settings(spec=SketchSpec(dim=int(sys.argv[1])), unit_rows=int(sys.argv[2]), batch_tokens=512)
for corpus in sys.argv[3:]:
    run = sketch_corpus(corpus, corpus + "-run", proxy, settings)
    print(run.units_done, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.soak
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts KiB on Linux only")
def test_nine_times_the_rows_do_not_raise_the_peak(tmp_path):
    paths = []
    for name, rows in (("small", ROWS), ("large", 9 * ROWS)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"prompt": f"What is {i} plus {i % 7}?", "completion": f"It is {i + i % 7}."})
                + "\n"
                for i in range(rows)
            )
        )
        paths.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(DIM), str(UNIT_ROWS), *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    (units, small), (more_units, large) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (units, more_units) == (ROWS // UNIT_ROWS, 9 * ROWS // UNIT_ROWS)
    assert 1024 * (large - small) < BOUND, f"the peak grew by {large - small} KiB"
