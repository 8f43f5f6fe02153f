"""README and docs/ are true: their examples run, their tables are those of the results, their links lead somewhere."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from pages_of_docs import PAGES, ROOT, anchors, blocks, broken_links

import gvendi_fast
from gvendi_fast import clusters, selection, vendi
from gvendi_fast.cli import app

README = (ROOT / "README.md").read_text()
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
# What fetches a model, needs an endpoint, or goes on with a run of one: read by the command, not run.
ONLY_PARSED = ("synthesize config.yaml", "synthesize --resume", "report runs/grown")


def commands(text: str) -> list[list[str]]:
    """The command lines of a bash block as their words, without comments."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words]


def write_corpora(folder: Path) -> None:
    """The corpora that the pages name, of two sources."""
    for name, first in (("data.jsonl", 0), ("test.jsonl", 700)):
        rows = [
            {"prompt": f"What is {n} + {n % 7}?", "completion": f"{n + n % 7}", "source": f"source {n % 2}"}
            for n in range(first, first + 80)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def smaller(words: list[str]) -> list[str]:
    """A command line of a page for the corpora of this test: the model inside the package, and fewer rows."""
    words = ["tiny" if word == "./my-model" else word for word in words]
    fewer = {"--size": "40", "--clusters": "5"}
    words = [fewer.get(before, word) for before, word in zip(["", *words[:-1]], words, strict=True)]
    sketches = words[0] in ("sketch", "inspect") or (words[0] == "score" and words[1].endswith(".jsonl"))
    return [*words, "--proxy", "tiny"] if sketches and not {"--proxy", "--model"} & set(words) else words


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if "\n```" in text])
def test_examples_of_a_page_run_in_their_order(name, gvendi, tmp_path, monkeypatch):
    write_corpora(tmp_path)
    monkeypatch.chdir(tmp_path)
    names, run = {}, 0
    for block in blocks(TEXTS[name]):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), names)
            run += 1
        for words in commands(block.text) if block.language == "bash" else ():
            if words[0] != "gvendi":
                # make and pip stand for themselves: see the tests of targets and extras.
                assert words[0] in ("make", "pip"), words
                continue
            if " ".join(words[1:]).startswith(ONLY_PARSED):
                command = typer.main.get_command(app.app).commands[words[1]]
                Path("runs/grown").mkdir(parents=True, exist_ok=True)
                command.make_context(words[1], words[2:])
            else:
                code, _, err = gvendi(*smaller(words[1:]))
                assert code == 0, (words, err)
            run += 1
    assert run or not {"python", "bash"} & {block.language for block in blocks(TEXTS[name])}


def test_every_block_says_its_language():
    found = {block.language for text in TEXTS.values() for block in blocks(text)}
    assert found <= {"python", "bash", "yaml", "json", "text"}


def python_of(name: str, capsys) -> tuple[dict, str]:
    """The names that a page's Python leaves, and what it prints."""
    names = {}
    for block in blocks(TEXTS[name]):
        if block.language == "python":
            exec(compile(block.text, name, "exec"), names)
    return names, capsys.readouterr().out


def test_the_readme_s_example_prints_two_scores(capsys):
    (example,) = [block for block in blocks(README) if block.language == "python"]
    assert len(example.text.strip().splitlines()) <= 12
    first, second = map(float, python_of("README.md", capsys)[1].split())
    assert 1 < second <= first <= 3


def test_the_examples_on_rows_say_what_they_claim(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, out = python_of("docs/score.md", capsys)
    assert "Interval(" in out
    assert names["gain"].shape == (1000,)
    assert float(names["surprisal"].mean()) == pytest.approx(names["state"].entropy(), abs=1e-5)
    assert names["groups"].gvendi.shape == (40,)
    assert len(python_of("docs/selection.md", capsys)[0]["best"]) == 100


def test_the_configuration_is_one(tmp_path, monkeypatch):
    from gvendi_fast.synthesis.config.config import load_config

    (block,) = [b for b in blocks(TEXTS["docs/synthesis.md"]) if b.language == "yaml"]
    monkeypatch.chdir(tmp_path)
    Path("seeds.jsonl").touch()
    Path("tests").mkdir()
    Path("tests/test.jsonl").touch()
    Path("config.yaml").write_text(block.text)
    config = load_config("config.yaml", ["stop.target=5000"])
    assert (config.task.name, config.stop.target, config.stop.requests) == ("math", 5000, 100000)


def test_commands_and_options_that_pages_name_exist():
    group = typer.main.get_command(app.app)
    everything = "\n".join(TEXTS.values())
    assert set(re.findall(r"(?:^|`)gvendi ([a-z]+)\b", everything, re.M)) <= set(group.commands)
    known = {name for command in group.commands.values() for option in command.params for name in option.opts}
    known |= {name for option in group.params for name in option.opts}
    known |= {"--help", "--check", "--strict"}
    assert set(re.findall(r"`(--[a-z-]+)", everything)) <= known


def test_make_targets_and_extras_that_pages_name_exist():
    everything = "\n".join(TEXTS.values())
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)\s*(?:#|`)", everything)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    extras = set(re.findall(r"(?:\.|gvendi-fast)\[([a-z]+)\]", everything))
    assert extras
    for extra in extras:
        assert re.search(rf"^{extra} = \[", project, re.M), extra


@pytest.mark.parametrize("page", PAGES, ids=TEXTS)
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page, ROOT) == []


