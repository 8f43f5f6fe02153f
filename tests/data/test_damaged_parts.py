"""A part is whole and in its place, or it is named: damaged, swapped, copied, foreign, and of an earlier version."""

import builtins
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import (
    copy_over,
    cut,
    empty,
    flip,
    from_other,
    grow,
    no_rejected,
    rewritten,
    shorter_rejected,
    strip,
    swap_parts,
    swap_rejected,
    swap_whole_units,
    zeros,
)

from gvendi_fast.base import places
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data import parts
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.rows import Rejected
from gvendi_fast.data.run_directory import COLUMNS, OPTIONAL, DamagedPartError, Part, RunDirectory

K, ROWS, UNITS = 4, 3, 3
SPEC = {"sketch": {"kind": "hadamard", "dim": K, "seed": 0}, "mask": "completion"}
ALL = [*COLUMNS, *OPTIONAL]


def manifest(digest: str = "d0") -> dict:
    return {
        "units_total": UNITS,
        "rows": UNITS * ROWS,
        "duplicates": 0,
        "rows_per_unit": ROWS,
        "limit": None,
        "fields": {"by": None},
        "files": [
            {"path": "a.jsonl", "kind": "jsonl", "size": 90, "rows": UNITS * ROWS, "digest": digest},
        ],
    }


def part(unit: int, dim: int = K, seed: int = 0) -> Part:
    # The last row of a work unit is rejected, so that ranges have room.
    n = ROWS - 1
    draw = np.random.default_rng(100 * seed + unit)
    return Part(
        unit,
        ids=[f"{seed}-{unit}-{i}" for i in range(n)],
        groups=["g"] * n,
        rows=np.arange(n) + unit * ROWS,
        sketches=draw.standard_normal((n, dim)).astype(np.float32),
        tokens=np.arange(1, n + 1),
        length=np.arange(2, n + 2),
        loss=draw.random(n),
        gradient_norm=draw.random(n) + 1,
        norm_shares={"mlp": np.full(n, 0.25), "head": np.full(n, 0.75)},
    )


def make(
    path: Path, dim: int = K, seed: int = 0, digest: str = "d0", mask: str = "completion"
) -> RunDirectory:
    spec = {"sketch": {**SPEC["sketch"], "dim": dim}, "mask": mask}
    run = RunDirectory.open(path, spec, manifest(digest))
    for unit in range(UNITS):
        run.write_part(
            part(unit, dim, seed), [Rejected("a.jsonl", ROWS * (unit + 1), "empty text")], f"i{seed}{unit}"
        )
    return run


def content(found: Part) -> dict:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else str(value)
        for name in (*COLUMNS.values(), *OPTIONAL.values())
        for value in [getattr(found, name)]
    }


def test_a_part_says_whose_it_is(tmp_path):
    run = make(tmp_path)
    stamp = parts.read_stamp(run.parts / "part-000002.parquet")
    assert (stamp.unit, stamp.first_row, stamp.rows, stamp.accepted, stamp.dim) == (2, 6, 3, 2, K)
    assert (stamp.input, len(stamp.columns)) == ("i02", 10)
    assert stamp.rejected == parts.checksum((run.parts / "rejected-000002.jsonl").read_bytes())
    assert run.broken() == []
    # Other readers of Parquet take it as it is.
    assert pq.read_table(run.parts / "part-000002.parquet", page_checksum_verification=True).num_rows == 2


def test_every_bit_of_a_part_counts(tmp_path):
    """One bit flipped in each byte in turn: the part has the same content, or an error with its name."""
    run = make(tmp_path)
    path = run.parts / "part-000001.parquet"
    whole = path.read_bytes()
    wanted = content(next(run.iterate(ALL, [1])))
    same, named = 0, set()
    # One handle for all, as opening a file takes longer than all else.
    with open(path, "r+b", buffering=0) as stream:
        for place, byte in enumerate(whole):
            stream.seek(place)
            stream.write(bytes([byte ^ 1 << place % 8]))
            try:
                (found,) = run.iterate(ALL, [1])
            except DamagedPartError as error:
                named.add((error.unit, error.path))
            else:
                assert content(found) == wanted, place
                same += 1
            stream.seek(place)
            stream.write(bytes([byte]))
    assert named == {(1, path)}
    # The magic word at the beginning, which says nothing of the content.
    assert same == 4


