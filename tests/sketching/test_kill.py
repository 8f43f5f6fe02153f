"""Killed at random moments and started again, a run ends with the same bytes and the same score.

The kills must hit a process that has not ended, while it loads or works; a run that gets done between kills is
compared and the next one begins.
"""

import json
import random
import time
from pathlib import Path

import pytest
from children import children
from run_contents import contents

ROWS = 84


def write_corpus(path: Path) -> None:
    generator = random.Random(0)
    words = "alpha beta gamma delta seven nine red blue sum of and minus the a".split()
    with path.open("w") as stream:
        for i in range(ROWS):
            prompt, completion = (
                " ".join(generator.choices(words, k=generator.randint(3, 25))) for _ in range(2)
            )
            row = {"id": f"r{i if i % 40 else 0}", "prompt": prompt, "completion": completion}
            stream.write("not json\n" if i % 17 == 5 else json.dumps(row) + "\n")


def sketch(corpus: str, out: str) -> None:
    import torch

    from gvendi_fast.kernels.sketch_matrix import SketchSpec
    from gvendi_fast.sketching.corpus import Settings, sketch_corpus
    from gvendi_fast.sketching.proxy.load import load_proxy

    torch.set_num_threads(1)
    settings = Settings(spec=SketchSpec(dim=256), unit_rows=6, batch_tokens=256)
    sketch_corpus(corpus, out, load_proxy("tiny", dtype="float32"), settings)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_and_resumed_run_gives_the_same_bytes_and_score(kills, tmp_path):
    from gvendi_fast.analysis.scoring import score_run
    from gvendi_fast.data.run_directory import RunDirectory

    corpus = tmp_path / "data.jsonl"
    write_corpus(corpus)
    # A server that has imported everything, so that a kill hits the run and not its imports.
    context = children()

    def start(out: Path):
        process = context.Process(target=sketch, args=(str(corpus), str(out)))
        process.start()
        return process

    whole = tmp_path / "whole"
    began = time.monotonic()
    process = start(whole)
    process.join()
    assert process.exitcode == 0
    seconds = time.monotonic() - began

    killed, finished, generator = 0, [], random.Random(1)
    folder = tmp_path / "killed-0"
    while killed < kills:
        process = start(folder)
        process.join(timeout=generator.uniform(0, seconds))
        if process.exitcode is None:
            process.kill()
            killed += 1
        process.join()
        if process.exitcode == 0:
            finished.append(folder)
            folder = tmp_path / f"killed-{len(finished)}"
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    for done in [*finished, folder]:
        assert contents(done) == contents(whole)
        assert score_run(RunDirectory.load(done)) == score_run(RunDirectory.load(whole))
