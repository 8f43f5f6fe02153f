"""Data sets of the hub are streamed once into a file that is kept, and go on at the row where they broke off."""

import importlib.util
import json
import os
import tracemalloc
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="needs the package datasets, which the extra hub installs")
from fake_hub import NEW, OLD, FakeHub, hub_error

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data import hub_data
from gvendi_fast.data.hub_data import HubRows
from gvendi_fast.data.hub_names import HubName, hub_name
from gvendi_fast.data.index import Rejected, UnitReader, index_corpus
from gvendi_fast.data.listing import list_files


class Notes:
    """A Progress that keeps notes."""

    def __init__(self):
        self.told = []

    def note(self, text):
        self.told.append(text)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = FakeHub().install(monkeypatch)
    found.sets = {
        "one/set": {"default": {"train": 12}},
        "two/splits": {"main": {"test": 3, "train": 5}, "odd": {"a": 2, "b": 2}},
        "no/train": {"main": {"a": 2, "b": 2}},
    }
    return found


def lines(path):
    return Path(path).read_bytes().splitlines()


def expected(count, commit=OLD):
    return [
        json.dumps({"prompt": f"{n}?", "completion": f"{n} in {commit[0]}"}).encode() for n in range(count)
    ]


def rows_of(manifest):
    with UnitReader(manifest) as reader:
        return [row for unit in manifest.units for row in reader.read(unit)]


def test_rows_of_the_hub_are_read_under_their_name(hub, tmp_path):
    notes = Notes()
    manifest = index_corpus("one/set", rows_per_unit=5, hub=HubRows(tmp_path / "out", notes))
    name = f"one/set:default:train@{OLD}"
    assert [(source.path, source.kind, source.rows) for source in manifest.files] == [(name, "jsonl", 12)]
    rows = rows_of(manifest)
    assert [row.completion for row in rows] == [f"{n} in a" for n in range(12)]
    assert rows[3].id == f"{name}:4"
    assert lines(HubName("one/set", "default", "train").place_in(tmp_path / "out")) == expected(12)
    assert notes.told[0] == f"fetching all rows of {name}"
    assert notes.told[1].startswith("fetched one/set:default:train: 12 rows, ")
    assert notes.told[1].endswith(" rows/s, 0.0 MB on disk")


def test_a_fetch_that_broke_off_goes_on_at_its_row(hub, tmp_path):
    hub.breaks_at = 7
    with pytest.raises(
        GvendiError, match=r"^corpus: one/set:default:train@a{40} could not be downloaded .*the line is"
    ) as caught:
        index_corpus("one/set", hub=HubRows(tmp_path))
    assert caught.value.kept.startswith(
        f"7 rows of one/set:default:train@{OLD} are kept in '{tmp_path}'; the same "
    )
    path = HubName("one/set", "default", "train").place_in(tmp_path)
    assert lines(path) == expected(7)
    # A killed process may have written half a line.
    with open(path, "ab") as stream:
        stream.write(b'{"prompt": "7')
    # The hub has moved on: the rest comes from the commit of the beginning.
    hub.revisions["main"] = NEW
    notes = Notes()
    manifest = index_corpus("one/set", hub=HubRows(tmp_path, notes))
    assert lines(path) == expected(12)
    assert manifest.files[0].path == f"one/set:default:train@{OLD}"
    assert notes.told[1] == f"fetching all rows of one/set:default:train@{OLD} from row 8 on"
    # Now that all is there nobody is asked.
    hub.asked.clear()
    assert index_corpus("one/set", hub=HubRows(tmp_path)) == manifest
    assert hub.asked == []


def test_a_limit_fetches_so_many_rows_and_a_higher_one_goes_on(hub, tmp_path):
    path = HubName("one/set", "default", "train").place_in(tmp_path)
    assert index_corpus("one/set", limit=4, hub=HubRows(tmp_path)).rows == 4
    assert (lines(path), hub.read) == (expected(4), [0, 1, 2, 3])
    assert index_corpus("one/set", limit=9, hub=HubRows(tmp_path)).rows == 9
    assert lines(path) == expected(9)
    assert index_corpus("one/set", limit=2, hub=HubRows(tmp_path)).rows == 2
    assert lines(path) == expected(9)
    assert index_corpus("one/set", limit=50, hub=HubRows(tmp_path)).rows == 12
    assert lines(path) == expected(12)


