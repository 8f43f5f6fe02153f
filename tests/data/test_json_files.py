"""JSON that is not one object a line: arrays, indented rows, rows inside an object, and all of them damaged."""

import gzip
import json
import random
import tracemalloc

import pyarrow as pa
import pytest

from gvendi_fast.data.index import Fields, Rejected, UnitReader, index_corpus
from gvendi_fast.data.originals import original_rows
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.sources import read_lines

RECORDS = [
    {"text": 'quotes " and \\ {[', "meta": {"list": [1, {"a": []}]}, "id": "x"},
    {"text": "ä 😀\n", "id": 2},
    {"id": "y", "text": "}]"},
    {"text": "the same id", "id": "x"},
]
LINES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
INDENTED = [json.dumps(record, ensure_ascii=False, indent=2) for record in RECORDS]
FORMS = {
    "array": json.dumps(RECORDS),
    "indented array": json.dumps(RECORDS, indent=1),
    "array of lines": "[\n" + ",\n".join(LINES) + "\n]\n",
    "commas first": "[\n  " + "\n, ".join(LINES) + "]",
    "lines": "\n".join(LINES),
    "blank lines": "\n\n" + "\n\n".join(LINES) + "\n",
    "indented rows": "\n".join(INDENTED),
    "rows behind each other": "\n".join(INDENTED).replace("\n}\n{", "\n}{"),
    "two arrays": json.dumps(RECORDS[:2]) + "\n" + json.dumps(RECORDS[2:]),
    "rows on one line": "".join(LINES),
    "some on one line": LINES[0] + LINES[1] + "\n" + LINES[2] + LINES[3],
    "mark": "\ufeff" + json.dumps(RECORDS, indent=1),
}


def rows_of(path, rows_per_unit=3, **settings):
    manifest = index_corpus(path, rows_per_unit=rows_per_unit, **settings)
    with UnitReader(manifest) as reader:
        rows = [row for unit in manifest.units for row in reader.read(unit)]
        # In any order: a work unit is found by reading up to it.
        assert list(reader.read(manifest.units[0])) == rows[: manifest.units[0].rows]
    assert len(rows) == manifest.rows
    return manifest, rows


def said(rows):
    return [row.reason if isinstance(row, Rejected) else row.text for row in rows]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_is_read_however_it_is_laid_out(tmp_path, form, suffix):
    path = tmp_path / f"a.json{suffix}"
    content = FORMS[form].encode()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": lambda c: pa.compress(c, "zstd", asbytes=True)}[suffix]
    path.write_bytes(pack(content))
    manifest, rows = rows_of(path)
    assert said(rows[:3]) == [record["text"] for record in RECORDS[:3]]
    assert rows[3].reason.startswith("duplicate id 'x' (first at ")
    assert (manifest.rows, manifest.duplicates, manifest.damaged) == (4, 1, ())
    run = RunDirectory.open(tmp_path / "run", {"sketch": {"dim": 4}}, manifest.to_dict())
    kept = list(original_rows(run, [0, 1, 3]))
    assert [row.record() for row in kept] == [RECORDS[i] for i in (0, 1, 3)]
    assert not any(b"\n" in row.raw for row in kept)


@pytest.mark.parametrize("form", ["array", "indented array", "array of lines", "indented rows", "mark"])
def test_other_json_under_the_name_of_json_lines_is_read(tmp_path, form):
    path = tmp_path / "a.jsonl"
    path.write_text(FORMS[form])
    assert said(rows_of(path)[1])[:3] == [record["text"] for record in RECORDS[:3]]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["data", "rows", "train"])
def test_rows_inside_an_object_are_read_and_said(tmp_path, name, indent):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps({"version": "1.0", name: RECORDS, "more": [{"text": "no row"}]}, indent=indent)
    )
    manifest, rows = rows_of(path)
    assert said(rows[:3]) == [record["text"] for record in RECORDS[:3]]
    assert manifest.rows == 4
    assert manifest.notes == (
        f"corpus: '{path}' holds its rows in the list '{name}'; what is beside it is not read",
    )


OWN = [{"id": f"i{i}", "items": [{"text": "inner"}, {"text": "too"}], "text": f"t{i}"} for i in range(3)]


@pytest.mark.parametrize("form", ["lines", "mark", "indented", "one line", "commas", "long", "array"])
def test_a_list_in_each_of_several_rows_does_not_hold_the_rows(tmp_path, form):
    path = tmp_path / "a.json"
    own = OWN if form != "long" else [{**row, "items": row["items"] * 20_000} for row in OWN]
    dumped = [json.dumps(row, indent=1 if form == "indented" else None) for row in own]
    between = {"one line": "", "commas": ",\n"}.get(form, "\n")
    text = json.dumps(own) if form == "array" else between.join(dumped) + "\n"
    path.write_text("\ufeff" * (form == "mark") + text)
    manifest, rows = rows_of(path)
    assert said(rows) == ["t0", "t1", "t2"]
    assert manifest.notes == ()


