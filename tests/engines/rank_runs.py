"""Ranks as processes of their own, forked from a server that has imported what they need."""

import os
import random
import signal
import time
from pathlib import Path

from children import children

from gvendi_fast.data.leases import Terms

WORDS = "alpha beta gamma delta seven nine red blue sum of and minus the a".split()


def write_corpus(path: Path, rows: int) -> Path:
    """Rows of a few words, some of which cannot be read."""
    draw = random.Random(0)
    with path.open("w") as stream:
        for row in range(rows):
            text = " ".join(draw.choices(WORDS, k=draw.randint(5, 25)))
            stream.write("not json\n" if row % 17 == 5 else f'{{"text": "{text}"}}\n')
    return path


def sketch(
    corpus: Path,
    out: Path,
    rank: int = 0,
    world: int = 1,
    terms: Terms | None = None,
    poison: str = "",
    stops_at: int | None = None,
):
    """A command as one rank does it: (the run directory, the engine).

    poison: what becomes of work unit 1 here. stops_at: a rank that hangs there.
    """
    import torch

    from gvendi_fast.base.engine import LocalEngine
    from gvendi_fast.engines import RanksEngine
    from gvendi_fast.kernels.sketch_matrix import SketchSpec
    from gvendi_fast.sketching import unit_worker
    from gvendi_fast.sketching.corpus import Settings, sketch_corpus
    from gvendi_fast.sketching.proxy.load import load_proxy

    torch.set_num_threads(1)
    if poison or stops_at is not None:
        unit_worker.UnitWorker._read = _poisoned(unit_worker.UnitWorker._read, poison, stops_at)
    engine = LocalEngine() if world == 1 else RanksEngine(rank, world, run_id="one command")
    settings = Settings(
        spec=SketchSpec(dim=64), unit_rows=2, batch_tokens=256, terms=terms or Terms(lease_s=1.0)
    )
    return sketch_corpus(
        str(corpus), str(out), load_proxy("tiny", dtype="float32"), settings, engine=engine
    ), engine


def sketch_and_score(corpus: Path, out: Path, rank: int, world: int, notes: Path) -> None:
    """`score --out` as one rank does it. notes: gets "score-0" with the score, "passes-0" with names of its passes."""
    from gvendi_fast.analysis.scoring import score_run
    from gvendi_fast.engines.shared_passes import SharedPasses

    run, engine = sketch(corpus, out, rank, world)
    names, name_of = [], SharedPasses._of

    def noted(passes, make, items):
        names.append(name_of(passes, make, items).name)
        return out / "passes" / names[-1]

    SharedPasses._of = noted
    score = score_run(run, engine=engine)
    (notes / f"score-{rank}").write_text(repr(score.to_dict()))
    (notes / f"passes-{rank}").write_text("\n".join(names))


def _poisoned(read, poison: str, stops_at: int | None):
    def poisoned(worker, reader, unit):
        if unit.ordinal == stops_at:
            os.kill(os.getpid(), signal.SIGSTOP)
        if unit.ordinal == 1 and poison == "error":
            raise RuntimeError("poisoned")
        if unit.ordinal == 1 and poison == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while unit.ordinal == 1 and poison == "hang":
            time.sleep(0.1)
        return read(worker, reader, unit)

    return poisoned


def start(*words, target=sketch, **named):
    """A process that sketches."""
    process = children().Process(target=target, args=words, kwargs=named)
    process.start()
    return process