def test_a_limit_that_is_reached_before_asks_for_no_row(hub, tmp_path):
    manifest = index_corpus(["one/set", "two/splits:main:test"], limit=12, hub=HubRows(tmp_path))
    assert [source.path for source in manifest.files] == [f"one/set:default:train@{OLD}"]
    assert ("rows", "two/splits") not in hub.asked
    manifest = index_corpus(["one/set", "two/splits:main:test"], limit=14, hub=HubRows(tmp_path))
    assert [source.rows for source in manifest.files] == [12, 2]


def test_one_data_set_spelled_twice_is_read_once(hub, tmp_path):
    manifest = index_corpus(
        ["one/set", "one/set:default:train", "one/set::train@main"], hub=HubRows(tmp_path)
    )
    assert manifest.rows == 12


def test_another_commit_is_refused_by_name(hub, tmp_path):
    index_corpus("one/set", limit=3, hub=HubRows(tmp_path))
    for name in ("one/set@next", f"one/set:default:train@{NEW}"):
        with pytest.raises(
            GvendiError, match=f"is commit {NEW} of one/set, and this run has rows of commit {OLD}; give"
        ):
            index_corpus(name, hub=HubRows(tmp_path))
    for name in ("one/set", "one/set@main", f"one/set@{OLD}", f"one/set:default:train@{OLD}"):
        assert index_corpus(name, limit=3, hub=HubRows(tmp_path)).rows == 3
    with pytest.raises(
        GvendiError, match=f"is commit {OLD} of one/set, and this run has rows of commit {NEW}; give"
    ):
        index_corpus(["one/set@next", "one/set@main"], hub=HubRows(tmp_path / "two"))
    assert index_corpus("one/set@next", limit=3, hub=HubRows(tmp_path / "other")).files[0].path.endswith(NEW)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two/splits", "two/splits has 2 configurations, main, odd; name one, as in 'two/splits:main'"),
        ("two/splits:nosuch", "has no configuration 'nosuch'; it has main, odd: name one"),
        ("two/splits:odd", "two/splits:odd has 2 splits, a, b; name one, as in 'two/splits:odd:a'"),
        ("no/train", "no/train:main has 2 splits, a, b; name one, as in 'no/train:main:a'"),
        (
            "two/splits:main:dev",
            "has no split 'dev'; it has test, train: name one, as in 'two/splits:main:test'$",
        ),
        ("one/set::train[:5]", r"has no split 'train\[:5\]'; it has train: .*first N rows can: --limit N$"),
        (
            "foo/bar",
            "'foo/bar' does not exist here, and a data set of this name is unknown to the Hugging Face hub, ",
        ),
        ("one/set@v9", "'one/set@v9' does not exist here, and a data set of this name has no revision 'v9'"),
    ],
)
def test_what_is_not_one_data_set_is_said_with_the_remedy(hub, name, words):
    with pytest.raises(GvendiError, match=words):
        index_corpus(name)


def test_train_is_read_of_several_splits_and_said(hub):
    notes = Notes()
    manifest = index_corpus("two/splits:main", hub=HubRows(progress=notes))
    assert manifest.files[0].path == f"two/splits:main:train@{OLD}"
    assert notes.told[0] == "of 'two/splits:main' the split train is read, not test"
    assert index_corpus("two/splits:main:test").rows == 3


def test_refusals_of_the_hub_are_one_sentence_with_the_remedy(hub, monkeypatch):
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants

    def gated():
        return DatasetNotFoundError("Dataset 'one/set' is a gated dataset on the Hub.")

    def gone():
        return DatasetNotFoundError(f"Revision '{OLD}' doesn't exist for dataset 'one/set' on the Hub.")

    def private():
        return hub_error("RepositoryNotFoundError")

    def slow():
        return TimeoutError("slow")

    def script():
        return RuntimeError("Dataset scripts are no longer supported, but found x.py")

    def other():
        return ValueError("a cast\nfailed")

    cases = {
        gated: r"^corpus: one/set:default:train@a+ is gated on the Hugging Face hub: accept .*HF_TOKEN",
        gone: r"^corpus: one/set:default:train@a+ has no revision 'a+' on the Hugging Face hub$",
        private: r"^corpus: one/set:default:train@a+ is unknown to the Hugging Face hub, or private .*HF_TOKEN",
        slow: r"could not be downloaded from the Hugging Face hub \(TimeoutError: slow\): try again",
        script: r"is made by a script, .* in 'one/set@refs/convert/parquet'$",
        other: r"cannot be read by the package datasets \(ValueError: a cast\); download",
    }
    for error, words in cases.items():
        hub.breaks_at, hub.error = 0, error
        with pytest.raises(GvendiError, match=words) as caught:
            index_corpus("one/set")
        assert "\n" not in str(caught.value)
        assert not hasattr(caught.value, "kept")
    hub.breaks_at, hub.error = 3, slow
    with pytest.raises(GvendiError, match="slow") as caught:
        index_corpus("one/set")
    assert caught.value.kept.startswith("the rows fetched so far are not kept; with --out DIR they are")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        GvendiError, match=r"cannot be asked for, as HF_HUB_OFFLINE is set: unset it, or download"
    ):
        index_corpus("one/set")


