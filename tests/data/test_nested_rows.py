"""Deep nesting of what is read refuses the row, at the same depth whoever calls and whichever Python runs."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import Fields, Rejected, UnitReader, index_corpus
from gvendi_fast.data.rows import MAX_DEPTH, nests_deeper

GOOD = b'{"prompt": "a", "completion": "b", "by": "g"}'
TALK = b'{"messages": [{"role": "assistant", "content": "b", "tool_calls": %s}]}'
PLACES = {
    "tool call": (TALK, 3),
    "by": (b'{"text": "a", "by": %s}', 1),
    "id": (b'{"text": "a", "id": %s}', 1),
    "unused": (b'{"text": "a", "meta": %s}', 1),
}


def reasons(path, line: bytes) -> list[str | None]:
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    manifest = index_corpus(path, Fields(by="by"))
    with UnitReader(manifest) as reader:
        return [row.reason if isinstance(row, Rejected) else None for row in reader.read(manifest.units[0])]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("depth", [600, 5_000, 100_000])
@pytest.mark.parametrize("ends", [(b"[", b"]"), (b'{"a":', b"}")])
@pytest.mark.parametrize("is_whole", [True, False])
def test_deep_nesting_refuses_the_row(tmp_path, place, depth, ends, is_whole):
    value = ends[0] * depth + b"1" + (ends[1] * depth if is_whole else b"")
    found = reasons(tmp_path / "a.jsonl", PLACES[place][0] % value)
    too_deep = f"broken JSON: nested too deeply, more than {MAX_DEPTH} levels"
    # What nobody reads is cut out, if it ends; of an id it is enough that it is a list or an object.
    of_whole = {
        "unused": None,
        "id": f"field 'id' is not a string or an integer ({'list' if ends[0] == b'[' else 'dict'})",
    }
    assert found == [None, of_whole.get(place, too_deep) if is_whole else too_deep, None]


@pytest.mark.parametrize("place", ["tool call", "by"])
def test_the_deepest_row_that_is_read(tmp_path, place):
    form, above = PLACES[place]
    for more in (0, 1):
        depth = MAX_DEPTH - above + more
        found = reasons(tmp_path / "a.jsonl", form % (b"[" * depth + b"]" * depth))
        assert (found[1] is None) == (more == 0), found


@pytest.mark.parametrize(
    "text", ["[" * 900, '"[' * 300, '\\"[' * 300, "\\" * 301 + "[" * 99, "]" * 500 + "{" * 500, '[\\\\"' * 99]
)
def test_brackets_inside_strings_do_not_count(tmp_path, text):
    line = json.dumps({"text": text + "t", "by": [text, {text: text}]}).encode()
    assert not nests_deeper(line, 3)
    assert nests_deeper(line, 2)
    assert reasons(tmp_path / "a.jsonl", line) == [None] * 3


def test_parquet_that_nests_deeply_is_named(tmp_path):
    kind = pa.int64()
    for _ in range(MAX_DEPTH + 1):
        kind = pa.struct([("a", kind)])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["t"], "by": pa.nulls(1, kind)}), path)
    with pytest.raises(GvendiError, match=r"column 'by' of .* nests more than 64 levels"):
        index_corpus(path, Fields(by="by"))
    # A column that is not read may be as it is.
    assert index_corpus(path).rows == 1