def test_every_bit_of_the_rejected_rows_counts(tmp_path):
    run = make(tmp_path)
    path = run.parts / "rejected-000001.jsonl"
    for place in range(len(path.read_bytes())):
        flip(path, place, place % 8)
        with pytest.raises(
            DamagedPartError, match=r"checksum of 'rejected-000001\.jsonl' beside it does not"
        ):
            list(run.rejected())
        assert [damage.unit for damage in run.broken()] == [1]
        flip(path, place, place % 8)
    assert len(list(run.rejected())) == UNITS


OTHERS = {
    "other corpus": {"seed": 1, "digest": "d1"},
    "other settings": {"seed": 1, "mask": "released"},
    "other K": {"seed": 1, "dim": 8},
}
ATTACKS = [
    (swap_parts, None, [1, 2]),
    (swap_whole_units, None, [1, 2]),
    (copy_over, None, [1]),
    *((from_other, kind, [1]) for kind in OTHERS),
    (cut, None, [1]),
    (grow, None, [1]),
    (empty, None, [1]),
    (zeros, None, [1]),
    (rewritten, None, [1]),
    (swap_rejected, None, [1, 2]),
    (no_rejected, None, [1]),
    (shorter_rejected, None, [1]),
]


@pytest.mark.parametrize(("attack", "kind", "units"), ATTACKS)
def test_every_reader_names_the_part(tmp_path, attack, kind, units):
    make(tmp_path / "run")
    other = None if kind is None else make(tmp_path / "other", **OTHERS[kind])
    attack(RunDirectory.load(tmp_path / "run"), other)
    run = RunDirectory.load(tmp_path / "run")
    assert [damage.unit for damage in run.broken()] == units
    readers = [lambda: list(run.rejected()), run.finish]
    if "rejected" not in attack.__name__:
        readers += [
            lambda: list(run.iterate()),
            lambda: list(run.iterate(["id"])),
            lambda: as_pool(run),
            lambda: as_pool(run.path),
        ]
    for read in readers:
        with pytest.raises(
            GvendiError, match=r"part-00000[12].parquet' is damaged \(.*run the command that made it"
        ):
            read()


@pytest.mark.parametrize("attack", [swap_parts, copy_over, cut, empty, zeros])
def test_parts_of_an_earlier_version(tmp_path, attack):
    run = make(tmp_path)
    wanted = [content(found) for found in run.iterate(ALL)]
    for path in run.parts.glob("*.parquet"):
        strip(path)
    assert [content(found) for found in run.iterate(ALL)] == wanted
    assert run.broken() == []
    assert next(run.iterate(["sketch"])).rows is None
    attack(run, None)
    assert run.broken()[0].unit == 1
    with pytest.raises(DamagedPartError, match=r"part-00000[12].parquet"):
        list(run.iterate(["sketch"]))


@pytest.mark.parametrize("rows", [[4, 3], [3, 3], [2, 3], [5, 6], [-1, 3]])
def test_rows_of_an_earlier_version_are_those_of_the_work_unit(tmp_path, rows):
    run = make(tmp_path)
    path = run.parts / "part-000001.parquet"
    strip(path)
    table = pq.read_table(path)
    place = table.column_names.index("row")
    pq.write_table(table.set_column(place, "row", pa.array(rows, pa.int64())), path)
    with pytest.raises(DamagedPartError, match="its rows are not ascending ones of 3 to 5"):
        list(run.iterate(["id"]))


def test_rows_of_another_work_unit_are_not_written(tmp_path):
    run = make(tmp_path)
    for rows in ([2, 3], [5, 6]):
        with pytest.raises(GvendiError, match=r"rows of work unit 1 are . to .; wanted some of 3 to 5"):
            run.write_part(Part(**{**{n: getattr(part(1), n) for n in Part.__slots__}, "rows": rows}))