def test_interrupted_rows_are_kept(hub, tmp_path):
    hub.breaks_at, hub.error = 5, KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) as caught:
        index_corpus("one/set", hub=HubRows(tmp_path))
    assert caught.value.kept.startswith("5 rows of ")
    assert len(lines(HubName("one/set", "default", "train").place_in(tmp_path))) == 5


def test_a_missing_package_is_named_with_what_installs_it(hub, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "datasets" else found(name, *more)
    )
    with pytest.raises(
        GvendiError, match=r"'foo/bar' does not exist here; if it is .* pip install 'gvendi-fast\[hub\]'"
    ):
        list_files("foo/bar", with_hub=True)


def test_paths_are_no_names_of_the_hub(hub, tmp_path):
    paths = [
        "data/tain.jsonl",
        "data/x.parquet",
        "a/b/c",
        "./a/b",
        "/a/b",
        "a b/c",
        "word",
        "../a",
        "a/b.csv.gz",
    ]
    for path in paths:
        assert hub_name(path) is None
        with pytest.raises(GvendiError, match=r"does not exist$"):
            index_corpus(path)
    assert hub.asked == []
    # Where files of tests or seeds are wanted no name is taken.
    with pytest.raises(GvendiError, match=r"'one/set' does not exist$"):
        list_files("one/set")


def test_a_path_of_the_name_wins_and_is_said(hub, tmp_path):
    (tmp_path / "one" / "set").mkdir(parents=True)
    (tmp_path / "one" / "set" / "a.jsonl").write_bytes(b'{"text": "here"}\n')
    manifest = index_corpus("one/set")
    assert [row.text for row in rows_of(manifest)] == ["here"]
    assert "corpus: 'one/set' is read from here, not from the Hugging Face hub" in manifest.notes
    assert hub.asked == []


def test_names_keep_their_spelling():
    for text in ("a/b", "a/b:c", "a/b:c:d", "a/b::d", "a/b@v1", "a/b:c:d@refs/convert/parquet"):
        assert str(hub_name(text)) == text
    assert hub_name(f"a/b:c:d@{OLD}").is_recorded
    assert not hub_name("a/b:c:d@main").is_recorded
    places = {
        HubName(*parts).place_in(Path()) for parts in (("a/b", "c", "d"), ("a/b", "", "d"), ("a/b", "d"))
    }
    assert len(places) == 3


def test_columns_that_nobody_reads_refuse_no_row(hub, monkeypatch):
    from datasets import Features, Image, IterableDataset, Value

    png = b"\x89PNG\xff\x00"

    def load(repo, config, split, streaming, revision):
        features = Features(
            {"text": Value("string"), "image": Image(), "raw": Value("binary"), "at": Value("timestamp[s]")}
        )
        rows = [{"text": "a", "image": {"bytes": png, "path": None}, "raw": png, "at": 86400}] * 2
        return IterableDataset.from_generator(lambda: iter(rows), features=features)

    monkeypatch.setattr("datasets.load_dataset", load)
    manifest = index_corpus("one/set")
    rows = rows_of(manifest)
    assert [row.text for row in rows] == ["a", "a"]
    assert not any(isinstance(row, Rejected) for row in rows)


def test_files_of_a_real_builder_are_streamed_and_resumed(hub, tmp_path, monkeypatch):
    files = []
    for part in range(3):
        path = tmp_path / f"shard{part}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"prompt": f"{part} {n}?", "completion": "é", "n": [n, None]}) + "\n"
                for n in range(4)
            )
        )
        files.append(str(path))
    from datasets.load import load_dataset

    def load(repo, config, split, streaming, revision):
        return load_dataset("json", data_files={"train": files}, split=split, streaming=streaming)

    monkeypatch.setattr("datasets.load_dataset", load)
    index_corpus("one/set", hub=HubRows(tmp_path / "whole"))
    for limit in (5, 8, None):
        index_corpus("one/set", limit=limit, hub=HubRows(tmp_path / "parts"))
    name = HubName("one/set", "default", "train")
    whole = name.place_in(tmp_path / "whole").read_bytes()
    assert name.place_in(tmp_path / "parts").read_bytes() == whole
    assert whole.decode().splitlines()[5] == '{"prompt": "1 1?", "completion": "é", "n": [1, null]}'


