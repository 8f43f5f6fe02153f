"""Files at URLs, by fsspec's store in memory: a run directory and a corpus are as on this machine."""

import errno
import gzip
import io
import json
import pickle
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from small_runs import MANIFEST, SPEC, make_run

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write, exists, names_in, stale
from gvendi_fast.base.os_errors import StoreError, sentence
from gvendi_fast.base.places import is_url, local_name, name_of, place, status_of
from gvendi_fast.data.checking import check_run
from gvendi_fast.data.index import index_corpus, read_unit
from gvendi_fast.data.kinds import kind_of
from gvendi_fast.data.listing import find_files, list_files, short_names
from gvendi_fast.data.originals import original_rows
from gvendi_fast.data.run_directory import RunDirectory, is_any_done, recorded_store

fsspec = pytest.importorskip("fsspec", reason="URLs are read through fsspec")
pytest.importorskip("upath", reason="URLs are read through universal_pathlib")

MEMORY = "memory://test"


@pytest.fixture
def store(monkeypatch):
    """The store in memory, empty, whose calls are tried again at once."""
    from fsspec.implementations.memory import MemoryFileSystem

    from gvendi_fast.base import urls

    monkeypatch.setattr(urls, "WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return MemoryFileSystem


def put(url: str, content: bytes) -> None:
    with atomic_write(place(url)) as stream:
        stream.write(content)


def files_of(root) -> dict[str, bytes]:
    """{path below a folder: its bytes}."""
    if isinstance(root, Path):
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return {p.path[len(root.path) + 1 :]: p.read_bytes() for p in root.find()}


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("s3://bucket/a", True),
        ("https://host/a.jsonl?key=1", True),
        ("file:///tmp/a", False),
        ("C://a", False),
        ("a/b", False),
        ("s3:/bucket", False),
        ("owner/name:config:split", False),
    ],
)
def test_what_a_url_is(text, is_one):
    assert is_url(text) == is_one
    assert is_url(Path("a")) is False


def test_files_of_this_machine_have_plain_paths(tmp_path):
    assert place(f"file://{tmp_path}") == tmp_path == place(tmp_path) == place(str(tmp_path))
    assert [local_name(text) for text in ("file:///a/b", "s3://a")] == ["/a/b", "s3://a"]
    assert (name_of("http://h/a/b.csv.gz?sig=x/y#z"), kind_of("http://h/b.csv.gz?x=1")) == (
        "b.csv.gz",
        "csv.gz",
    )
    assert kind_of("s3://b/c/d.PARQUET") == "parquet"
    assert short_names(["s3://b/x/one.jsonl", "s3://b/y/one.jsonl"]) == ["x/one.jsonl", "y/one.jsonl"]
    assert short_names(["s3://b/x/one.jsonl"]) == ["one.jsonl"]


def test_a_run_directory_is_as_on_this_machine(store, tmp_path):
    root = place(f"{MEMORY}/run")
    make_run(tmp_path / "run", is_old=False)
    make_run(root, is_old=False)
    assert files_of(root) == files_of(tmp_path / "run")
    here, there = RunDirectory.load(tmp_path / "run"), RunDirectory.load(f"{MEMORY}/run")
    assert there.done() == [0, 1]
    assert [is_any_done(f"{MEMORY}/{name}") for name in ("run", "none")] == [True, False]
    for one, other in zip(here.iterate(), there.iterate(), strict=True):
        assert one.ids == other.ids
        np.testing.assert_array_equal(one.sketches, other.sketches)
    assert check_run(f"{MEMORY}/run").findings == []
    assert pickle.loads(pickle.dumps(there)).done() == [0, 1]
    there.remove_part(1)
    assert RunDirectory.open(root, SPEC, MANIFEST).done() == [0]


