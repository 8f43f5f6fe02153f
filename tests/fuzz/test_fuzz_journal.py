"""Files of a synthesis with small changes: what was decided up to a block, or an error."""

import json
import random

import numpy as np
import pytest
from fuzz.mutations import (
    WrongResultError,
    as_json,
    check,
    files_of,
    fuzz,
    mutated_bytes,
    mutated_lines,
    mutated_value,
    restore_files,
)

from gvendi_fast.synthesis.disk.journal import (
    ACCEPTED,
    EVENTS,
    FINGERPRINT,
    REJECTED,
    SKETCHES,
    Journal,
)

DIM, BLOCKS, TARGET = 16, 6, 1000
SETTINGS = {
    "settings": {"seed": 0, "block": 4, "proxy": {"name": "tiny", "dim": DIM}},
    "rules": 1,
    "seeds": "3f2a",
}
NAMES = (ACCEPTED, REJECTED, SKETCHES, EVENTS, FINGERPRINT)


def write_journal(folder):
    """Blocks of a run; returns what stands there after each of them."""
    folder.mkdir()
    r, draws = random.Random(0), np.random.default_rng(0)
    journal, pool, joined, states = Journal(folder, SETTINGS, TARGET), 10, 0, []
    states.append(state(journal))
    journal.start({"pool": pool})
    journal.round(0, {"pool": pool, "clusters": 4})
    for number in range(BLOCKS):
        taken = r.randint(0, 3)
        accepted = [
            {"id": f"a{number}-{i}", "prompt": f"question {r.random()}", "gain": r.random()}
            for i in range(taken)
        ]
        rejected = [
            {"id": f"r{number}-{i}", "stage": "accept", "reason": "dense\u2028"} for i in range(4 - taken)
        ]
        sketches = draws.standard_normal((taken, DIM)).astype(np.float32)
        pool += taken
        joined += taken
        event = {
            "block": number,
            "pool": pool,
            "accepted": joined,
            "decided": 4,
            "rejected": {"accept": 4 - taken},
            "cut_short": False,
        }
        journal.block(accepted, rejected, sketches, event)
        states.append(state(journal))
    journal.close()
    return states


def state(journal):
    """What a run goes on from."""
    told = ("block", "pool", "accepted", "decided", "rejected", "cut_short", "bytes")
    blocks = [[block[key] for key in told] for block in journal.blocks]
    return blocks, journal.accepted(), journal.sketches(DIM).tobytes(), journal.rejections()


def mutate(r, path):
    content = path.read_bytes()
    kind = r.random()
    if kind < 0.4:
        path.write_bytes(mutated_bytes(r, content))
    elif kind < 0.6:
        path.write_bytes(mutated_lines(r, content))
    elif kind < 0.65:
        path.unlink()
    elif path.name == SKETCHES:
        rows = [content[i : i + 4 * DIM] for i in range(0, len(content), 4 * DIM)]
        r.shuffle(rows)
        path.write_bytes(b"".join(rows))
    elif path.name == FINGERPRINT:
        path.write_bytes(as_json(r, mutated_value(r, json.loads(content))))
    else:
        lines = content.splitlines(keepends=True)
        at = r.randrange(len(lines))
        value = mutated_value(r, json.loads(lines[at]))
        text = json.dumps(value, ensure_ascii=r.random() < 0.5)
        lines[at] = text.encode("utf-8", "surrogatepass") + b"\n"
        path.write_bytes(b"".join(lines))


def fuzz_journal(count, seed, folder):
    states = write_journal(folder / "whole")
    originals, here = files_of(folder / "whole"), folder / "here"
    here.mkdir()

    def case(number):
        r = random.Random(f"{seed}|journal|{number}")
        mutate(r, here / r.choice(NAMES))
        journal = Journal(here, SETTINGS, TARGET)
        try:
            found = state(journal)
        finally:
            journal.close()
        if found not in states:
            raise WrongResultError("rows, sketches and events are those of no moment of the run")
        return "as written" if found == states[-1] else "as of an earlier block"

    return fuzz("a synthesis' journal", count, case, lambda: restore_files(here, originals))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [300, pytest.param(8000, marks=pytest.mark.soak)])
def test_a_changed_journal_goes_on_from_a_moment_of_the_run_or_is_refused(count, tmp_path, capsys):
    check(fuzz_journal(count, count, tmp_path), count, capsys)