def test_an_object_that_holds_the_rows_does_so_whatever_is_broken_in_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"data": [\n{"text": "a},\n{"text": "b"},\n{"text": "c"}\n]}\n{')
    _, rows = rows_of(path)
    assert said(rows)[1:3] == ["b", "c"]
    assert said(rows)[0].startswith("broken JSON")


QUOTED = [{"text": f"t{i}", "list": [{"of": "x"}, {"of": "{"}]} for i in range(6)]


@pytest.mark.parametrize("piece", [1, 7, 1 << 17])
@pytest.mark.parametrize("end", ["]", "]\n", "\n]"])
@pytest.mark.parametrize("wrong", ['"t2 " more"', '"t2', 't2"', '"a "b" c", "n": "d'])
def test_a_quote_too_many_or_too_few_costs_its_row_only_where_rows_are_on_one_line(
    tmp_path, monkeypatch, piece, end, wrong
):
    monkeypatch.setattr("gvendi_fast.data.json_values._PIECE", piece)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(QUOTED)[:-1].replace('"t2"', wrong) + end)
    _, rows = rows_of(path)
    assert said(rows)[:2] == ["t0", "t1"]
    assert said(rows)[2].startswith("broken JSON")
    assert said(rows)[3:] == ["t3", "t4", "t5"]


def test_an_array_whose_last_row_has_a_quote_too_many_is_not_said_to_have_no_end(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": "x " y"}]')
    _, rows = rows_of(path)
    assert said(rows) == [
        "a",
        "damaged file: its row at byte 16 has a quote too many or too few, so that its end is not known; "
        "how many rows are lost is not known",
    ]


UNREAD = {
    "digits": b"9" * 5000,
    "half a character": b'"\\ud83d"',
    "no UTF-8": b'"\xff\xfe"',
    "levels": b"[" * 70 + b"]" * 70,
    "no finite number": b"[NaN, 1e999, 1.10]",
}


@pytest.mark.parametrize("kind", UNREAD)
def test_a_row_over_several_lines_comes_back_as_it_is_written(tmp_path, kind):
    path = tmp_path / "a.json"
    content = json.dumps([{"text": "a", "more": "HERE", "list": [1, {"x": []}]}, {"text": "b"}], indent=2)
    path.write_bytes(content.encode().replace(b'"HERE"', UNREAD[kind]).replace(b"\n", b"\r\n"))
    manifest, rows = rows_of(path)
    assert said(rows) == ["a", "b"]
    run = RunDirectory.open(tmp_path / "run", {"sketch": {"dim": 4}}, manifest.to_dict())
    first, second = original_rows(run, [0, 1])
    assert first.raw == b'{"text": "a", "more": ' + UNREAD[kind] + b', "list": [1, {"x": []}]}'
    assert second.raw == b'{"text": "b"}'
    assert first.record()["text"] == "a"