def test_the_first_spec_counts_and_others_are_refused(store):
    make_run(place(f"{MEMORY}/run"), is_old=False)
    with pytest.raises(GvendiError, match="other settings"):
        RunDirectory.open(f"{MEMORY}/run", {**SPEC, "dtype": "float16"}, MANIFEST)
    for content in (b"one", b"two"):
        with atomic_write(place(f"{MEMORY}/x"), exclusive=True) as stream:
            stream.write(content)
    assert place(f"{MEMORY}/x").read_bytes() == b"one"
    put(f"{MEMORY}/int8/spec.json", json.dumps({**SPEC, "store": "int8"}).encode())
    assert recorded_store(f"{MEMORY}/int8") == "int8"
    put(f"{MEMORY}/other/readme.md", b"")
    with pytest.raises(GvendiError, match="holds other things, such as 'readme"):
        RunDirectory.open(f"{MEMORY}/other", SPEC, MANIFEST)
    with pytest.raises(GvendiError, match="does not exist"):
        RunDirectory.load(f"{MEMORY}/none")


def test_what_raises_inside_writes_nothing(store):
    def broken() -> None:
        with atomic_write(place(f"{MEMORY}/a")) as stream:
            stream.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert not exists(place(f"{MEMORY}/a"))
    assert names_in(place(MEMORY)) == [] == stale(place(MEMORY))
    with pytest.raises(io.UnsupportedOperation, match="written whole"):
        place(f"{MEMORY}/a").open("wb")


def test_damage_is_found_in_a_store_too(store):
    root = place(f"{MEMORY}/run")
    make_run(root, is_old=False)
    path = root / "parts" / "part-000001.parquet"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    put(str(path), bytes(content))
    assert [finding.path for finding in check_run(root).findings] == [str(path)]


def write_kinds(folder) -> list[str]:
    """Two rows of each kind of file in a folder."""
    rows = [{"id": f"r{i}", "prompt": f"p{i}", "completion": "é" * (i + 1)} for i in range(2)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table, sink, arrow = pa.Table.from_pylist(rows), io.BytesIO(), io.BytesIO()
    pq.write_table(table, sink)
    pyarrow.feather.write_feather(table, arrow)
    contents = {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines, mtime=0),
        "c.csv": b"id,prompt,completion\n"
        + b"".join(f"{r['id']},p,{r['completion']}\n".encode() for r in rows),
        "d.json": json.dumps(rows).encode(),
        "deep/e.parquet": sink.getvalue(),
        "deep/f.arrow": arrow.getvalue(),
        "deep/.hidden.jsonl": lines,
        "notes.md": b"#",
    }
    for name, content in contents.items():
        path = folder / name
        if isinstance(folder, Path):
            path.parent.mkdir(exist_ok=True, parents=True)
        with atomic_write(path) as stream:
            stream.write(content)
    return [name for name in contents if "hidden" not in name and "notes" not in name]


