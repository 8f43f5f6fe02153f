"""The index whose files are read each by itself is the one of files that are read in turn."""

import json
import pickle
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data import index, seen_ids
from gvendi_fast.data.index import Fields, UnitReader, index_corpus
from gvendi_fast.data.rows import Rejected

FORMATS = ["jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "tsv", "parquet", "arrow"]


class Elsewhere(Engine):
    """As workers of other processes: everything is pickled, and results come in a random order."""

    name, is_remote = "elsewhere", True

    def __init__(self, seed=0):
        self.draw, self.mapped = random.Random(seed), 0

    def map(self, make, items):
        function = pickle.loads(pickle.dumps(make))()
        places = list(range(len(items)))
        self.draw.shuffle(places)
        for place in places:
            self.mapped += 1
            result = function(pickle.loads(pickle.dumps(items[place])))
            yield place, pickle.loads(pickle.dumps(result))

    def work(self, open_worker, items):
        raise NotImplementedError


def write(path, rows):
    form = path.name.split(".", 1)[1]
    lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    if form == "json":
        path.write_text(json.dumps(rows))
    elif form in ("csv", "tsv"):
        comma = {"csv": ",", "tsv": "\t"}[form]
        records = [list(rows[0]), *(map(str, row.values()) for row in rows)]
        path.write_text("\n".join(map(comma.join, records)))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif form == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    elif form == "jsonl":
        path.write_bytes(lines)
    else:
        path.write_bytes(pa.compress(lines, {"jsonl.gz": "gzip", "jsonl.zst": "zstd"}[form], asbytes=True))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of every kind, which share ids, and some that are empty, damaged or no corpus at all."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(3)
    (folder / "00.jsonl").write_text("")
    (folder / "01.jsonl").write_text("no JSON\n")
    for number in range(2 * len(FORMATS)):
        rows = [
            {
                "instruction": "word " * draw.randint(1, 30),
                "output": f"answer {at}",
                "id": f"r{draw.randrange(300)}",
            }
            for at in range(draw.randint(1, 40))
        ]
        write(folder / f"{number + 10}.{FORMATS[number % len(FORMATS)]}", rows)
    whole = (folder / "11.jsonl.gz").read_bytes()
    (folder / "40.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "41.parquet").write_bytes(b"PAR1 but no more")
    (folder / "42.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "t", "id": "r1"}).encode())
    (folder / "43.jsonl.gz").write_bytes(b"")
    return folder


@pytest.mark.parametrize("held", [1 << 26, 200, 0])
@pytest.mark.parametrize("unit_bytes", [None, 400])
def test_the_same_manifest(corpus, monkeypatch, held, unit_bytes):
    settings = {"rows_per_unit": 9, "skip_unreadable": True, "unit_bytes": unit_bytes}
    in_turn = index_corpus(corpus, **settings)
    assert in_turn.duplicates > 50
    assert in_turn.damaged
    assert in_turn.unreadable
    assert in_turn.fields.format == "alpaca"
    # Ids of a file in memory, those of none, and those of some.
    monkeypatch.setattr(seen_ids, "_IDS_BYTES", held)
    engine = Elsewhere(held)
    found = index_corpus(corpus, **settings, engine=engine)
    assert engine.mapped == len(in_turn.files) + len(in_turn.unreadable)
    assert found == in_turn
    # Several files in each task.
    monkeypatch.setattr(index, "MOST_TASKS", 4)
    engine = Elsewhere(held)
    assert index_corpus(corpus, **settings, engine=engine) == in_turn
    assert engine.mapped == 4
    assert found.to_dict() == in_turn.to_dict()
    assert (found.notes, found.advice) == (in_turn.notes, in_turn.advice)


@pytest.mark.parametrize("seed", range(6))
def test_the_first_file_that_cannot_be_read_is_named(corpus, seed):
    with pytest.raises(GvendiError) as in_turn:
        index_corpus(corpus)
    with pytest.raises(GvendiError) as caught:
        index_corpus(corpus, engine=Elsewhere(seed))
    assert (str(caught.value), type(caught.value)) == (str(in_turn.value), type(in_turn.value))
    assert "41.parquet" in str(caught.value)


def test_a_file_that_vanishes_is_an_error_of_the_system(corpus, tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "t"}])
    write(tmp_path / "b.jsonl", [{"text": "t"}])

    class Vanishing(Elsewhere):
        def map(self, make, items):
            (tmp_path / "b.jsonl").unlink()
            yield from super().map(make, items)

    with pytest.raises(FileNotFoundError) as caught:
        index_corpus(tmp_path, engine=Vanishing())
    assert caught.value.filename == str(tmp_path / "b.jsonl")


def test_with_a_limit_files_are_read_in_turn(corpus):
    engine = Elsewhere()
    found = index_corpus(corpus, limit=30, skip_unreadable=True, engine=engine)
    assert found == index_corpus(corpus, limit=30, skip_unreadable=True)
    assert engine.mapped == 0


def test_rows_are_read_from_it(corpus):
    manifest = index_corpus(corpus, skip_unreadable=True, unit_bytes=300, engine=Elsewhere())
    with UnitReader(manifest) as reader:
        rows = [row for unit in manifest.units for row in reader.read(unit)]
    assert len(rows) == manifest.rows
    repeated = [row for row in rows if isinstance(row, Rejected) and row.reason.startswith("duplicate id")]
    assert len(repeated) == manifest.duplicates


def test_a_field_that_makes_groups_is_read_of_tables(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.parquet", [{"text": "t", "by": "x", "id": f"{at}"} for at in range(20)])
    fields = Fields(by="by")
    assert index_corpus(tmp_path, fields, engine=Elsewhere()) == index_corpus(tmp_path, fields)
