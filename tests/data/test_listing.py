"""Finding files: what cannot be read is named and never opened, what is no data is passed over and said."""

import os
import socket
import tempfile
from pathlib import Path

import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import UnitReader, index_corpus
from gvendi_fast.data.listing import UnreadableFileError, list_files

ROW = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def folder(tmp_path):
    """A corpus of two files, one in a folder of its own."""
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    (root / "a.jsonl").write_bytes(ROW)
    (root / "sub" / "b.jsonl").write_bytes(ROW)
    return root


def names(listing, root) -> list[str]:
    return [os.path.relpath(path, root) for path in listing.files]


def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        # Paths of sockets are short.
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def device(path):
    path.symlink_to("/dev/zero")


def dangling(path):
    path.symlink_to("gone.jsonl")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (fifo, "is a FIFO, not a file"),
        (unix_socket, "is a socket, not a file"),
        (device, "is a device, not a file"),
        (dangling, "is a link to 'gone.jsonl', which does not exist"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_special_files_are_named_and_not_opened(folder, make, what, suffix):
    path = folder / f"z.{suffix}"
    make(path)
    for inputs in (folder, path, str(folder / "*")):
        with pytest.raises(UnreadableFileError, match=what) as caught:
            index_corpus(inputs)
        assert str(path) in str(caught.value)
    listing = list_files(folder, skip_unreadable=True)
    assert names(listing, folder) == ["a.jsonl", "sub/b.jsonl"]
    assert [item.path for item in listing.unreadable] == [str(path)]
    manifest = index_corpus(folder, skip_unreadable=True)
    assert manifest.rows == 2
    assert manifest.to_dict()["unreadable"][0]["path"] == str(path)


def test_a_link_to_itself_is_the_systems_error(folder):
    (folder / "z.jsonl").symlink_to("z.jsonl")
    with pytest.raises(OSError, match="symbolic links") as caught:
        index_corpus(folder)
    assert caught.value.filename == str(folder / "z.jsonl")
    assert len(index_corpus(folder, skip_unreadable=True).unreadable) == 1


def refuse(monkeypatch, refused) -> None:
    def scandir(path, _scandir=os.scandir):
        if os.fspath(path) == str(refused):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return _scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize("pattern", ["", "/*/*.jsonl", "/**/*.jsonl", "/**", "/s*"])
def test_a_folder_that_cannot_be_listed(folder, monkeypatch, pattern):
    refuse(monkeypatch, folder / "sub")
    with pytest.raises(PermissionError) as caught:
        list_files(str(folder) + pattern)
    assert caught.value.filename == str(folder / "sub")
    listing = list_files([str(folder) + pattern, folder / "a.jsonl"], skip_unreadable=True)
    assert names(listing, folder) == ["a.jsonl"]
    assert {(item.path, item.reason) for item in listing.unreadable} == {
        (str(folder / "sub"), "Permission denied")
    }


def test_a_named_folder_that_cannot_be_listed(folder, monkeypatch):
    refuse(monkeypatch, folder)
    with pytest.raises(PermissionError):
        index_corpus(folder)
    with pytest.raises(GvendiError, match=r"none of its 1 file.* can be read.*Permission denied"):
        index_corpus(folder, skip_unreadable=True)


@pytest.mark.skipif(not hasattr(os, "fork") or os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("closed", ["sub", "sub/b.jsonl"])
def test_another_user_is_refused_by_name(closed):
    # Not below tmp_path, whose parents are closed to others.
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "sub").mkdir()
        for path in (root / "a.jsonl", root / "sub" / "b.jsonl"):
            path.write_bytes(ROW)
        (root / closed).chmod(0)
        child = os.fork()
        if child == 0:
            os._exit(not _is_refused_to_nobody(root, str(root / closed)))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _is_refused_to_nobody(root: Path, closed: str) -> bool:
    os.setuid(65534)
    try:
        index_corpus(root)
    except PermissionError as error:
        kept = index_corpus(root, skip_unreadable=True)
        return error.filename == closed == kept.unreadable[0].path and kept.rows == 1
    return False


def test_a_file_that_vanishes_or_fails_after_the_listing(folder, monkeypatch):
    from gvendi_fast.data import index

    def listed(inputs, skip, _list=index.list_files):
        found = _list(inputs, skip)
        (folder / "a.jsonl").unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(index, "list_files", listed)
        with pytest.raises(FileNotFoundError) as caught:
            index_corpus(folder)
        assert caught.value.filename == str(folder / "a.jsonl")
        (folder / "a.jsonl").write_bytes(ROW)
        manifest = index_corpus(folder, skip_unreadable=True)
    assert [os.path.basename(source.path) for source in manifest.files] == ["b.jsonl"]


def test_ids_of_a_file_that_fails_half_way_do_not_count(folder, monkeypatch):
    from gvendi_fast.data import unpacking

    for path in (folder / "a.jsonl", folder / "sub" / "b.jsonl"):
        path.write_bytes(b'{"text": "t", "id": "x"}\n' * 2)

    class Failing:
        def __init__(self, stream):
            self.stream, self.left = stream, 1

        def close(self):
            self.stream.close()

        def readline(self, size):
            if self.left == 0:
                raise OSError(5, "Input/output error")
            self.left -= 1
            return self.stream.readline(size)

    class Opened(unpacking.Text):
        def __init__(self, path, *rest):
            super().__init__(path, *rest)
            self.stream = Failing(self.stream) if path.endswith("a.jsonl") else self.stream

    monkeypatch.setattr(unpacking, "Text", Opened)
    with pytest.raises(OSError, match="Input/output error") as caught:
        index_corpus(folder)
    assert caught.value.filename == str(folder / "a.jsonl")
    manifest = index_corpus(folder, skip_unreadable=True)
    # The first of the other file's two rows is no copy of a row that was never read.
    assert (manifest.rows, manifest.duplicates) == (2, 1)
    with UnitReader(manifest) as reader:
        first, second = reader.read(manifest.units[0])
    assert first.id == "x"
    assert second.reason == f"duplicate id 'x' (first at {folder}/sub/b.jsonl:1)"


def make_run(path):
    (path / "parts").mkdir(parents=True)
    (path / "spec.json").write_text("{}")
    (path / "rejected.jsonl").write_bytes(ROW)
    (path / "parts" / "part-000000.parquet").write_bytes(b"PAR1")


def make_synthesis(path):
    path.mkdir(parents=True)
    for name in ("events", "accepted", "rejected"):
        (path / f"{name}.jsonl").write_bytes(ROW)


@pytest.mark.parametrize("make", [make_run, make_synthesis])
@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.*", "/*", "/*/*.jsonl", "/*/*/*.*"])
def test_results_inside_the_corpus_are_no_data(folder, make, pattern):
    before = list_files(str(folder) + pattern) if pattern != "/*/*/*.*" else None
    make(folder / "out")
    make(folder / "sub" / "deep")
    if before is None:
        with pytest.raises(GvendiError, match="matches no"):
            list_files(str(folder) + pattern)
        return
    listing = list_files(str(folder) + pattern)
    assert listing.files == before.files
    assert any("whose files are not read as data" in note for note in listing.notes)
    assert list_files(str(folder) + pattern) == listing


@pytest.mark.parametrize(("make", "what"), [(make_run, "a run directory"), (make_synthesis, "synthesis run")])
def test_results_that_are_named_are_refused(tmp_path, make, what):
    make(tmp_path / "out")
    with pytest.raises(GvendiError, match=f"{what}; name"):
        list_files(tmp_path / "out")


def test_links_in_circles_end_and_files_are_read_once(folder):
    for name in ("one", "two", "three"):
        (folder / name).symlink_to(folder)
    (folder / "sub" / "again.jsonl").symlink_to(folder / "a.jsonl")
    listing = list_files(folder)
    assert names(listing, folder) == ["a.jsonl", "sub/b.jsonl"]
    assert any("read once" in note for note in listing.notes)
    # Three links to the top would be 3^40 paths to whoever follows them.
    assert names(list_files(str(folder / "**" / "*.jsonl")), folder) == ["a.jsonl", "sub/b.jsonl"]


def test_links_to_folders_are_followed_once(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    for path in (data / "sub", other / "deep"):
        path.mkdir(parents=True)
        (path / "a.jsonl").write_bytes(b'{"text": "t"}\n')
    # The folder comes behind its link by name, and counts under its own path.
    (data / "link").symlink_to("sub")
    (data / "outside").symlink_to(other)
    (data / "outside again").symlink_to(other)
    (other / "back").symlink_to(data)
    (other / "up").symlink_to(tmp_path)
    listing = list_files(data)
    assert names(listing, data) == ["outside/deep/a.jsonl", "sub/a.jsonl"]
    (note,) = listing.notes
    assert (
        note == f"corpus: '{data}/outside/up' is a link to a folder that holds this one, and is not followed"
    )
    assert index_corpus(data).rows == 2
    # A run directory behind a link is no data either.
    make_run(tmp_path / "run")
    (data / "results").symlink_to(tmp_path / "run")
    assert names(list_files(data), data) == names(listing, data)


def test_links_to_nothing_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "t"}\n')
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    listing = list_files(tmp_path)
    assert names(listing, tmp_path) == ["a.jsonl"]
    assert listing.notes == (f"corpus: '{tmp_path}/gone' is a link to what does not exist",)
    with pytest.raises(UnreadableFileError, match=r"is a link to '.*nowhere', which does not exist; remove"):
        list_files(tmp_path / "gone")


def test_names_that_differ_in_case_alone(tmp_path):
    """Two files, unless they are one: a hard link stands for a system that ignores case."""
    lower, upper, other = tmp_path / "data.jsonl", tmp_path / "DATA.jsonl", tmp_path / "Data.jsonl"
    lower.write_bytes(ROW)
    other.write_bytes(ROW)
    os.link(lower, upper)
    listing = list_files([lower, upper, other])
    assert listing.files == (str(lower), str(other))
    assert any("read once" in note for note in listing.notes)
    # A copy of another name is one.
    os.link(lower, tmp_path / "more.jsonl")
    assert len(list_files([lower, tmp_path / "more.jsonl"]).files) == 2


def test_a_glob_goes_through_links_to_folders(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.jsonl").write_bytes(ROW)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    for pattern in ("*/*.jsonl", "**/*.jsonl", "link/*"):
        assert str(folder / "link" / "c.jsonl") in list_files(str(folder / pattern)).files


@pytest.mark.parametrize("name", ["a\0b.jsonl", "\0"])
def test_a_name_that_is_no_path(name):
    with pytest.raises(GvendiError, match="is no path"):
        list_files(name)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "jsonl.gz"])
def test_a_folder_named_like_a_file_is_a_folder(tmp_path, suffix):
    inside = tmp_path / f"x.{suffix}"
    inside.mkdir()
    (inside / "a.jsonl").write_bytes(ROW)
    assert list_files(tmp_path).files == list_files(inside).files == (str(inside / "a.jsonl"),)