A, B = '{"text": "a"}', '{"text": "b"}'
SHORT = "damaged file: its JSON array has no end, the file ends at byte "
DAMAGES = {
    "no quote": (f'[\n{A},\n{{"text": "x}},\n{B}\n]', ["a", "broken JSON", "b"]),
    "no quote, last": (f'[\n{A},\n{{"text": "x}}\n]', ["a", "broken JSON"]),
    "no quote, indented": (f'[\n  {A},\n  {{\n    "text": "x,\n    "n": 1\n  }},\n  {B}\n]', ["a", "broken JSON", "b"]),
    "no bracket": (f'[\n{A},\n{{"text": ["x"}},\n{B}\n]', ["a", "broken JSON", "b"]),
    "no bracket, one line": (f'[{A}, {{"text": ["x"}}, {B}]', ["a", "broken JSON", "b"]),
    "other values": (f'[{A}, 1, null, "x", [2], {B}]', ["a", *["broken JSON: an object is wanted"] * 4, "b"]),
    "other words": (f"[{A}, oops, {B}]", ["a", "broken JSON", "b"]),
    "no commas": (f"[{A} {B}]", ["a", "b"]),
    "cut behind a row": (f"[{A}, {B}", ["a", "b", SHORT]),
    "cut inside a row": (f'[{A}, {B}, {{"text": "', ["a", "b", SHORT]),
    "cut row, no array": ('{\n "text": "a"\n}\n{\n "te', ["a", "broken JSON"]),
    "not UTF-8": (f'[{A}, {{"text": "\udcff"}}, {B}]', ["a", "invalid UTF-8", "b"]),
    "deep": (f'[{A}, {{"text": {"[" * 200 + "]" * 200}}}, {B}]', ["a", "field 'text' is not a string", "b"]),
    "closed twice": (f"[{A}]], {B}", ["a", "broken JSON", "b"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_broken_row_costs_itself_only(tmp_path, kind):
    content, wanted = DAMAGES[kind]
    path = tmp_path / "a.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    manifest, rows = rows_of(path, 100)
    found = said(rows)
    assert len(found) == len(wanted), found
    assert all(reason.startswith(begin) for reason, begin in zip(found, wanted, strict=True)), found
    assert bool(manifest.damaged) == (wanted[-1] == SHORT)
    if manifest.damaged:
        assert found[-1] == f"{SHORT}{path.stat().st_size}; how many rows are lost is not known"


def test_a_packed_array_that_is_cut_gives_one_entry(tmp_path):
    rows = [{"text": f"{i} {random.Random(i).random()}"} for i in range(500)]
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode(), mtime=0)[:-1000])
    manifest, found = rows_of(path, 100)
    *good, last = said(found)
    assert good == [row["text"] for row in rows[: len(good)]]
    assert len(good) > 400
    assert last.startswith("damaged archive: it ends too early, at byte ")
    assert len(manifest.damaged) == 1


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
def test_pieces_do_not_change_what_is_read(tmp_path, monkeypatch, piece):
    from gvendi_fast.data import json_values

    path = tmp_path / "a.json"
    contents = [*FORMS.values(), *(content for content, _ in DAMAGES.values())]
    for content in contents:
        path.write_bytes(content.encode(errors="surrogateescape"))
        whole = list(read_lines(str(path), "json"))
        with monkeypatch.context() as changed:
            changed.setattr(json_values, "_PIECE", piece)
            assert list(read_lines(str(path), "json")) == whole, content


def test_any_bytes_give_rows_or_reasons(tmp_path):
    draws, path = random.Random(5), tmp_path / "a.json"
    for _ in range(300):
        content = bytearray(FORMS[draws.choice(list(FORMS))].encode())
        for _ in range(draws.randrange(1, 5)):
            place = draws.randrange(len(content))
            content[place : place + draws.randrange(3)] = draws.choice(
                [b"", b'"', b"{", b"]", b"\\", b"\n", b"\xff"]
            )
        path.write_bytes(content)
        found = list(read_lines(str(path), "json"))
        assert [number for number, _, _ in found] == sorted({number for number, _, _ in found})


def test_a_long_row_is_refused_and_never_held(tmp_path):
    path = tmp_path / "a.json"
    long = json.dumps({"text": 'x"\\' * 60_000})
    with path.open("w") as stream:
        stream.write(f"[{A}, {long}, {B}")
        stream.writelines(f", {long}" for _ in range(4))
        stream.write(f", {A}]")
    tracemalloc.start()
    _, rows = rows_of(path, 100, max_row_bytes=1 << 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said(rows)[::2] == ["a", "b", *[f"too long: {len(long):,} bytes, --max-row-bytes is 65,536"] * 2]
    assert said(rows)[-1] == "a"
    assert peak < 2 << 20


def test_limits_and_changes_are_noticed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS, indent=1))
    manifest, rows = rows_of(path, limit=2)
    assert said(rows) == [record["text"] for record in RECORDS[:2]]
    run = RunDirectory.open(tmp_path / "run", {"sketch": {"dim": 4}}, manifest.to_dict())
    assert [row.record() for row in original_rows(run, [1])] == [RECORDS[1]]
    path.write_text(json.dumps(RECORDS, indent=1).replace("same", "SAME"))
    # Behind the limit, so that no row of the run is another one.
    assert [row.record() for row in original_rows(run, [1])] == [RECORDS[1]]
    path.write_text(json.dumps(RECORDS, indent=1).replace("quotes", "QUOTES"))
    with pytest.raises(Exception, match="has changed since it was sketched"):
        list(original_rows(run, [1]))
    with UnitReader(manifest) as reader, pytest.raises(Exception, match="has changed since it was indexed"):
        list(reader.read(manifest.units[0]))


def test_fields_of_rows_are_those_of_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"q": "1", "a": "2", "meta": {"task": "t"}}], indent=4))
    (row,) = rows_of(path, fields=Fields(prompt="q", completion="a", by="meta.task"))[1]
    assert (row.prompt, row.completion, row.group, row.id) == ("1", "2", "t", f"{path}:1")
