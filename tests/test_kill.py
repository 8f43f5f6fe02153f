"""Killed at random moments and started again, a run ends with the same bytes and the same score."""

import hashlib
import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest

KILLS = 20
ROWS = 240


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

    from gvendi_fast.plan import SketchSpec
    from gvendi_fast.proxy import load_proxy
    from gvendi_fast.sketching import Settings, sketch_corpus

    torch.set_num_threads(1)
    settings = Settings(spec=SketchSpec(dim=256), unit_rows=12, batch_tokens=256)
    sketch_corpus(corpus, out, load_proxy("tiny", dtype="float32"), settings)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.timeout(400)
def test_killed_and_resumed_run_gives_the_same_bytes_and_score(tmp_path):
    from gvendi_fast.scoring import score_run
    from gvendi_fast.store import RunDirectory

    corpus = tmp_path / "data.jsonl"
    write_corpus(corpus)
    # A server that has imported everything, so that a kill hits the run and not its imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gvendi_fast.sketching", "transformers.models.qwen2.modeling_qwen2"])

    def start(out: Path):
        process = context.Process(target=sketch, args=(str(corpus), str(out)))
        process.start()
        return process

    whole = tmp_path / "whole"
    process = start(whole)
    process.join()
    assert process.exitcode == 0
    # Warm by now: the second run says how long one takes.
    began = time.monotonic()
    process = start(tmp_path / "timed")
    process.join()
    seconds = time.monotonic() - began

    killed = tmp_path / "killed"
    moments, hits, generator = [], 0, random.Random(1)
    for _ in range(KILLS):
        process = start(killed)
        # Mostly early in what is left, so that twenty kills meet a run that still has work to do.
        delay = generator.uniform(0.3, 0.3 + seconds / 4)
        process.join(timeout=delay)
        if process.exitcode is None:
            process.kill()
            hits += 1
        process.join()
        moments.append(len(list(killed.glob("parts/*.parquet"))))
    # The corpus must be long enough for kills to land inside it.
    assert hits >= KILLS // 2, (hits, moments, seconds)
    process = start(killed)
    process.join()
    assert process.exitcode == 0
    assert contents(killed) == contents(whole)
    assert score_run(RunDirectory.load(killed)) == score_run(RunDirectory.load(whole))