def test_a_corpus_is_as_on_this_machine(store, tmp_path):
    names = write_kinds(tmp_path / "data")
    write_kinds(place(f"{MEMORY}/data"))
    make_run(place(f"{MEMORY}/data/run"), is_old=False)
    assert find_files(f"{MEMORY}/data") == [f"{MEMORY}/data/{name}" for name in names]
    assert find_files(f"{MEMORY}/data/*.json*") == [
        f"{MEMORY}/data/{name}" for name in (names[0], names[1], names[3])
    ]
    assert len(find_files(f"{MEMORY}/data/**/*.*")) == len(names)
    assert "is a run directory" in list_files(f"{MEMORY}/data").notes[0]
    here, there = index_corpus(tmp_path / "data"), index_corpus(f"{MEMORY}/data")

    def shown(manifest, folder) -> list[str]:
        rows = [row for unit in manifest.units for row in read_unit(manifest, unit)]
        return [str(row).replace(f"{folder}", "") for row in rows]

    assert shown(there, f"{MEMORY}/data") == shown(here, tmp_path / "data")
    assert there.rows == 12
    assert [unit.digest for unit in here.units] == [unit.digest for unit in there.units]
    assert there.duplicates == 10
    run = RunDirectory.open(f"{MEMORY}/made", SPEC, there.to_dict())
    assert [original.file for original in original_rows(run, [0, 11])] == [
        there.files[0].path,
        there.files[-1].path,
    ]
    index = next(number for number, file in enumerate(there.files) if file.path.endswith("e.parquet"))
    for name, file in (("a.jsonl", 0), ("deep/e.parquet", index)):
        url = place(f"{MEMORY}/data/{name}")
        content = url.read_bytes().replace(b"p1", b"p9")
        put(str(url), content)
        unit = next(unit for unit in there.units if unit.file == file)
        with pytest.raises(GvendiError, match="has changed since it was indexed"):
            list(read_unit(there, unit))
        put(str(url), content + b"\n")
        with pytest.raises(GvendiError, match="has changed since it was indexed"):
            list(read_unit(there, unit))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.jsonl", "does not exist"),
        ("data/notes.md", "has an unknown suffix"),
        ("data/x*.csv", "matches nothing"),
        ("data/*.md", "matches no file with a suffix"),
        ("run", "is a run directory; name the data"),
        ("run/parts/../..", "does not exist"),
    ],
)
def test_what_is_no_corpus_is_refused_by_its_url(store, name, said):
    write_kinds(place(f"{MEMORY}/data"))
    make_run(place(f"{MEMORY}/run"), is_old=False)
    with pytest.raises(GvendiError, match=said):
        find_files(f"{MEMORY}/{name}")


def test_calls_are_tried_again_and_then_named(store, monkeypatch):
    url = place(f"{MEMORY}/a")
    put(str(url), b"0123456789")
    answers: list = []
    plain = store.cat_file

    def cat_file(self, path, start=None, end=None, **more):
        answer = answers.pop(0) if answers else None
        if isinstance(answer, Exception):
            raise answer
        return plain(self, path, start, end)[:answer]

    monkeypatch.setattr(store, "cat_file", cat_file)
    answers[:] = [OSError(errno.EIO, "no"), 3]
    assert url.read_range(2, 6) == b"2345"
    answers[:] = [ConnectionResetError(), 9]
    assert url.read_bytes() == b"0123456789"
    answers[:] = [1, 1, 1]
    with pytest.raises(StoreError) as caught:
        url.read_range(2, 6)
    assert sentence(caught.value) == (
        f"'{url}' cannot be used: its store failed ([Errno 5] 1 of 4 bytes came, tried 3 times)"
    )
    # Trying again would not help, and a fault of this program is none of the store's.
    for error, kind, left in (
        (PermissionError("key"), StoreError, 1),
        (FileNotFoundError(), FileNotFoundError, 1),
        (KeyError("fault"), KeyError, 1),
    ):
        answers[:] = [error, 5]
        with pytest.raises(kind) as caught:
            url.read_bytes()
        assert len(answers) == left
        assert getattr(caught.value, "filename", str(url)) == str(url)


def test_ranges_grow_while_one_reads_on(store, monkeypatch):
    content = np.random.default_rng(0).bytes(3 << 20)
    url = place(f"{MEMORY}/a")
    put(str(url), content)
    asked = []
    plain = store.cat_file
    monkeypatch.setattr(
        store,
        "cat_file",
        lambda self, path, start=None, end=None: (asked.append((start, end)), plain(self, path, start, end))[
            1
        ],
    )
    with url.open("rb", 1 << 17) as stream:
        assert stream.read() == content
    assert [end - start for start, end in asked][:3] == [1 << 18, 1 << 19, 1 << 20]
    with url.open() as stream:
        stream.seek(-20, 2)
        assert [stream.read(), stream.read()] == [content[-20:], b""]
        stream.seek(5)
        assert stream.read(10) == content[5:15]
    assert asked[-2:] == [(len(content) - 20, len(content)), (5, 5 + (1 << 18))]
    with pytest.raises(IsADirectoryError):
        place(MEMORY).open()
    before = status_of(url)
    put(str(url), content[:-1])
    assert status_of(url) != before
    assert url.stat().st_size == len(content) - 1


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("gs://bucket/run", "what reads gs:// is not installed; pip install 'gcsfs'"),
        ("abfs://bucket/run", "what reads abfs:// is not installed; pip install 'adlfs'"),
        ("nothing://bucket/run", "there is nothing that reads nothing://"),
        ("http://127.0.0.1:9/run", "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_used_says_why(store, monkeypatch, url, said):
    if "pip" in said:
        # As where it is not installed.
        monkeypatch.setitem(sys.modules, said.split("'")[1], None)
    with pytest.raises(GvendiError, match=said), atomic_write(place(url)) as stream:
        stream.write(b"")


class _Web(BaseHTTPRequestHandler):
    """A web server."""

    knows_ranges = True
    # The status of every answer, where it has one of its own.
    fails = 0
    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        content = self.files.get(self.path.partition("?")[0])
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if content is None or self.fails:
            content, status = b"", self.fails or 404
        elif asked and self.knows_ranges:
            content, status = content[int(asked[1]) : int(asked[2]) + 1], 206
        else:
            status = 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_) -> None:
        """Nothing."""


