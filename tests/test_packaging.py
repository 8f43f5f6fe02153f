"""What stands beside the code is true: versions, hooks, what CONTRIBUTING names; and the command starts quickly."""

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gvendi_fast import __version__

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_one_version_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", __version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == __version__
    # The newest release of the changelog or, where there is none, what the unreleased part becomes.
    released = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", CHANGELOG, re.M)
    becomes = re.search(r"becomes (\d+\.\d+\.\d+)", " ".join(CHANGELOG.split()))
    assert (released[0] if released else becomes[1]) == __version__


def test_the_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == "gvendi_fast"
    assert citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "The gvendi_fast authors"}]
    assert citation["message"]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2505.20161"
    assert {"type", "title", "authors"} <= set(paper)
    assert not set(citation) - {
        *("cff-version", "message", "type", "title", "abstract", "authors", "version", "license"),
        *("keywords", "references", "date-released", "repository-code", "url", "doi"),
    }


def test_the_changelog_keeps_its_form():
    heads = re.findall(r"^## (.*)$", CHANGELOG, re.M)
    assert heads[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d\S*\] - \d{4}-\d\d-\d\d", head) for head in heads[1:])
    kinds = re.findall(r"^### (.*)$", CHANGELOG, re.M)
    assert kinds
    assert set(kinds) <= KINDS
    # Every part has entries.
    assert not re.search(r"^###? .*\n\n(?=##|\Z)", CHANGELOG.split("## [Unreleased]")[1], re.M)


def test_hooks_run_the_lint_that_ci_runs():
    makefile = (ROOT / "Makefile").read_text()
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.M)[1]
    wanted = [line.strip().replace("$(BIN)/", ".venv/bin/") for line in lint.splitlines()]
    assert len(wanted) >= 3
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local", "hooks from elsewhere have versions of their own"
    assert [hook["entry"] for hook in repo["hooks"]] == wanted
    assert "make lint" in (ROOT / ".ci" / "run").read_text()


def test_files_that_contributing_names_exist():
    # In capitals: whatever the reader calls it.
    spans = [span for span in re.findall(r"`([^`\n]+)`", CONTRIBUTING) if not re.search(r"[A-Z]{3}", span)]
    paths = [
        word
        for span in spans
        for word in span.split()
        if re.fullmatch(r"[\w./*]+(\.(py|h|cpp|j2|md|txt|toml|json)|/)", word)
    ]
    assert len(paths) > 40
    # A bare name may stand in any folder; a path is one from the root, from the package or from one of its rooms.
    everywhere = {
        path.name for name in ("tests", "benchmarks", "csrc") for path in (ROOT / name).rglob("*.*")
    }
    roots = [ROOT, *(path for path in (ROOT / "gvendi_fast").rglob("**/") if path.is_dir())]
    for path in paths:
        # A module's name stands for its file or folder.
        module = path.replace(".", "/") if path.startswith("benchmarks.") else path
        found = any(list(root.glob(module.rstrip("/"))) for root in roots)
        assert found or fnmatch.filter(everywhere, path), path


def test_commits_that_contributing_names_are_in_the_history():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git history here: the commits that CONTRIBUTING names are not looked up")

    def ask(*words: str) -> str:
        return subprocess.run([git, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    if ask("rev-parse", "--is-shallow-repository").strip() == "true":
        pytest.skip("the history is cut: the commits that CONTRIBUTING names are not looked up")
    titles = dict(line.split(" ", 1) for line in ask("log", "--abbrev=7", "--format=%h %s").splitlines())
    text = " ".join(CONTRIBUTING.split())
    named = re.findall(r"`([0-9a-f]{7})`(?: \"([^\"]+)\")?", text)
    assert len(named) > 15
    for commit, title in named:
        assert commit in titles, commit
        assert titles[commit].startswith(title.removesuffix("...").strip(" ,;:")), commit


# Stands for the Python of the virtual environment: notes what pip is to install, and answers for an index.
PYTHON = """#!/bin/sh
case "$*" in
*import\\ torch*) exit 1 ;;
*urlopen*) exit $ANSWERS ;;
*requires*) echo "pytest>=8" ;;
*-m\\ pip\\ install*) echo "$*" >> "$NOTES" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs make with a stand-in for Python; returns what pip was asked for and what was said."""
    if shutil.which("make") is None or sys.platform != "linux":
        pytest.skip("needs make, on Linux")
    for folder in ("venv/bin", "tools"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text(PYTHON)
    (tmp_path / "venv/bin/python").chmod(0o755)

    def run(target: str, *words: str, answers: bool = True, driver: bool = False) -> tuple[list[str], str]:
        notes, driver_tool = tmp_path / "notes", tmp_path / "tools/nvidia-smi"
        notes.write_text("")
        (tmp_path / "venv/.scores").unlink(missing_ok=True)
        if driver:
            driver_tool.touch(mode=0o755)
        done = subprocess.run(
            [
                "make",
                f"{tmp_path}/venv/{target}",
                f"VENV={tmp_path}/venv",
                f"PYTHON={tmp_path}/venv/bin/python",
                *words,
            ],
            cwd=ROOT,
            env={
                "PATH": f"{tmp_path}/tools:/usr/bin:/bin",
                "NOTES": str(notes),
                "ANSWERS": str(int(not answers)),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return notes.read_text().splitlines(), done.stdout

    return run


CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def test_the_demo_installs_the_package_alone_and_says_each_step(make):
    asked, said = make(".scores")
    assert [words.split()[-1] for words in asked] == ["pip", "torch", "."]
    steps = [line for line in said.splitlines() if line.startswith("== ")]
    assert [step[:9] for step in steps] == [f"== {n} of 3" for n in (1, 2, 3)]
    # How much and how long.
    assert all(re.search(r"MB.*minutes", step) for step in steps[1:])
    assert re.search(r"^demo: \$\(VENV\)/\.scores$", (ROOT / "Makefile").read_text(), re.M)


def test_tests_add_the_extras_without_another_build_of_the_package(make):
    asked, _ = make(".installed")
    assert [("--editable" in words, "--requirement" in words) for words in asked][1:4] == [
        (False, False),
        (True, False),
        (False, True),
    ]
    assert sum("--editable" in words for words in asked) == 1


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="there is an NVIDIA driver here")
def test_the_cpu_build_of_pytorch_comes_where_there_is_no_driver_and_its_index_answers(make):
    def index(*words: str, **machine: bool) -> tuple[str | None, str]:
        asked, said = make(".scores", *words, **machine)
        found = re.search(r"--extra-index-url (\S+)", asked[1])
        return found and found[1], said

    assert index()[0] == CPU_INDEX
    # Behind a mirror: what pip is set to.
    found, said = index(answers=False)
    assert found is None
    assert f"{CPU_INDEX} does not answer" in said
    assert index("PYTORCH=")[0] is None
    # What is asked for by name is taken, wherever it runs.
    assert index("PYTORCH=https://a.b/rocm", answers=False)[0] == "https://a.b/rocm"
    assert index(driver=True)[0] is None


@pytest.mark.parametrize("words", [["--help"], ["score", "--help"], ["--version"]], ids=" ".join)
def test_the_command_starts_without_the_heavy_libraries(words):
    code = (
        "import sys; from gvendi_fast.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as done: code = done.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pyarrow', 'matplotlib', 'jinja2', 'scipy', 'openai'}\n"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "0 []"
