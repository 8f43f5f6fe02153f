"""Files of every kind with bytes changed, lost and added, before packing and after: no row is lost without a word."""

import gzip
import json
import random

import pyarrow as pa
import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import UnitReader, index_corpus

RECORDS = [{"text": f"row {i} ä\n", "id": i} for i in range(12)]
FILES = {
    "a.jsonl": "".join(json.dumps(record) + "\n" for record in RECORDS).encode(),
    "a.json": json.dumps(RECORDS, indent=1).encode(),
    "b.json": json.dumps({"data": RECORDS}).encode(),
    "a.csv": b"text,id\n" + b"".join(b'"row\n%d",%d\n' % (i, i) for i in range(12)),
    "b.jsonl": "".join(json.dumps(record) + "\n" for record in RECORDS).encode("utf-16"),
}
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: pa.compress(content, "zstd", asbytes=True)}


def changed(content: bytes, draws: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(draws.randrange(1, 4)):
        place, kind = draws.randrange(len(out) or 1), draws.randrange(4)
        if kind == 0 and out:
            out[place] ^= 1 << draws.randrange(8)
        elif kind == 1:
            del out[place : place + draws.randrange(9)]
        elif kind == 2:
            out[place:place] = draws.randbytes(draws.randrange(4))
        else:
            del out[place:]
    return bytes(out)


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.soak)])
def test_every_row_of_a_changed_file_is_given_or_refused(tmp_path, count):
    ends = {"read": 0, "refused": 0}
    for number in range(count):
        draws = random.Random(f"{count}|{number}")
        name, suffix = draws.choice(list(FILES)), draws.choice(list(PACKED))
        content = changed(FILES[name], draws) if draws.random() < 0.6 else FILES[name]
        packed = PACKED[suffix](content)
        path = tmp_path / (name + suffix)
        path.write_bytes(changed(packed, draws) if suffix and draws.random() < 0.6 else packed)
        try:
            manifest = index_corpus(path, rows_per_unit=draws.choice([3, 100]))
            units = list(manifest.units)
            # In any order, what is read is what was counted.
            draws.shuffle(units)
            with UnitReader(manifest) as reader:
                assert [len(list(reader.read(unit))) for unit in units] == [unit.rows for unit in units], (
                    number
                )
            assert sum(unit.rows for unit in units) == manifest.rows
            ends["read"] += 1
        except GvendiError:
            ends["refused"] += 1
        path.unlink()
    assert ends["read"] > 8 * ends["refused"] > 0