def test_files_of_a_web_server_are_read(store, loopback, monkeypatch, tmp_path):
    pytest.importorskip("aiohttp", reason="http:// is read through aiohttp")
    names = write_kinds(tmp_path)
    _Web.files = {f"/{name}": (tmp_path / name).read_bytes() for name in names}
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Web)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        host = f"http://127.0.0.1:{server.server_port}"
        urls = [f"{host}/{name}?key=1" for name in names]
        there, here = index_corpus(urls), index_corpus([tmp_path / name for name in names])
        assert [unit.digest for unit in there.units] == [unit.digest for unit in here.units]
        assert [file.path for file in there.files] == urls
        assert len([row for unit in there.units for row in read_unit(there, unit)]) == 12
        with pytest.raises(GvendiError, match="jsonl' does not exist"):
            index_corpus(f"{host}/none.jsonl")
        for status, said in ((403, "refuses it .*403"), (503, "failed .*503.*tried 3 times")):
            monkeypatch.setattr(_Web, "fails", status)
            with pytest.raises(StoreError, match=said):
                index_corpus(urls)
        monkeypatch.setattr(_Web, "fails", 0)
        # Less than a piece is read from a server that sends all of it; more would be sent once for every piece.
        monkeypatch.setattr(_Web, "knows_ranges", False)
        assert index_corpus(urls[0]).rows == 2
        _Web.files["/long.jsonl"] = _Web.files["/a.jsonl"] * 5000
        with pytest.raises(StoreError, match="sends all of it where a piece is asked for; download it"):
            index_corpus(f"{host}/long.jsonl")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    for url, said in (
        (urls[0], "Cannot connect to host .*tried 3 times"),
        ("http:///a.jsonl", "check how it is spelled"),
        ("http://127.0.0.1:99999/a.jsonl", "check how it is spelled"),
    ):
        with pytest.raises(StoreError, match=said):
            index_corpus(url)


def test_commands_take_urls(store, gvendi, monkeypatch):
    monkeypatch.setattr("gvendi_fast.base.urls.STORES", ("memory",))
    make_run(place(f"{MEMORY}/run"), is_old=False)
    code, out, _ = gvendi("check", f"{MEMORY}/run")
    assert (code, out) == (0, f"nothing is wrong in '{MEMORY}/run': 2 of 2 parts whole, 8 rows\n")
    code, _, err = gvendi("cluster", f"{MEMORY}/run", "--clusters", "2", "--out", f"{MEMORY}/out/c.parquet")
    assert code == 0, err
    assert names_in(place(f"{MEMORY}/out")) == ["c.parquet", "c.safetensors"]
    code, _, err = gvendi("check", f"{MEMORY}/none")
    assert (code, err) == (
        1,
        f"error: '{MEMORY}/none' is not a run directory: it does not exist; name the --out of 'gvendi sketch' or "
        "'gvendi score'\n",
    )