def test_a_broken_link_is_noticed(tmp_path):
    (tmp_path / "other.md").write_text("# One head, two\n```text\n# not a head\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-head-two) [c](https://x.y/z) `[d](none.md)`\n"
        "[e](gone.md) [f](other.md#not-a-head) [g](../outside.md) [h](#nowhere)\n"
    )
    (tmp_path.parent / "outside.md").touch()
    assert broken_links(page, tmp_path) == [
        "none.md",
        "gone.md",
        "other.md#not-a-head",
        "../outside.md",
        "#nowhere",
    ]
    assert anchors(TEXTS["docs/guide.md"]) >= {"reading-the-number", "run-directories"}


def test_every_page_is_in_the_navigation_and_reached_from_the_readme():
    listed = re.findall(r"^ +- (?:\w+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(f"docs/{name}" for name in listed) == sorted(TEXTS.keys() - {"README.md"})
    linked = set(re.findall(r"\]\((docs/[\w/-]+\.md)", README))
    # The reference is made of docstrings; index.md is the README's twin among the pages.
    others = {name for name in TEXTS if name.startswith("docs/") and not name.startswith("docs/api/")}
    assert linked == others - {"docs/index.md"}


def test_the_reference_has_every_public_name():
    """Each name of the four public modules has an entry or, where two modules share it, a word and a link."""
    for module in (gvendi_fast, vendi, clusters, selection):
        text = TEXTS[f"docs/api/{module.__name__.rpartition('.')[2]}.md"]
        entries = re.findall(r"^::: ([\w.]+)$", text, re.M)
        for entry in entries:
            where, _, what = entry.rpartition(".")
            assert getattr(importlib.import_module(where), what).__doc__, entry
        named = {entry.rpartition(".")[2] for entry in entries} | set(re.findall(r"`(\w+)`", text))
        assert set(module.__all__) - {"__version__"} <= named, module.__name__


def test_files_that_pages_name_are_there():
    named = set()
    for text in TEXTS.values():
        named |= set(re.findall(r"`((?:gvendi_fast|csrc|benchmarks|docs)/[\w./-]+|test_\w+\.py)`", text))
    assert "gvendi_fast/kernels/reference.py" in named
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [name for name in named if not (ROOT / name).exists() and name not in tests]
    assert missing == []


def test_the_design_names_every_room_on_its_floor_and_every_stem():
    from test_layers import FLOORS

    from gvendi_fast.kernels.backends import operations

    text = TEXTS["docs/design.md"]
    floors = {
        room.split("/")[-1].removesuffix("__init__.py"): int(floor)
        for floor, room in re.findall(r"^\| (\d) \| `([\w/.]+)` \|", text, re.M)
    }
    there = {path.name for path in (ROOT / "gvendi_fast").iterdir() if (path / "__init__.py").is_file()}
    assert floors == {room: floor for room, floor in FLOORS.items() if not room or room in there}
    stems = set(re.findall(r"^\| `(\w+)` \| ", text, re.M))
    assert stems == set(operations()) & stems
    assert len(stems) == 11


def test_the_readme_fits_one_screen():
    assert len(README.splitlines()) <= 80
    assert README.count("| --- |") == 1


def test_tables_are_rendered_from_the_results():
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    # The package of this tree, whichever one is installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_limits_say_of_the_gpu_is_what_was_found():
    """The prose names the machine and the kernels whose checks failed; each must be that of the results."""
    text = " ".join(TEXTS["docs/limits.md"].split())
    results = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    (found,) = [content for content in results if content.get("gpu")]
    machines = found["machines"].values()
    assert f"have run on one {found['gpu']}" in text
    assert {f"torch {machine['torch']}" for machine in machines} == set(re.findall(r"torch [\d.]+\d", text))
    figures = [
        (name, entry) for section in found["sections"].values() for name, entry in section["figures"].items()
    ]
    failed = [name for name, entry in figures if entry.get("failed")]
    assert failed == ["triton dense_sketch fp16"]
    assert "but for one of Triton's `dense_sketch`" in text
    for name, entry in figures:
        for case in entry.get("failed", {}).values():
            # "just above": by a sixth at most.
            assert all(e <= a * 7 / 6 for e, a in zip(case["errors"], case["allowed"], strict=True)), name
    compiled = found["sections"]["end to end"]["figures"]["64k cuda compiled"]["tokens per second"]["sketch"]
    assert (compiled["p50"] < 200_000) == ("The goal of tokens a second is not met yet" in text)


def test_every_attack_that_is_told_of_has_its_test():
    """docs/hostile.md names a test in each line of its tables."""
    lines = [line for line in TEXTS["docs/hostile.md"].splitlines() if line.startswith("| ")]
    named = [re.search(r"`(tests/\S+\.py)::(test_\w+)` \|$", line) for line in lines if "---" not in line]
    found = [match for match in named if match]
    assert len(found) > 70
    assert len(named) - len(found) == TEXTS["docs/hostile.md"].count("\n## ")
    for match in found:
        assert f"def {match[2]}(" in (ROOT / match[1]).read_text(), match[0]
