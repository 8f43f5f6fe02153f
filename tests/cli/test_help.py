"""Every --help is for people: no types of Python's, every option explained, its default said, words of one list."""

import json
import re

import pytest
import typer

from gvendi_fast.cli.app import app
from gvendi_fast.cli.wording import PANELS
from gvendi_fast.sketching.gradients.layers import GROUPINGS, PRESETS

GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)
# Flags and switches are off by default; what is required has none; these say it in other words.
SAID = re.compile(r"default", re.IGNORECASE)
OPTIONAL = {
    "order",
    "exclude",
    "by",
    "layers",
    "sketch_groups",
    "save_mean",
    "include",
    "per",
    "quality",
    "mean",
    "corpus",
}
OPTIONAL |= {"embedding", "show", "resume", "config", "overrides"}


@pytest.fixture
def page(gvendi, monkeypatch):
    """The help of a command on a wide terminal, without its frame."""
    monkeypatch.setenv("COLUMNS", "200")

    def shown(*words: str) -> str:
        code, out, _ = gvendi(*words, "--help")
        assert code == 0
        return out

    return shown


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_no_word_of_the_programs_own_is_shown(page, command):
    text = page(*command.split())
    for word in (
        "<bool>",
        "<list",
        "<path>",
        "<str>",
        "x>=",
        "Sphericalkmeans",
        "RowVerifier",
        "AnswerChecker",
        "np.",
    ):
        assert word not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is_and_what_is_without_it(command):
    for param in GROUP.commands[command].params:
        assert param.help, param.name
        assert param.help.endswith((".", ".)")), (param.name, param.help)
        is_flag = getattr(param, "is_flag", False)
        if is_flag or param.required or param.name in OPTIONAL:
            continue
        assert SAID.search(param.help) or param.default is not None, param.name


@pytest.mark.parametrize("command", ["score", "sketch"])
def test_a_long_list_of_options_is_in_panels(page, command):
    text = page(command)
    places = [text.index(f"─ {panel} ") for panel in ("Options", *PANELS)]
    assert places == sorted(places)
    # Names of options that are gone would leave a panel's list longer than what it shows.
    names = {param.name for param in GROUP.commands[command].params}
    assert {name for panel in PANELS.values() for name in panel} <= names


def test_the_first_page_explains_the_words_that_the_others_use(page):
    text = page()
    for word in ("proxy", "sketch", "run directory", "G-Vendi"):
        assert re.search(rf"^ {word}: ", text, re.M), word
    assert "To begin: gvendi score" in text


def test_limits_are_in_words(page):
    assert "N at least 1" in re.sub(r"[\[\]]", "", page("score"))
    assert "C at least -1 and at most 1" in re.sub(r"[\[\]]", "", page("compare"))


@pytest.fixture
def completions(gvendi, monkeypatch):
    """What a shell would offer at the end of a line."""
    monkeypatch.setenv("_GVENDI_COMPLETE", "complete_bash")

    def offered(line: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
        code, out, err = gvendi()
        assert (code, err) == (0, "")
        return out.split()

    return offered


def test_presets_that_the_help_and_completion_name_are_those_there_are(completions):
    params = {param.name: param for param in GROUP.commands["score"].params}
    for name, known in (("layers", PRESETS), ("sketch-groups", GROUPINGS)):
        assert set(completions(f"gvendi score --{name} ")) == set(known)
        assert all(word in params[name.replace("-", "_")].help for word in known)


def test_a_shell_completes_commands_options_and_values(completions):
    assert completions("gvendi sc") == ["score"]
    assert completions("gvendi score --lay") == ["--layers"]
    assert completions("gvendi score --layers no-em") == ["no-embedding", "no-embedding-or-head"]
    assert completions("gvendi sketch --sketch ") == ["hadamard", "rademacher"]
    assert completions("gvendi select --method r") == ["relaxed"]
    assert completions("gvendi score --proxy t") == ["tiny"]


@pytest.mark.parametrize(
    ("shell", "words"),
    [("bash", "complete -o"), ("zsh", "#compdef gvendi"), ("fish", "complete --command gvendi")],
)
def test_the_script_of_a_shell_is_printed(gvendi, monkeypatch, shell, words):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, out, err = gvendi("--show-completion", shell)
    assert (code, err) == (0, "")
    assert words in out
    assert "_GVENDI_COMPLETE" in out


def test_info_as_json_is_what_it_prints(gvendi):
    _, text, _ = gvendi("info")
    code, out, _ = gvendi("info", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["threads"].startswith(("1", "2", "3", "4", "5", "6", "7", "8", "9"))
    shown = {line[:24].strip() for line in text.splitlines()}
    assert set(found) == shown
    assert all(isinstance(value, str) for value in found.values())
