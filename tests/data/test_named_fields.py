"""A field that the user named and no row has is told of before the work; one that some rows have is fine."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import Fields, index_corpus
from gvendi_fast.data.named_fields import MOST_NAMES, check_named_fields

ROWS = [{"prompt": f"{i}?", "completion": f"{i}.", "meta": {"task": None, "kind": "sum"}} for i in range(40)]
ROWS[37] |= {"late": "x", "uid": "u", "meta": {"task": "add"}}


def write(folder, rows, suffix):
    path = folder / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    return path


def check(path, **fields):
    check_named_fields(index_corpus(path, Fields(**fields), rows_per_unit=8))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("name", ["meta.task", "meta.kind", "late"])
def test_a_field_that_some_row_has_is_fine(tmp_path, suffix, name):
    rows = [{**row, "late": row.get("late")} for row in ROWS]
    check(write(tmp_path, rows, suffix), by=name)
    if name == "late":
        check(write(tmp_path, rows, suffix), id="late")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"by": "meta.tsk"}, "by is 'meta.tsk', which no row has; the first rows have "),
        ({"by": "nosuch"}, "by is 'nosuch', which no row has; "),
        ({"id": "uuid"}, "id_field is 'uuid', which no row has; "),
        ({"text": "body"}, "text_field is 'body', and no row was read from it; "),
        ({"messages": "chat"}, "messages_field is 'chat', and no row was read from it; "),
    ],
)
def test_a_field_that_no_row_has_is_named_with_those_that_they_have(tmp_path, suffix, fields, said):
    with pytest.raises(GvendiError) as error:
        check(write(tmp_path, [{"id": "1", **ROWS[0]}], suffix), **fields)
    told = str(error.value)
    assert told.startswith(said)
    assert "prompt, completion, meta, meta.task, meta.kind" in told
    assert told.endswith("; did you mean 'meta.task'?") == (fields.get("by") == "meta.tsk")


def test_what_is_read_by_default_need_not_be_there(tmp_path):
    check(write(tmp_path, [{"text": "a"}], "jsonl"))


def test_a_renamed_pair_is_found(tmp_path):
    path = write(tmp_path, [{"q": "1?", "a": "1."}, {"text": "b"}], "jsonl")
    check(path, prompt="q", completion="a")
    with pytest.raises(GvendiError, match="prompt_field is 'question', and no row was read from it"):
        check(path, prompt="question", completion="a")


def test_a_corpus_without_a_readable_row_is_not_judged(tmp_path):
    check(write(tmp_path, [{"nothing": 1}], "jsonl"), by="nosuch")


def test_many_names_are_cut_and_made_printable(tmp_path):
    row = {"text": "a", "\x1b[1m": 1} | {f"f{i}": i for i in range(60)}
    with pytest.raises(GvendiError) as error:
        check(write(tmp_path, [row], "jsonl"), by="nosuch")
    assert f" and {62 - MOST_NAMES} more" in str(error.value)
    assert "\x1b" not in str(error.value)
    assert "\\x1b[1m" in str(error.value)


def test_only_the_first_row_is_read_where_it_has_the_field(tmp_path, monkeypatch):
    from gvendi_fast.data import records

    manifest, read = index_corpus(write(tmp_path, ROWS, "jsonl"), Fields(by="meta.kind")), []
    plain = records.scan
    monkeypatch.setattr(records, "scan", lambda raw: read.append(1) or plain(raw))
    check_named_fields(manifest)
    assert len(read) == 1


def test_of_any_table_all_columns_are_named_not_only_those_in_use(tmp_path):
    path = tmp_path / "rows.arrow"
    table = pa.Table.from_pylist([{**row, "unused": 1} for row in ROWS])
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(GvendiError, match=r"the first rows have .*unused.*did you mean 'unused'"):
        check(path, by="unusd")