@pytest.mark.parametrize(
    "name", ["part-000003.parquet", "part-0000001.parquet", "part-00000١.parquet", ".nfs0001"]
)
def test_files_beside_the_parts_are_never_read(tmp_path, name):
    run = make(tmp_path)
    shutil.copy(run.parts / "part-000001.parquet", run.parts / name)
    assert run.done() == [0, 1, 2]
    assert run.missing() is None
    assert [row for found in run.iterate(["row"]) for row in found.rows] == [0, 1, 3, 4, 6, 7]
    assert [path.name for path in run.strangers()] == [name] * name.endswith("1.parquet") + [name] * (
        "3" in name
    )


def test_parts_without_a_recorded_corpus_never_give_a_row_twice(tmp_path):
    run = RunDirectory.open(tmp_path, SPEC)
    run.write_part(part(0))
    run.write_part(part(1))
    assert len(list(run.iterate())) == 2
    run.write_part(Part(**{**{n: getattr(part(0), n) for n in Part.__slots__}, "unit": 1}))
    with pytest.raises(DamagedPartError, match="its rows are not behind those of the part before it"):
        list(run.iterate(["id"]))


class Failing:
    """A file whose reads fail, as those of a broken disk or a vanished mount do, where they begin in `where`."""

    def __init__(self, stream, number: int, where: tuple[int, int]) -> None:
        self.stream, self.number, self.where = stream, number, where

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def _fail(self):
        if self.where[0] <= self.stream.tell() < self.where[1]:
            raise OSError(self.number, "the system says no")

    def read(self, *size):
        self._fail()
        return self.stream.read(*size)

    def readinto(self, buffer):
        self._fail()
        return self.stream.readinto(buffer)


NUMBERS = [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EACCES, errno.EMFILE, errno.ENFILE]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("when", ["open", "footer", "pages"])
def test_what_the_system_refuses_is_no_damage(tmp_path, monkeypatch, number, is_old, when):
    run = make(tmp_path)
    path = run.parts / "part-000001.parquet"
    if is_old:
        strip(path)

    def failing(name, *args, **more):
        if Path(name) != path:
            return builtins.open(name, *args, **more)
        if when == "open":
            raise OSError(number, "the system says no", str(name))
        where = (0, 1 << 20) if when == "footer" else (4, 40)
        return Failing(builtins.open(name, *args, **more), number, where)

    monkeypatch.setattr(places, "open", failing, raising=False)
    for read in (lambda: list(run.iterate()), run.broken):
        with pytest.raises(OSError, match="the system says no") as caught:
            read()
        assert (caught.value.errno, caught.value.filename) == (number, str(path))


def test_memory_that_is_not_there_is_no_damage(tmp_path, monkeypatch):
    run = make(tmp_path)

    def none(*_, **__):
        raise pa.ArrowMemoryError("no memory")

    monkeypatch.setattr(pq.ParquetFile, "read", none)
    with pytest.raises(MemoryError):
        list(run.iterate())


def test_a_stamp_of_another_layout_is_named(tmp_path):
    run = make(tmp_path)
    path = run.parts / "part-000001.parquet"
    raw = path.read_bytes()
    place = raw.index(b"gvendi.part")
    for start, end in ((place, place + 11), (place + 11, place + 16)):
        path.write_bytes(raw[:start] + b"?" * (end - start) + raw[end:])
        with pytest.raises(DamagedPartError, match=r"gvendi\.part|footer"):
            list(run.iterate(["id"]))


def test_json_of_the_stamp_is_read_as_it_was_written(tmp_path):
    run = make(tmp_path)
    value = pq.read_metadata(run.parts / "part-000000.parquet").metadata[b"gvendi.part"].decode()
    version, footer, rest = value.split(" ", 2)
    assert (version, len(footer)) == ("1", 8)
    assert json.loads(rest)["columns"] == list(parts.read_stamp(run.parts / "part-000000.parquet").columns)
