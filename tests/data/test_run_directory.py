"""The run directory: what is on disk is whole, the same input gives the same bytes, other settings are refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hangs import HANG_S

from gvendi_fast.base import files
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import Rejected, index_corpus
from gvendi_fast.data.run_directory import COLUMNS, Part, RunDirectory

SPEC = {
    "proxy": {"name": "tiny", "revision": "abc"},
    "sketch": {"kind": "hadamard", "K": 8, "seed": 0},
    "mask": "x",
}
MANIFEST = {"units_total": 3, "limit": None, "files": [{"path": "a.jsonl", "size": 10, "digest": "d0"}]}


def part(n: int = 5, K: int = 8, seed: int = 0, first_row: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "ids": [f"id-{seed}-{i} é" for i in range(n)],
        "groups": [f"g{i % 2}" for i in range(n)],
        "rows": np.arange(first_row, first_row + n),
        "sketches": rng.standard_normal((n, K)).astype(np.float32),
        "tokens": rng.integers(1, 9, n),
        "length": rng.integers(9, 20, n),
        "loss": rng.random(n),
        "gradient_norm": rng.random(n),
    }


def shuffled(content: dict, seed: int = 1) -> dict:
    order = np.random.default_rng(seed).permutation(len(content["ids"]))
    return {
        name: [value[i] for i in order] if isinstance(value, list) else value[order]
        for name, value in content.items()
    }


def temporaries(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*") if files.is_temporary(path.name)]


def test_write_and_read_back(tmp_path):
    run = RunDirectory.open(tmp_path / "run", SPEC, MANIFEST)
    content = part()
    rejected = [Rejected("a.jsonl", 9, "later"), Rejected("a.jsonl", 2, "sooner é", "id")]
    assert not run.has_part(1)
    run.write_part(Part(1, **shuffled(content)), rejected)
    assert run.has_part(1)
    assert (run.done(), run.units_done, run.units_total) == ([1], 1, 3)
    (back,) = RunDirectory.load(tmp_path / "run").iterate()
    assert back.unit == 1
    assert (back.ids, back.groups) == (content["ids"], content["groups"])
    for name in ("rows", "sketches", "tokens", "length", "loss", "gradient_norm"):
        value = getattr(back, name)
        assert np.array_equal(value, content[name].astype(value.dtype)), name
    types = {name: str(getattr(back, COLUMNS[name]).dtype) for name in COLUMNS if name not in ("id", "group")}
    assert types == {
        "row": "int64",
        "sketch": "float32",
        "tokens": "int32",
        "length": "int32",
        "loss": "float32",
        "gradient_norm": "float32",
    }
    assert list(run.rejected()) == rejected[::-1]
    file = pq.read_schema(run.parts / "part-000001.parquet")
    assert str(file.field("sketch").type) == "fixed_size_list<element: float>[8]"
    assert temporaries(tmp_path) == []


def test_order_of_arrival_leaves_no_trace(tmp_path):
    content = part(40)
    rejected = [Rejected("a", n, f"r{n}") for n in range(6)]
    first = RunDirectory.open(tmp_path / "a", SPEC, MANIFEST)
    second = RunDirectory.open(tmp_path / "b", SPEC, MANIFEST)
    first.write_part(Part(0, **content), rejected)
    time.sleep(1.1)
    second.write_part(Part(0, **shuffled(content)), rejected[::-1])
    for name in ("part-000000.parquet", "rejected-000000.jsonl"):
        assert (first.parts / name).read_bytes() == (second.parts / name).read_bytes()


def test_columns_are_read_on_demand(tmp_path):
    run = RunDirectory.open(tmp_path, SPEC, MANIFEST)
    run.write_part(Part(0, **part()))
    (back,) = run.iterate(["sketch", "id"])
    assert back.sketches.shape == (5, 8)
    assert back.loss is None
    with pytest.raises(GvendiError, match=r"columns: there is no column 'norm'; wanted some of id, group"):
        run.iterate(["norm"])


def test_a_unit_without_accepted_rows(tmp_path):
    run = RunDirectory.open(tmp_path, SPEC, MANIFEST)
    run.write_part(Part(0, **part(0)), [Rejected("a", 1, "empty completion")])
    run.write_part(Part(1, **part(3)))
    empty, full = run.iterate()
    assert empty.sketches.shape == (0, 8)
    assert (empty.ids, len(empty.rows)) == ([], 0)
    assert full.sketches.shape == (3, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["a"]}, r"5 sketches but \{'ids': 1,"),
        ({"rows": np.zeros(5)}, "work unit 0 has a row twice"),
        ({"loss": None}, "loss of work unit 0 is None; wanted every column of Part"),
        ({"sketches": np.zeros(5)}, r"sketches have shape \(5,\); wanted \[n, K\]"),
        ({"sketches": np.full((5, 8), np.nan)}, "the sketch of 'id-0-0 é' is not finite"),
        ({"ids": [*"abcd", "\udcff"]}, r"the id '\\udcff' of work unit 0 is not Unicode text"),
        ({"groups": [*"abcd", "a\udcff"]}, r"the group 'a\\udcff' of work unit 0 is not Unicode text"),
    ],
)
def test_parts_are_checked_before_anything_is_written(tmp_path, change, message):
    run = RunDirectory.open(tmp_path, SPEC, MANIFEST)
    with pytest.raises(GvendiError, match=message):
        run.write_part(Part(0, **{**part(), **change}))
    with pytest.raises(GvendiError, match="unit is 3; the corpus has 3 work units"):
        run.write_part(Part(3, **part()))
    assert os.listdir(run.parts) == []


def test_another_spec_is_shown_key_by_key(tmp_path):
    RunDirectory.open(tmp_path, SPEC, MANIFEST)
    other = {
        "proxy": SPEC["proxy"],
        "sketch": {"kind": "hadamard", "K": 16, "seed": 0},
        "dtype": "bf16",
        "mask": "x",
    }
    with pytest.raises(GvendiError) as caught:
        RunDirectory.open(tmp_path, other, MANIFEST)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"run directory '{tmp_path}' was made with other settings:"
    assert lines[1:-1] == [
        '  dtype: (absent) in the directory, "bf16" now',
        "  sketch.K: 8 in the directory, 16 now",
    ]
    assert "--out" in lines[-1]
    assert RunDirectory.open(tmp_path, dict(reversed(SPEC.items()))).manifest == MANIFEST


def test_another_corpus_is_shown_file_by_file(tmp_path):
    corpus = tmp_path / "c"
    corpus.mkdir()
    for name in "abc":
        (corpus / f"{name}.jsonl").write_text('{"text": "one"}\n')
    RunDirectory.open(tmp_path / "run", SPEC, index_corpus(corpus).to_dict())
    (corpus / "a.jsonl").write_text('{"text": "two"}\n{"text": "two"}\n')
    (corpus / "b.jsonl").rename(corpus / "d.jsonl")
    with pytest.raises(GvendiError) as caught:
        RunDirectory.open(tmp_path / "run", SPEC, index_corpus(corpus, limit=9).to_dict())
    text = str(caught.value)
    assert f"  file '{corpus}/b.jsonl' is missing now" in text
    assert f"  file '{corpus}/d.jsonl' is new" in text
    assert f"  file '{corpus}/a.jsonl' changed: digest " in text
    assert "rows 1 -> 2, size 16 -> 32" in text
    assert "  limit: null in the directory, 9 now" in text
    assert "c.jsonl" not in text.replace("c.jsonl' is", "")


def test_of_many_files_that_differ_some_are_named(tmp_path):
    corpus = tmp_path / "c"
    corpus.mkdir()
    for number in range(30):
        (corpus / f"{number:02d}.jsonl").write_text('{"text": "one"}\n')
    RunDirectory.open(tmp_path / "run", SPEC, index_corpus(corpus / "29.jsonl").to_dict())
    (corpus / "29.jsonl").write_text('{"text": "two"}\n')
    with pytest.raises(GvendiError) as caught:
        RunDirectory.open(tmp_path / "run", SPEC, index_corpus(corpus).to_dict())
    lines = str(caught.value).splitlines()
    assert "29.jsonl' changed" in lines[1]
    assert "18.jsonl' is new" in lines[20]
    assert lines[21] == "  and 10 files more"
    assert len(lines) < 30


@pytest.mark.parametrize("bad", [{"a": float("nan")}, {"a": object()}])
def test_a_spec_must_be_json(tmp_path, bad):
    with pytest.raises(GvendiError, match="spec cannot be written as JSON"):
        RunDirectory.open(tmp_path / "run", bad)
    assert not (tmp_path / "run").exists()


def test_folders_that_are_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(GvendiError, match="is a file, but a run needs a folder"):
        RunDirectory.open(tmp_path / "file", SPEC)
    with pytest.raises(GvendiError, match="holds other things, such as 'file'"):
        RunDirectory.open(tmp_path, SPEC)
    with pytest.raises(GvendiError, match=r"is not a run directory: it has no spec\.json"):
        RunDirectory.load(tmp_path)
    with pytest.raises(GvendiError, match="is not a run directory: it does not exist"):
        RunDirectory.load(tmp_path / "absent")
    with pytest.raises(GvendiError, match="no integer 'units_total'"):
        RunDirectory.open(tmp_path / "new", SPEC, {})


def test_finish_joins_the_rejects_in_unit_order(tmp_path):
    run = RunDirectory.open(tmp_path, SPEC, MANIFEST)
    for unit in (2, 0):
        run.write_part(
            Part(unit, **part(2, seed=unit)), [Rejected("a", unit, "r"), Rejected("a", unit + 9, "r")]
        )
    with pytest.raises(
        GvendiError, match=r"1 of 3 work units are missing, the first is 1; run the same command"
    ):
        run.finish()
    assert not (tmp_path / "rejected.jsonl").exists()
    run.write_part(Part(1, **part(2, seed=1)))
    assert run.finish() == 4
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [0, 9, 2, 11]
    assert lines[0] == {"file": "a", "line": 0, "reason": "r", "id": None}
    assert run.finish() == 4


def test_damaged_parts_are_named(tmp_path):
    run = RunDirectory.open(tmp_path, SPEC, MANIFEST)
    run.write_part(Part(0, **part()))
    path = run.parts / "part-000000.parquet"
    whole = path.read_bytes()
    sketch = part()["sketches"][2].tobytes()
    position = whole.index(sketch)
    for broken in (
        b"",
        whole[: len(whole) // 2],
        whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :],
    ):
        path.write_bytes(broken)
        with pytest.raises(
            GvendiError, match=r"part-000000.parquet' is damaged \(.*; run the command that made it again"
        ):
            list(run.iterate())
    path.unlink()
    assert run.done() == []
    run.write_part(Part(0, **part()))
    assert path.read_bytes() == whole


def test_parts_that_do_not_belong_together(tmp_path):
    run = RunDirectory.open(tmp_path, SPEC, MANIFEST)
    run.write_part(Part(0, **part()))
    run.write_part(Part(1, **part(K=16, first_row=5)))
    with pytest.raises(
        GvendiError, match=r"part-000001.parquet' is damaged \(sketches of width 16 among others"
    ):
        list(run.iterate())
    (run.parts / "rejected-000001.jsonl").unlink()
    with pytest.raises(GvendiError, match=r"'rejected-000001.jsonl' beside it is missing"):
        list(run.rejected())
    (run.parts / "rejected-000001.jsonl").write_text('{"file": ')
    with pytest.raises(
        GvendiError,
        match=r"part-000001.parquet' is damaged \(the checksum of 'rejected-000001.jsonl' beside it",
    ):
        list(run.rejected())


def test_a_spec_that_two_processes_give_at_once_stays_the_first(tmp_path, monkeypatch):
    # The other process writes its spec after this one has looked for it.
    write = files.os.link

    def late(beside, path):
        monkeypatch.setattr(files.os, "link", write)
        Path(path).write_text('{"K": 1}')
        write(beside, path)

    monkeypatch.setattr(files.os, "link", late)
    with pytest.raises(GvendiError, match="K: 1 in the directory, 2 now"):
        RunDirectory.open(tmp_path, {"K": 2})
    assert temporaries(tmp_path) == []


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(files.errno.EPERM, "no links here")

    monkeypatch.setattr(files.os, "link", refuse)
    assert RunDirectory.open(tmp_path, SPEC, MANIFEST).spec == SPEC
    assert RunDirectory.load(tmp_path).manifest == MANIFEST
    assert temporaries(tmp_path) == []


def test_many_writers_of_one_unit(tmp_path):
    content = part(300, K=64)

    def work(seed: int) -> None:
        run = RunDirectory.open(tmp_path / "run", SPEC, MANIFEST)
        run.write_part(Part(0, **shuffled(content, seed)), [Rejected("a", 1, "r")])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(24))) == [None] * 24
    run = RunDirectory.load(tmp_path / "run")
    (back,) = run.iterate()
    assert np.array_equal(back.sketches, content["sketches"])
    assert sorted(os.listdir(run.parts)) == ["part-000000.parquet", "rejected-000000.jsonl"]
    assert temporaries(tmp_path) == []


def test_stale_files_go_and_living_ones_stay(tmp_path):
    run = RunDirectory.open(tmp_path, SPEC, MANIFEST)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, code = files.host_name(), "0" * 32

    def leave(host: str, pid: int, age: float = 0.0) -> Path:
        path = run.parts / f".part-000000.parquet.{host}.{pid}.{code}.tmp"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
        return path

    gone = [leave(host, dead.pid), leave("elsewhere", 1, age=2 * 86400)]
    kept = [leave(host, os.getpid()), leave("elsewhere", 2, age=3600)]
    RunDirectory.load(tmp_path)
    assert all(path.exists() for path in gone + kept)
    RunDirectory.open(tmp_path, SPEC)
    assert [path.exists() for path in gone + kept] == [False, False, True, True]
    assert run.done() == []


def small_run(path: Path) -> int:
    run = RunDirectory.open(path, {"K": 4}, {"units_total": 2, "files": []})
    for unit in range(2):
        if not run.has_part(unit):
            content = part(3, K=4, seed=unit, first_row=3 * unit)
            run.write_part(Part(unit, **content), [Rejected("f", unit, "r")])
    return run.finish()


def run_until(path: Path, calls: int, after: bool) -> None:
    """`small_run`, killed right before or after the given number of calls that change the directory."""
    left = calls

    def deadly(call):
        def counted(*args, **more):
            nonlocal left
            left -= 1
            last = left == 0
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **more)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    for owner, name in ((os, "replace"), (os, "link"), (os, "fsync"), (Path, "mkdir"), (Path, "unlink")):
        setattr(owner, name, deadly(getattr(owner, name)))
    small_run(path)


def kill_everywhere(root: Path, whens: Sequence[str]) -> None:
    """For every call of a run one folder in which a run was killed there. Forks, so it needs a process of its own."""
    for when in whens:
        for calls in range(1, 200):
            child = os.fork()
            if child == 0:
                run_until(root / f"{when}-{calls}", calls, when == "after")
                os._exit(0)
            if os.waitpid(child, 0)[1] == 0:
                break


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
# Right after a call stands what stands right before the next one, but for what temporary files hold.
@pytest.mark.parametrize(
    "whens",
    [
        pytest.param(("before",), id="before"),
        pytest.param(("before", "after"), id="before and after", marks=pytest.mark.soak),
    ],
)
def test_killed_between_any_two_calls(whens, tmp_path):
    """A run killed at every one of its calls in turn leaves only whole files, and its successor ends the same."""
    code = (
        "import sys, pathlib, test_run_directory as tests;"
        "tests.kill_everywhere(pathlib.Path(sys.argv[1]), sys.argv[2:])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *whens], check=True, env=environment, timeout=HANG_S
    )

    def contents(path: Path) -> dict[str, bytes]:
        return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}

    # The last of either kind was not killed at all.
    ends = {
        when: max(tmp_path.glob(f"{when}-*"), key=lambda path: int(path.name[len(when) + 1 :]))
        for when in whens
    }
    expected = contents(ends["before"])
    assert all(contents(end) == expected for end in ends.values())
    assert len(expected) == 7
    killed = [path for path in tmp_path.iterdir() if path not in ends.values()]
    # Each of the 7 files is written through two fsync, a move and an unlink.
    assert len(killed) >= len(whens) * 7 * 4
    for path in killed:
        left = contents(path)
        for name, content in left.items():
            assert files.is_temporary(Path(name).name) or content == expected[name], (path.name, name)
            if name.startswith("parts/part-"):
                assert f"parts/rejected-{name[-14:-8]}.jsonl" in left, path.name
        assert small_run(path) == 2
        assert contents(path) == expected, path.name


def test_threads_share_a_run_directory(tmp_path):
    """Two write each unit, others read meanwhile: what is read is whole, and the bytes are those of one writer."""
    manifest = {**MANIFEST, "units_total": 12}
    alone, shared = (RunDirectory.open(tmp_path / name, SPEC, manifest) for name in ("alone", "shared"))
    contents = [part(seed=unit, first_row=5 * unit) for unit in range(12)]
    for unit, content in enumerate(contents):
        alone.write_part(Part(unit, **content), [Rejected("f", unit, "r")])

    def write(unit):
        shared.write_part(Part(unit, **shuffled(contents[unit], unit)), [Rejected("f", unit, "r")])

    def read(_):
        return [(part.unit, part.sketches[:, 0].tolist()) for part in shared.iterate()]

    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(write, unit) for unit in (*range(12), *range(12))]
        for found in pool.map(read, range(8)):
            assert found == [(unit, contents[unit]["sketches"][:, 0].tolist()) for unit, _ in found]
        for result in writes:
            result.result(HANG_S)
    assert shared.finish() == alone.finish() == 12
    for path in sorted(alone.path.rglob("*.*")):
        assert (shared.path / path.relative_to(alone.path)).read_bytes() == path.read_bytes(), path
    assert temporaries(shared.path) == []


def test_no_name_of_a_file_comes_from_data(tmp_path):
    """Ids and groups that differ in case alone, or are paths, are in files, not their names."""
    names = []
    for folder, words in (("plain", ["a", "b", "c", "d", "e"]), ("odd", ["A", "a", "../x", "con", "a:b"])):
        run = RunDirectory.open(tmp_path / folder, SPEC, {**MANIFEST, "units_total": 1})
        run.write_part(
            Part(0, **{**part(), "ids": words, "groups": words}), [Rejected(words[0], 1, "r", words[1])]
        )
        run.finish()
        names.append(sorted(path.relative_to(run.path).as_posix() for path in run.path.rglob("*")))
        assert len({name.casefold() for name in names[-1]}) == len(names[-1])
        (found,) = run.iterate(["id", "group"])
        assert sorted(found.ids) == sorted(found.groups) == sorted(words)
    assert names[0] == names[1]
