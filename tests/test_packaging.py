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
