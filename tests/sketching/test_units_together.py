"""Work units that share batches, as on a GPU: the same rows and sketches, less padding, nothing finished is lost."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import children
from hangs import wait_for
from run_contents import contents

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Silent
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching import unit_worker
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy
from gvendi_fast.sketching.unit_worker import UnitWorker

ALONE = Settings(spec=SketchSpec(dim=64), unit_rows=8, batch_tokens=512)
TOGETHER = replace(ALONE, rows_together=48)
ROWS = 100
WORDS = "alpha beta gamma delta seven nine red blue sum of and minus the a".split()


@pytest.fixture(scope="module")
def proxy():
    return load_proxy("tiny", dtype="float32")


def write_corpus(path: Path) -> Path:
    generator = random.Random(0)
    with path.open("w") as stream:
        for i in range(ROWS):
            prompt, completion = (
                " ".join(generator.choices(WORDS, k=generator.randint(3, 25))) for _ in range(2)
            )
            row = {"id": f"r{i}", "prompt": prompt, "completion": completion}
            # A row here and there, and the whole third unit, cannot be scored.
            stream.write("not json\n" if i % 17 == 5 or 16 <= i < 24 else json.dumps(row) + "\n")
    return path


REFUSED = sum(i % 17 == 5 or 16 <= i < 24 for i in range(ROWS))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "d.jsonl")


class Counted(Silent):
    def __init__(self):
        self.rows = self.tokens = self.rejected = 0
        self.began = None

    def start(self, rows, done):
        self.began = rows, done

    def advance(self, rows, tokens, rejected):
        self.rows, self.tokens, self.rejected = (
            self.rows + rows,
            self.tokens + tokens,
            self.rejected + rejected,
        )


@pytest.fixture
def batches(monkeypatch):
    """Every batch that goes to the proxy, in order."""
    seen, plain = [], unit_worker.sketch_batch
    monkeypatch.setattr(
        unit_worker, "sketch_batch", lambda s, batch, pad: seen.append(batch) or plain(s, batch, pad)
    )
    return seen


def padded(batches) -> int:
    return sum(len(batch) * max(s.length for s in batch) for batch in batches)


def assert_same(one: RunDirectory, other: RunDirectory) -> None:
    assert sorted(p.name for p in one.parts.iterdir()) == sorted(p.name for p in other.parts.iterdir())
    assert list(one.rejected()) == list(other.rejected())
    for a, b in zip(one.iterate(), other.iterate(), strict=True):
        assert (a.ids, a.tokens.tolist()) == (b.ids, b.tokens.tolist())
        z, other_z = torch.tensor(a.sketches).double(), torch.tensor(b.sketches).double()
        # Sums over another padded length, in float32.
        assert ((z - other_z).norm(dim=1) <= 1e-5 * z.norm(dim=1)).all()


def test_same_rows_and_sketches_with_less_padding_and_fewer_batches(proxy, data, tmp_path, batches):
    first, second = Counted(), Counted()
    one = sketch_corpus(data, tmp_path / "a", proxy, ALONE, first)
    alone = list(batches)
    batches.clear()
    other = sketch_corpus(data, tmp_path / "b", proxy, TOGETHER, second)
    assert_same(one, other)
    assert one.units_done == other.units_done == 13
    tokens = sum(s.length for batch in alone for s in batch)
    for counted in (first, second):
        assert counted.began == (ROWS, 0)
        assert (counted.rows, counted.tokens, counted.rejected) == (ROWS, tokens, REFUSED)
    # Units of 8 rows in batches of their own, against three groups: of 48 rows, 48 and 4.
    assert (len(alone), len(batches)) == (23, 14)
    # 17 % of the tokens were padding, and 9 % are.
    assert (padded(alone), padded(batches), tokens) == (6158, 5608, 5102)


def test_one_unit_at_a_time_gives_the_bytes_of_a_cpu_run(proxy, data, tmp_path):
    assert contents(sketch_corpus(data, tmp_path / "a", proxy, ALONE).path) == contents(
        sketch_corpus(data, tmp_path / "b", proxy, replace(ALONE, rows_together=1)).path
    )


def test_only_a_gpu_run_puts_units_together(proxy, data, tmp_path, monkeypatch):
    asked, plain = [], UnitWorker._groups
    monkeypatch.setattr(UnitWorker, "_groups", lambda *args: asked.append(args[-1]) or plain(*args))
    sketch_corpus(data, tmp_path / "a", proxy, ALONE)
    sketch_corpus(data, tmp_path / "b", replace(proxy, device=torch.device("cuda")), ALONE)
    sketch_corpus(data, tmp_path / "c", proxy, TOGETHER)
    assert asked == [1, unit_worker.ROWS_TOGETHER, 48]


def test_long_rows_bound_the_group(proxy, data, tmp_path, monkeypatch, batches):
    monkeypatch.setattr(unit_worker, "TOKENS_TOGETHER", 1)
    sketch_corpus(data, tmp_path / "a", proxy, TOGETHER)

    assert all(len({(s.line - 1) // 8 for s in batch}) == 1 for batch in batches)


def test_a_unit_is_written_when_its_last_batch_is_in(proxy, tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    # The first unit has the short rows, so the second is whole first.
    words = [2] * 8 + [40] * 8
    path.write_text("".join(json.dumps({"prompt": "p", "completion": "a " * n}) + "\n" for n in words))
    stored, plain = [], unit_worker.sketch_batch

    def sketch(sketcher, batch, pad):
        stored.append(sorted(p.name for p in (tmp_path / "run").rglob("*.parquet")))
        return plain(sketcher, batch, pad)

    monkeypatch.setattr(unit_worker, "sketch_batch", sketch)
    run = sketch_corpus(path, tmp_path / "run", proxy, replace(TOGETHER, batch_tokens=256))
    assert run.units_done == 2
    assert len(stored) > 1
    assert stored[0] == []
    assert stored[-1] == [sorted(p.name for p in run.parts.glob("*.parquet"))[1]]


@pytest.mark.parametrize(("allowed", "counted", "kept"), [(4, 8, {2}), (9, 10, {0, 2, 4})])
def test_max_rejected_ends_the_run_and_keeps_every_whole_unit(proxy, data, tmp_path, allowed, counted, kept):
    # The first group, units 0 to 5, refuses 1, 0, 8, 0, 1 and 0 rows; unit 2 has no sample to wait for.
    with pytest.raises(GvendiError, match=f"{counted} rows are rejected and --max-rejected allows {allowed}"):
        sketch_corpus(data, tmp_path / "a", proxy, replace(TOGETHER, max_rejected=allowed))
    run = RunDirectory.load(tmp_path / "a")
    done = {i for i in range(13) if run.has_part(i)}
    assert kept <= done <= set(range(6))
    assert sum(1 for _ in run.rejected()) == counted


def test_resumed_run_keeps_what_was_finished(proxy, data, tmp_path, monkeypatch):
    whole = sketch_corpus(data, tmp_path / "whole", proxy, ALONE)
    plain, calls = unit_worker.sketch_batch, []

    def fail(sketcher, batch, pad):
        calls.append(batch)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return plain(sketcher, batch, pad)

    monkeypatch.setattr(unit_worker, "sketch_batch", fail)
    with pytest.raises(KeyboardInterrupt):
        sketch_corpus(data, tmp_path / "run", proxy, TOGETHER)
    stored = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.parquet")}
    assert 0 < len(stored) < 13
    counted = Counted()
    run = sketch_corpus(data, tmp_path / "run", proxy, TOGETHER, counted)
    assert counted.began[1] == 8 * len(stored)
    assert counted.rows == ROWS - counted.began[1]
    assert_same(whole, run)
    assert stored.items() <= {p.name: p.stat().st_mtime_ns for p in run.path.rglob("*.parquet")}.items()


def sketch(corpus: str, out: str) -> None:
    torch.set_num_threads(1)
    sketch_corpus(corpus, out, load_proxy("tiny", dtype="float32"), replace(TOGETHER, rows_together=24))


@pytest.mark.soak
def test_killed_and_resumed_run_loses_no_unit_and_no_row(data, tmp_path):
    context = children()

    def start(out: Path):
        process = context.Process(target=sketch, args=(str(data), str(out)))
        process.start()
        return process

    process = start(tmp_path / "whole")
    process.join()
    assert process.exitcode == 0
    whole, stored, generator = RunDirectory.load(tmp_path / "whole"), {}, random.Random(1)
    folder, killed = tmp_path / "killed", 0
    for number in range(6):
        process = start(folder)
        # Killed by how far it is, not by the clock: before its first part, or some moments after one.
        if number:
            parts = len(stored)
            wait_for(
                lambda process=process, parts=parts: (
                    process.exitcode is not None or len(list(folder.rglob("*.parquet"))) > parts
                ),
                "another part",
            )
        process.join(timeout=generator.uniform(0, 0.02))
        if process.exitcode is None:
            process.kill()
            killed += 1
        process.join()
        now = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*.parquet")}
        assert stored.items() <= now.items()
        stored = now
    assert killed
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    assert_same(whole, RunDirectory.load(folder))