def test_two_processes_do_not_fetch_into_one_folder(hub, tmp_path):
    fcntl = pytest.importorskip("fcntl", reason="this system has no locks of files")
    index_corpus("one/set", limit=2, hub=HubRows(tmp_path))
    path = HubName("one/set", "default", "train").place_in(tmp_path)
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(GvendiError, match=r"another process is fetching one/set:default:train into"):
            index_corpus("one/set", limit=5, hub=HubRows(tmp_path))
    assert index_corpus("one/set", limit=5, hub=HubRows(tmp_path)).rows == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_killed_fetch_goes_on(hub, tmp_path):
    index_corpus("one/set", limit=3, hub=HubRows(tmp_path))
    hub.breaks_at, hub.error = 8, lambda: os._exit(9)
    pid = os.fork()
    if not pid:
        try:
            index_corpus("one/set", hub=HubRows(tmp_path))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    path = HubName("one/set", "default", "train").place_in(tmp_path)
    assert 3 <= len(lines(path)) <= 8
    hub.breaks_at = None
    index_corpus("one/set", hub=HubRows(tmp_path))
    assert lines(path) == expected(12)


def test_a_full_disk_keeps_whole_lines(hub, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource", reason="this system has no limits of processes")
    monkeypatch.setattr(hub_data, "_PIECE", 100)
    path = HubName("one/set", "default", "train").place_in(tmp_path)
    rows = HubRows(tmp_path)
    name = rows.recorded("one/set")
    rows.file(name, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            rows.file(name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.filename, path.stat().st_size) == (str(path), 300)
    assert caught.value.kept.startswith("7 rows of ")
    assert rows.file(name) == str(path)
    assert lines(path) == expected(12)


def test_rows_that_are_lost_behind_the_state_are_fetched_again(hub, tmp_path):
    index_corpus("one/set", hub=HubRows(tmp_path))
    path = HubName("one/set", "default", "train").place_in(tmp_path)
    path.write_bytes(b"\n".join(expected(12)[:5]) + b"\n")
    assert index_corpus("one/set", hub=HubRows(tmp_path)).rows == 12
    path.unlink()
    assert index_corpus("one/set", hub=HubRows(tmp_path)).rows == 12
    assert lines(path) == expected(12)
    path.with_suffix(".json").unlink()
    with pytest.raises(
        GvendiError, match=r"holds rows of a commit that is not known, as 'hub-.*\.json' beside it is"
    ):
        index_corpus("one/set", limit=2, hub=HubRows(tmp_path))


def test_what_is_there_is_read_where_nothing_can_be_written(hub, tmp_path, monkeypatch):
    index_corpus("one/set", hub=HubRows(tmp_path))
    monkeypatch.setattr(hub_data, "_alone", None)
    assert index_corpus("one/set", hub=HubRows(tmp_path)).rows == 12
    assert index_corpus("one/set", limit=3, hub=HubRows(tmp_path)).rows == 3


def test_nothing_is_written_where_no_run_directory_can_be(hub, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    for folder, words in (
        ("", "path of the run directory is empty"),
        (other, "is not a run directory and holds other"),
    ):
        with pytest.raises(GvendiError, match=words):
            index_corpus("one/set", hub=HubRows(folder))
    assert [path.name for path in tmp_path.rglob("*")] == ["other", "mine.txt"]


def test_what_says_of_kept_rows_is_read_strictly(hub, tmp_path):
    index_corpus("one/set", limit=2, hub=HubRows(tmp_path))
    state = HubName("one/set", "default", "train").place_in(tmp_path).with_suffix(".json")
    good = json.loads(state.read_text())
    for bad in (
        {},
        {**good, "name": "one/set"},
        {**good, "name": good["name"].replace("train", "test")},
        [],
        {**good, "given": 3},
        {**good, "rows": -1},
    ):
        state.write_text(json.dumps(bad))
        with pytest.raises(
            GvendiError, match=r"does not say what 'hub-one--set-.*\.jsonl' beside it holds; remove both"
        ):
            index_corpus("one/set", hub=HubRows(tmp_path))


def test_memory_does_not_grow_with_the_rows(hub, tmp_path):
    def most(count):
        hub.sets["one/set"]["default"]["train"] = count
        hub.row = lambda commit, n: {"text": f"{n} " + "x" * 20_000}
        tracemalloc.start()
        index = HubRows(tmp_path / str(count))
        index.file(index.recorded("one/set"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    most(10)
    assert most(800) < most(100) + 2_000_000
