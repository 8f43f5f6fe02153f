"""Ways to damage a run directory of three work units; `other` is another run of the same shape."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq


def strip(path: Path) -> None:
    """The part as an earlier version wrote it."""
    table = pq.read_table(path).replace_schema_metadata(None)
    pq.write_table(
        table,
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )


def flip(path: Path, place: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1 << bit
    path.write_bytes(raw)


def swap(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def swap_parts(run, _):
    swap(run.parts / "part-000001.parquet", run.parts / "part-000002.parquet")


def swap_whole_units(run, other):
    swap_parts(run, other)
    swap(run.parts / "rejected-000001.jsonl", run.parts / "rejected-000002.jsonl")


def copy_over(run, _):
    shutil.copy(run.parts / "part-000000.parquet", run.parts / "part-000001.parquet")


def from_other(run, other):
    for name in ("part-000001.parquet", "rejected-000001.jsonl"):
        shutil.copy(other.parts / name, run.parts / name)


def cut(run, _):
    path = run.parts / "part-000001.parquet"
    path.write_bytes(path.read_bytes()[:-50])


def grow(run, _):
    path = run.parts / "part-000001.parquet"
    path.write_bytes(path.read_bytes() + b"\0" * 512)


def empty(run, _):
    (run.parts / "part-000001.parquet").write_bytes(b"")


def zeros(run, _):
    path = run.parts / "part-000001.parquet"
    path.write_bytes(bytes(len(path.read_bytes())))


def rewritten(run, _):
    path = run.parts / "part-000001.parquet"
    pq.write_table(pq.read_table(path), path)


def swap_rejected(run, _):
    swap(run.parts / "rejected-000001.jsonl", run.parts / "rejected-000002.jsonl")


def no_rejected(run, _):
    (run.parts / "rejected-000001.jsonl").unlink()


def shorter_rejected(run, _):
    (run.parts / "rejected-000001.jsonl").write_bytes(b"")


def flipped_sketch(run, _):
    flip(run.parts / "part-000001.parquet", 200)


def flipped_footer(run, _):
    path = run.parts / "part-000001.parquet"
    flip(path, len(path.read_bytes()) - 300)


ATTACKS = {
    swap_parts: [1, 2],
    swap_whole_units: [1, 2],
    copy_over: [1],
    from_other: [1],
    cut: [1],
    grow: [1],
    empty: [1],
    zeros: [1],
    rewritten: [1],
    flipped_sketch: [1],
    flipped_footer: [1],
    swap_rejected: [1, 2],
    no_rejected: [1],
    shorter_rejected: [1],
}
