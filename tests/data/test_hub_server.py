"""The packages `datasets` and `huggingface_hub` themselves, asking a server on this machine that answers as the hub."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("datasets", reason="needs the package datasets, which the extra hub installs")

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.hub_data import HubRows
from gvendi_fast.data.hub_names import HubName

COMMIT = "c" * 40
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: data/train-*.jsonl
  - split: test
    path: data/test.jsonl
---
"""


def rows(part: int, count: int) -> bytes:
    return "".join(
        json.dumps({"prompt": f"{part} {n}?", "completion": "yes"}) + "\n" for n in range(count)
    ).encode()


FILES = {
    "README.md": CARD.encode(),
    "data/train-0.jsonl": rows(0, 5),
    "data/train-1.jsonl": rows(1, 5),
    "data/test.jsonl": rows(2, 1),
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as streaming needs, over FILES, which are also the gated data set's."""

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str) -> None:
        self.reply(status, X_Error_Code=code, X_Error_Message=code)

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        before, _, rest = path.partition("/one/set")
        if "/locked/set/resolve/" in path:
            self.fail(403, "GatedRepo")
        elif "/locked/set" in path:
            self.info()
        elif not before.endswith("datasets") or not (rest == "" or rest.startswith("/")):
            self.fail(404, "RepoNotFound")
        elif rest.startswith("/tree/"):
            self.tree(rest.split("/", 3)[3] if rest.count("/") > 2 else "")
        elif rest.startswith("/resolve/"):
            self.file(rest.split("/", 3)[3])
        elif rest in ("", "/revision/main", f"/revision/{COMMIT}"):
            self.info()
        else:
            self.fail(404, "RevisionNotFound")

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def info(self) -> None:
        self.json({"id": "one/set", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})

    def tree(self, folder: str) -> None:
        inside = {
            name: len(body) for name, body in FILES.items() if folder in name.split("/")[:-1] or not folder
        }
        files = [
            {"type": "file", "path": name, "size": size, "oid": "d" * 40}
            for name, size in inside.items()
            if name.count("/") == bool(folder)
        ]
        folders = [] if folder else [{"type": "directory", "path": "data", "size": 0, "oid": "e" * 40}]
        self.json(files + folders)

    def file(self, name: str) -> None:
        if name not in FILES:
            self.fail(404, "EntryNotFound")
            return
        body, headers = FILES[name], {"X_Repo_Commit": COMMIT, "ETag": '"f"'}
        wanted = self.headers.get("Range")
        if self.command == "HEAD" or wanted is None:
            self.reply(200, body, **headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = body[int(first) : int(last) + 1]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
        self.reply(206, part, Content_Range=span, **headers)

    def json(self, content: object) -> None:
        self.reply(200, json.dumps(content).encode(), Content_Type="application/json")

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import datasets.config
    from huggingface_hub import HfFileSystem, constants, file_download

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(
        datasets.config, "HUB_DATASETS_URL", endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}"
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    HfFileSystem.clear_instance_cache()
    yield server
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_rows_come_from_the_files_of_one_commit(hub, tmp_path):
    place = HubName("one/set", "main", "train").place_in(tmp_path / "out")
    for most, there in ((3, 3), (7, 7), (None, 10)):
        found = HubRows(tmp_path / "out")
        name = found.recorded("one/set")
        assert name == f"one/set:main:train@{COMMIT}"
        assert found.file(name, most) == str(place)
        assert len(place.read_bytes().splitlines()) == there
    assert place.read_bytes() == FILES["data/train-0.jsonl"] + FILES["data/train-1.jsonl"]
    files = {path.rsplit("/resolve/", 1)[1] for path in hub.asked if path.endswith(".jsonl")}
    assert files == {f"{COMMIT}/data/train-0.jsonl", f"{COMMIT}/data/train-1.jsonl"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "foo/bar",
            "'foo/bar' does not exist here, and a data set of this name is unknown to the Hugging Face hub",
        ),
        ("one/set@v9", "'one/set@v9' does not exist here, and a data set of this name has no revision 'v9'"),
        (
            "one/set:other",
            "one/set has no configuration 'other'; it has main: name one, as in 'one/set:main'",
        ),
        ("one/set:main:dev", "one/set:main has no split 'dev'; it has train, test: name one"),
        (
            "locked/set",
            "locked/set@c+ is gated on the Hugging Face hub: accept its terms there and log in with",
        ),
        (
            "one/s--et",
            "'one/s--et' does not exist here, and a data set of this name cannot be on the Hugging Face hub",
        ),
    ],
)
def test_refusals_are_one_sentence(hub, name, words):
    with pytest.raises(GvendiError, match=words) as caught:
        HubRows().recorded(name)
    assert "\n" not in str(caught.value)
    assert not Path("foo").exists()


def test_a_hub_that_cannot_be_reached_is_one_sentence(hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(GvendiError, match=r"could not be downloaded from the Hugging Face hub \(.*try again"):
        HubRows().recorded("one/set")
