"""spec.json and units.json that someone edited: one sentence, and no number of other settings."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from small_runs import MANIFEST, SPEC

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.printing import json_text
from gvendi_fast.data.checking import check_run
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.run_files import read_json, read_score, score_content

BIG = 10**4000


def changed(content: dict, path: str, value: object) -> str:
    content = json.loads(json.dumps(content))
    *outer, last = path.split(".")
    place = content
    for key in outer:
        place = place[int(key) if key.isdecimal() else key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(content)


# What no file of a run directory may be, whatever is in it.
NO_JSON = {
    "empty": "",
    "cut": json.dumps(SPEC)[:-9],
    "a list": "[]",
    "null": "null",
    "a number": "12",
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "not a number": '{"units_total": NaN, "sketch": {"dim": NaN}}',
    "infinite": '{"units_total": 1e999, "sketch": {"dim": -Infinity}}',
    "twice": '{"format": 2, "format": 2, "units_total": 2}',
    "too many digits": '{"units_total": 1' + "0" * 5000 + ', "sketch": {"dim": 1' + "0" * 5000 + "}}",
    "not UTF-8": b'{"format": "\xff"}',
    "zeros": b"\0" * 64,
    "UTF-16": json.dumps(SPEC).encode("utf-16"),
}
SPEC_EDITS = [
    *(
        (path, value)
        for path in ("sketch.dim", "sketch", "coverage", "coverage.total")
        for value in (..., None, "x", [])
    ),
    *(("sketch.dim", value) for value in (16, 0, -8, 8.5, True, BIG, "8")),
    ("extra", 1),
    ("format", 3),
    ("mask", "released"),
    ("proxy.name", "other"),
    ("max_tokens", 512),
    ("sketch.seed", 1),
    ("groups", {"cells": 1, "names": None}),
]
UNITS_EDITS = [
    *(("units_total", value) for value in (..., None, "2", 2.0, -1, True, 3, 1, BIG)),
    *(("rows", value) for value in (None, "8", 7, 9, -1, BIG)),
    *(("rows_per_unit", value) for value in (None, "4", 0, 5, 1, BIG)),
    *(("limit", value) for value in ("8", -1, 1.5, [])),
    *(("fields", value) for value in (None, [], "x", {"prompt": 1}, {"unknown": "x"}, {"by": 1})),
    *(("files", value) for value in (None, {}, "x", [1], [None], [[]])),
    *(
        (f"files.0.{name}", value)
        for name in ("path", "kind", "digest")
        for value in (None, 1, [], "\0", "\ud800")
    ),
    *((f"files.0.{name}", value) for name in ("size", "rows") for value in (None, "1", -1, 1.5, True, BIG)),
    ("files.0.rows", 7),
    ("files.0.path", "b.jsonl"),
    ("extra", 1),
]
# In a directory of an earlier version nothing says what these were.
UNKNOWABLE = {
    "extra",
    "format",
    "mask",
    "proxy.name",
    "max_tokens",
    "sketch.seed",
    "groups",
    "coverage",
    "coverage.total",
}


def edited(made: Path, to: Path, name: str, content: str | bytes) -> Path:
    shutil.copytree(made, to)
    (to / name).write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return to


def use(run: Path) -> None:
    opened = RunDirectory.load(run)
    as_pool(opened).take(range(8))
    assert len(list(opened.rejected())) == 0


@pytest.mark.parametrize("name", ["spec.json", "units.json"])
@pytest.mark.parametrize("kind", NO_JSON)
@pytest.mark.parametrize("is_old", [False, True])
def test_what_is_no_object_of_json_is_named(made, tmp_path, name, kind, is_old):
    run = edited(made[is_old], tmp_path / "run", name, NO_JSON[kind])
    for read in (lambda: use(run), lambda: RunDirectory.open(run, SPEC, MANIFEST)):
        with pytest.raises(GvendiError) as caught:
            read()
        assert f"'{run / name}' is damaged (" in str(caught.value)
        assert "restore it" in str(caught.value)
        assert "delete" not in str(caught.value)


@pytest.mark.parametrize(("path", "value"), SPEC_EDITS, ids=lambda value: str(value)[:16])
@pytest.mark.parametrize("is_old", [False, True])
def test_an_edited_spec_is_noticed(made, tmp_path, path, value, is_old):
    if len(json.dumps(0 if value is ... else value)) > sys.get_int_max_str_digits():
        pytest.skip("this Python writes no integer of so many digits")
    run = edited(made[is_old], tmp_path / "run", "spec.json", changed(SPEC, path, value))
    if is_old and path in UNKNOWABLE:
        use(run)
        return
    with pytest.raises(GvendiError, match=r"spec\.json") as caught:
        use(run)
    assert "delete" not in str(caught.value)
    # The command that made it says what is different.
    with pytest.raises(GvendiError, match=r"was made with other settings|spec\.json' is damaged"):
        RunDirectory.open(run, SPEC, MANIFEST)


def test_a_spec_edited_to_what_a_command_asks_for_keeps_the_parts(made, tmp_path):
    """Parts of other settings are not thrown away because someone edited spec.json."""
    spec = json.loads(changed(SPEC, "mask", "released"))
    run = edited(made[False], tmp_path / "run", "spec.json", json.dumps(spec))
    with pytest.raises(
        GvendiError, match=r"spec\.json' is not the one that 'part-000000\.parquet' was made with"
    ):
        RunDirectory.open(run, spec, MANIFEST).broken()


def test_a_list_of_files_edited_in_a_path_keeps_the_parts(made, tmp_path):
    """The paths of a corpus may change, so that only the parts show that someone edited units.json."""
    path = "files.0.path"
    run = edited(made[False], tmp_path / "run", "units.json", changed(MANIFEST, path, "other.jsonl"))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(
        GvendiError,
        match=r"units\.json' is not the one that 'part-000000\.parquet' was made with; restore it",
    ):
        RunDirectory.open(run, SPEC, MANIFEST).broken()
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(("path", "value"), UNITS_EDITS, ids=lambda value: str(value)[:16])
@pytest.mark.parametrize("is_old", [False, True])
def test_an_edited_list_of_files_is_noticed(made, tmp_path, path, value, is_old):
    run = edited(made[is_old], tmp_path / "run", "units.json", changed(MANIFEST, path, value))
    if is_old and (path, value) in (("extra", 1), ("files.0.path", "b.jsonl")):
        use(run)
        return
    with pytest.raises(GvendiError, match=r"units\.json|its rows are not ascending ones of 5 to 7") as caught:
        use(run)
    assert "delete" not in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_a_corpus_whose_counts_are_huge_takes_no_memory(tmp_path):
    many = 1 << 60
    manifest = {**MANIFEST, "units_total": many, "rows": 4 * many}
    manifest["files"] = [{**MANIFEST["files"][0], "rows": 4 * many}]
    run = RunDirectory.open(tmp_path, SPEC, manifest)
    assert run.units_total == many
    with pytest.raises(GvendiError, match="is not complete"):
        run.finish()


def test_keys_that_occur_twice_are_named(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(GvendiError, match="it has 'b' twice"):
        read_json(path)


SCORE = {
    "gvendi": 12.25,
    "low": 1e-05,
    "n": 8,
    "growth": None,
    "by": {"é [/INST]": {"rows": 4}},
    "units_done": 2,
    "units_total": 2,
}


def test_every_byte_of_a_score_counts(made, tmp_path):
    path = shutil.copytree(made[False], tmp_path / "run") / "score.json"
    whole = json_text(score_content(SCORE), indent=1).encode()
    path.write_bytes(whole)
    assert read_score(path) == SCORE
    assert check_run(path.parent).findings == []
    for place in range(len(whole)):
        for bit in (0, 4):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(GvendiError, match=r"score\.json' is damaged \(.*with this --out again"):
                read_score(path)


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda text: text.replace("12.25", "12.26"), "its digest does not agree"),
        (lambda text: text.replace('"format"', '"fOrmat"'), "its digest does not agree"),
        (lambda text: text.replace('"digest"', '"dIgest"'), "its digest does not agree"),
        (
            lambda text: json_text({"n": 8, "format": 2, "digest": "c8be8d6f7c8ae7aa"}),
            "its digest does not agree",
        ),
        (lambda text: text[: len(text) // 2], "is damaged ("),
        (lambda text: json.dumps({**SCORE, "gvendi": 12.26}), None),
    ],
)
def test_an_edited_score_is_a_finding_and_one_without_a_digest_is_an_old_one(
    made, tmp_path, edit, said, is_whole
):
    path = shutil.copytree(made[False], tmp_path / "run") / "score.json"
    path.write_text(edit(json_text(score_content(SCORE), indent=1)))
    if not is_whole:
        (path.parent / "parts" / "part-000001.parquet").unlink()
    found = check_run(path.parent).findings
    assert [item.path for item in found] == [str(path)] * (said is not None)
    assert said is None or said in found[0].what
