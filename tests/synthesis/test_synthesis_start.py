"""How a run of the synthesis loop begins: what is refused leaves nothing behind, what began goes on from anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import ChatServer, Fault
from places import ROOT
from problem_families import seed_rows, writer
from synthesis_runs import contents, lines, paid, run, settings, write_rows

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy
from gvendi_fast.synthesis.config.config import config_from, load_config
from gvendi_fast.synthesis.config.paths import absolute
from gvendi_fast.synthesis.generators.request_store import RequestStore
from gvendi_fast.synthesis.generators.stops import KeyRefusedError
from gvendi_fast.synthesis.run import synthesize

pytest.importorskip("openai", reason="the extra `synthesis` is not installed")
pytest.importorskip("yaml", reason="the extra `synthesis` is not installed")
pytestmark = pytest.mark.usefixtures("loopback", "undrawn")
NOWHERE = "http://127.0.0.1:1/v1"
CHECK = "def short(row):\n    return len(row['prompt']) < 1000\n"


@pytest.fixture
def seeds(tmp_path) -> Path:
    return write_rows(tmp_path / "seeds.jsonl", seed_rows(1))


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"pool": {"data": "absent.jsonl"}}, "absent.jsonl' does not exist"),
        ({"pool": {"data": "unshown.jsonl"}}, r"no row that the task 'generic' can show in a prompt \(first"),
        ({"generator": {"key_variable": "NO_SUCH_KEY_HERE"}}, "NO_SUCH_KEY_HERE holds no API key"),
        ({"generator": {"base_url": "ftp://a/v1"}}, "base_url must be an address"),
        ({"generator": {"kind": "local", "model": "./absent"}}, "'./absent' does not exist"),
        ({"proxy": {"name": "./absent"}}, "'./absent' does not exist"),
        ({"proxy": {"dim": 100}}, "dim"),
        ({"proxy": {"max_tokens": 10**9}}, "reads at most"),
        ({"filter": {"tests": "absent/*.jsonl"}}, r"absent/\*.jsonl' matches nothing"),
        ({"task": {"settings": {"template": "absent.j2"}}}, "No such file or directory: '.*absent.j2'"),
        ({"task": {"settings": {"template": "unfilled.j2"}}}, "'absent' is undefined"),
        ({"task": {"settings": {"template": 5}}}, "a template is 5"),
        ({"task": {"settings": {"temperature": -1}}}, "temperature is -1"),
        ({"task": {"settings": {"top_p": "all"}}}, "top_p is 'all'"),
        ({"task": {"settings": {"verifier": "absent_module:f"}}}, "absent_module.*wanted an importable"),
        ({"task": {"settings": {"verifier": 7}}}, "verifier is '7'"),
        ({"task": {"settings": {"checks": {"limit": 3}}}}, "checks has no setting 'limit'; it has limit_s"),
        ({"task": {"settings": {"checks": {"limit_s": "3"}}}}, "checks.limit_s is '3'; wanted a number"),
        ({"task": {"settings": {"checks": {"limit_s": 0}}}}, "limit_s is 0"),
        ({"task": {"settings": {"checks": 3}}}, "checks is 3; wanted a section"),
    ],
)
def test_a_refused_run_leaves_nothing_behind(sections, message, tmp_path, seeds, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "unshown.jsonl", [{"text": "a bare text"}])
    (tmp_path / "unfilled.j2").write_text("{% block user %}{{ absent }}{% endblock %}")
    before = everything(tmp_path)
    with pytest.raises((GvendiError, FileNotFoundError), match=message):
        run(Path("new") / "er" / "run", NOWHERE, seeds, **sections)
    assert everything(tmp_path) == before


def test_a_refused_run_leaves_a_folder_of_others_as_it_was(tmp_path, seeds):
    (tmp_path / "run" / "notes").mkdir(parents=True)
    (tmp_path / "run" / "mine.txt").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(GvendiError, match="does not exist"):
        run(tmp_path / "run", NOWHERE, seeds, proxy={"name": "./absent"})
    assert everything(tmp_path) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="/file/run'"):
        run(tmp_path / "file" / "run", NOWHERE, seeds)


def test_a_refused_run_keeps_the_requests_and_sketches_that_are_there(tmp_path, seeds):
    out = tmp_path / "run"
    out.mkdir()
    with RequestStore(out / "requests.sqlite") as store:
        store.begin("a", "{}")
    with pytest.raises(GvendiError, match="does not exist"):
        run(out, NOWHERE, seeds, proxy={"name": "./absent"})
    with RequestStore(out / "requests.sqlite") as store:
        assert store.counts() == {"sent": 1}
        with pytest.raises(GvendiError, match="open elsewhere"):
            run(out, NOWHERE, seeds)
    assert os.listdir(out) == ["requests.sqlite"]


def test_a_run_that_has_begun_is_kept_when_the_endpoint_refuses_the_key(tmp_path, seeds):
    with (
        ChatServer(writer(), lambda arrival, body: Fault(status=401)) as server,
        pytest.raises(KeyRefusedError),
    ):
        run(tmp_path / "run", server.url, seeds)
    assert {"fingerprint.json", "config.yaml", "requests.sqlite", "pool"} <= set(os.listdir(tmp_path / "run"))


def files_of_a_run(home: Path) -> dict:
    """Files of all kinds in `home`, and the sections that name them by relative paths."""
    write_rows(home / "data" / "seeds-1.jsonl", seed_rows(2)[:12])
    # These have no id of their own.
    unnamed = [{key: row[key] for key in ("prompt", "completion")} for row in seed_rows(2)[12:]]
    write_rows(home / "data" / "seeds-2.jsonl", unnamed)
    test = "The quick brown fox jumps over the lazy dog every single day. Why?"
    write_rows(home / "tests.jsonl", [{"prompt": test, "completion": "It likes to."}])
    (home / "lib" / "my_pack").mkdir(parents=True)
    (home / "lib" / "my_pack" / "__init__.py").write_text("")
    (home / "lib" / "my_pack" / "rules.py").write_text(CHECK)
    packaged = Path("gvendi_fast/synthesis/tasks/templates/generic_row.j2")
    (home / "mine.j2").write_text((ROOT / packaged).read_text().replace("new", "fresh"))
    return {
        "pool": {"data": "data/*.jsonl"},
        "filter": {"tests": ["tests.jsonl"]},
        "task": {
            "name": "generic",
            "settings": {
                "template": "mine.j2",
                "verifier": "my_pack.rules:short",
                "verifier_folder": "lib",
            },
        },
        "stop": {"target": 34},
    }


def test_a_run_goes_on_from_another_working_directory(tmp_path, gvendi, monkeypatch):
    # Brackets are a glob's, and this one belongs to the folder's name.
    home, elsewhere = tmp_path / "[home]", tmp_path / "elsewhere"
    (home / "data").mkdir(parents=True)
    elsewhere.mkdir()
    sections = files_of_a_run(home)
    monkeypatch.chdir(home)
    with ChatServer(writer()) as server:
        whole = settings(Path("whole"), server.url, Path("-"), **sections)
        synthesize(config_from(whole))
        (home / "c.yaml").write_text(json.dumps({**whole, "out": "run"}))
        assert gvendi("synthesize", "c.yaml", "stop.target=28")[0] == 0
        stored = load_config(home / "run" / "config.yaml")
        assert stored.pool.data == [str(home).replace("[", "[[]") + "/data/*.jsonl"]
        assert stored.filter.tests == [str(home / "tests.jsonl")]
        assert stored.out == str(home / "run")
        assert stored.task.settings["template"] == str(home / "mine.j2")
        assert stored.task.settings["verifier_folder"] == str(home / "lib")

        monkeypatch.chdir(elsewhere)
        code, _, told = gvendi("synthesize", "--resume", home / "run", "stop.target=31")
        assert code == 0, told
        code, _, told = gvendi("synthesize", "--resume", "../[home]/run", "stop.target=34")
        assert code == 0, told
        assert max(server.served.values()) == 2
    assert contents(home / "run") == contents(home / "whole")
    rows = lines(home / "run" / "accepted.jsonl")
    assert len(rows) == 10
    assert any(id_.startswith("seeds-2.jsonl:") for row in rows for id_ in row["parents"])
    assert all(b"home" not in content for content in contents(home / "run").values())
    fingerprints = [(home / name / "fingerprint.json").read_text() for name in ("whole", "run")]
    assert fingerprints[0] == fingerprints[1]
    assert "home" not in fingerprints[0]


def test_the_content_of_every_file_counts(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    sections = files_of_a_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    with ChatServer(writer()) as server:
        run(Path("run"), server.url, Path("-"), **{**sections, "stop": {"target": 26}})
        before = contents(tmp_path / "run"), paid(tmp_path / "run")
        for name in ("mine.j2", "tests.jsonl", "lib/my_pack/rules.py"):
            content = (tmp_path / name).read_text()
            changed = (
                content.replace("lazy", "lazier").replace("Here are", "These are").replace("1000", "999")
            )
            assert changed != content
            (tmp_path / name).write_text(changed)
            with pytest.raises(GvendiError, match="a run with other settings"):
                run(Path("run"), server.url, Path("-"), **sections)
            assert (contents(tmp_path / "run"), paid(tmp_path / "run")) == before, name
            (tmp_path / name).write_text(content)
        assert run(Path("run"), server.url, Path("-"), **sections).pool == 34


def test_a_module_in_the_working_directory_is_found_again(tmp_path, seeds, monkeypatch):
    (tmp_path / "my_own_rules.py").write_text(CHECK)
    monkeypatch.chdir(tmp_path)
    task = {"name": "generic", "settings": {"verifier": "my_own_rules:short"}}
    with ChatServer(writer()) as server:
        run(Path("run"), server.url, seeds, task=task, stop={"target": 14})
        monkeypatch.chdir("/")
        stored = load_config(tmp_path / "run" / "config.yaml", ["stop.target=16"])
        assert synthesize(stored).stopped == "target"
    installed = absolute(
        config_from(
            settings(
                Path("o"), NOWHERE, seeds, task={"name": "generic", "settings": {"verifier": "json:loads"}}
            )
        )
    )
    assert "verifier_folder" not in installed.task.settings


@pytest.mark.soak
def test_a_run_directory_of_relative_files_is_found_again(tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (home / "data").mkdir(parents=True)
    elsewhere.mkdir()
    write_rows(home / "data" / "seeds.jsonl", seed_rows(1))
    monkeypatch.chdir(home)
    proxy = load_proxy("tiny", dtype="float32")
    sketch_corpus("data/seeds.jsonl", "sketched", proxy, Settings(SketchSpec(dim=256)))
    with ChatServer(writer()) as server:
        run(Path("run"), server.url, Path("sketched"), stop={"target": 14})
        monkeypatch.chdir(elsewhere)
        stored = load_config(home / "run" / "config.yaml", ["stop.target=16"])
        assert (stored.pool.data, stored.pool.corpus) == ([str(home / "sketched")], str(home))
        assert synthesize(stored).stopped == "target"
        # The files have moved: the configuration says where to.
        (home / "data").rename(elsewhere / "data")
        moved = load_config(home / "run" / "config.yaml", ["stop.target=18", "pool.corpus=."])
        assert synthesize(moved).pool == 18


def test_names_of_models_are_no_paths_and_folders_of_models_are(tmp_path, seeds, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name, wanted in [
        ("tiny", "tiny"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("models/mine", str(tmp_path / "models" / "mine")),
    ]:
        generator = {"kind": "local", "model": name}
        config = config_from(settings(Path("o"), NOWHERE, seeds, generator=generator, proxy={"name": name}))
        found = absolute(config)
        assert (found.proxy.name, found.generator.model) == (wanted, wanted)
        served = config_from(settings(Path("o"), NOWHERE, seeds, generator={"model": "/models/mine"}))
        assert served.deciding()["generator"]["model"] == "/models/mine"
        deciding = found.deciding()
        assert str(tmp_path) not in json.dumps(deciding)


def test_the_sketching_process_loads_neither_generators_nor_tasks():
    # What it imports when it starts, and what its main() imports.
    home = "gvendi_fast.synthesis"
    modules = [f"{home}.loop.sketch_process", f"{home}.config.schema", f"{home}.loop.candidate_sketcher"]
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name.startswith("gvendi_fast.synthesis.")}
    wanted = {
        "loop": ("sketch_process", "candidate_sketcher"),
        "checks": ("child", "channel", "environment", "family"),
        "config": ("config", "schema", "yaml_text"),
    }
    files = {f"{home}.{room}.{name}" for room, names in wanted.items() for name in names}
    assert loaded == files | {f"{home}.{room}" for room in wanted}


def test_only_a_configuration_needs_pydantic(tmp_path):
    code = f"""
import sys
sys.modules["pydantic"] = None
import gvendi_fast
import gvendi_fast.cli.app
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.disk.record import holds_run
assert not holds_run({str(tmp_path)!r})
try:
    import gvendi_fast.synthesis.config.config
except GvendiError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("A configuration needs pydantic 2 (")
    assert "install it with `pip install gvendi-fast[synthesis]`" in done.stdout
