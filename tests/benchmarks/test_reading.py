"""The benchmark of reading measures what it says, and refuses what would make its ratio meaningless."""

import json

import pytest

from benchmarks import reading
from gvendi_fast.data.index import UnitReader, index_corpus


@pytest.mark.parametrize("name", reading.CORPORA)
def test_both_loops_read_the_same_rows(tmp_path, monkeypatch, name):
    _, joined, has_ids = reading.CORPORA[name]
    monkeypatch.setitem(reading.CORPORA, name, (60, joined, has_ids))
    path = reading.make(tmp_path, name, 2)
    assert reading.read(path) == reading.index(path) == reading.read_plainly(path) == 120
    manifest = index_corpus(path)
    with UnitReader(manifest) as reader:
        found = [(row.prompt, row.completion) for unit in manifest.units for row in reader.read(unit)]
    assert found == [tuple(json.loads(line)[key] for key in ("prompt", "completion")) for line in path.open()]


def test_shares_are_of_one_round(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CORPORA", {"short rows": (40, 1, False)})
    entry = reading.measure(reading.make(tmp_path, "short rows"), 2)
    assert entry["rows"] == 40
    micro, share = entry["microseconds a row"], entry["share of the json loop's rate"]
    assert (
        micro["json"]["p20"] / micro["read"]["p80"] * 0.9
        <= share["p50"]
        <= micro["json"]["p80"] / micro["read"]["p20"] * 1.1
    )
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{}\n')
    with pytest.raises(SystemExit, match="1 of its rows cannot be read"):
        reading.measure(path, 1)
