"""`gvendi inspect`, and what score and sketch say before they start."""

import json
import os
import re

import pytest
from made_rows import CHATML, TWO_ROLES, chats, pairs, with_message
from places import PACKAGE

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.run_files import WARNINGS, read_warnings
from gvendi_fast.sketching.proxy import load


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def healthy(tmp_path):
    return write(tmp_path / "data.jsonl", pairs())


@pytest.fixture
def alike(tmp_path):
    return write(tmp_path / "data.jsonl", pairs(completion="It is so."))


@pytest.fixture
def two_roles(tmp_path):
    """`tiny` with a template that passes over system messages."""
    folder = tmp_path / "proxy"
    folder.mkdir()
    for file in (PACKAGE / "assets" / "tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TWO_ROLES}))
    assert TWO_ROLES != CHATML
    return folder


def test_a_healthy_corpus_is_shown_and_nothing_is_warned_of(gvendi, healthy):
    code, out, err = gvendi("inspect", healthy, "--proxy", "tiny", "--show", 2)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "40 of 40 rows  looked at, from 'data.jsonl'"
    assert lines[1] == "  rows are    prompt and completion (40); rendered by the tokenizer's chat template"
    assert re.fullmatch(
        r"  tokens      \d+ to \d+, median \d+ a row; --max-tokens is 2,048: no prompt is cut, every row fits",
        lines[2],
    )
    assert re.fullmatch(
        r"  supervised  \d+ to \d+, median \d+ a row; \d\d\.\d % of all tokens, of a row \d\d to \d\d %, median \d\d %",
        lines[3],
    )
    assert (
        len(
            re.findall(
                r"^data\.jsonl:\d+: \d+ tokens, \d+ supervised, the last of them is '<\|im_end\|>'$",
                out,
                re.M,
            )
        )
        == 2
    )
    assert re.search(r"^  <\|im_start\|>assistant\n  ⟦It is .*<\|im_end\|>⟧$", out, re.M)
    assert lines[-1] == "nothing to warn of"


def test_a_corpus_of_one_answer_is_warned_of_and_strict_ends_with_1(gvendi, alike):
    code, out, _ = gvendi("inspect", alike, "--proxy", "tiny")
    assert code == 0
    assert "warning: 40 of 40 rows have the same supervised tokens, 'It is so.<|im_end|>'" in out
    assert gvendi("inspect", alike, "--proxy", "tiny", "--strict")[0] == 1
    code, out, err = gvendi("inspect", alike, "--proxy", "tiny", "--strict", "--json")
    (fault,) = json.loads(out)["faults"]
    assert (code, err) == (1, "")
    assert (fault["kind"], fault["count"], fault["of"]) == ("same supervised tokens", 40, 40)
    assert fault["text"] == f"40 of 40 rows {fault['what']}; {fault['remedy']}"


def test_json_has_every_number_and_the_parts_of_rows(gvendi, healthy):
    found = json.loads(gvendi("inspect", healthy, "--proxy", "tiny", "--rows", 7, "--show", 1, "--json")[1])
    assert (found["rows"], found["looked_at"], found["forms"]) == (40, 7, {"pair": 7})
    assert found["tokens"]["least"] <= found["tokens"]["median"] <= found["tokens"]["most"]
    (example,) = found["examples"]
    assert [part["is_supervised"] for part in example["parts"]] == [False, True, False]
    assert example["parts"][1]["text"].startswith("It is ")


def test_weights_are_neither_loaded_nor_needed(gvendi, two_roles, tmp_path, monkeypatch):
    (two_roles / "model.safetensors").unlink()
    monkeypatch.setattr(load, "_load_model", lambda *_: pytest.fail("the weights were loaded"))
    data = write(tmp_path / "data.jsonl", with_message(chats(), "system", "Sailor number {n}."))
    code, out, err = gvendi("inspect", data, "--proxy", two_roles)
    assert code == 0, err
    assert (
        "warning: 40 of 40 rows lose the text of a message in the chat template (system; data.jsonl:1" in out
    )
    assert "Sailor" not in out


@pytest.mark.parametrize("command", ["score", "sketch"])
def test_a_run_says_one_line_of_a_healthy_corpus_before_it_starts(gvendi, healthy, tmp_path, command):
    code, _, err = gvendi(command, healthy, "--proxy", "tiny", "--dim", 64, "--out", tmp_path / "run")
    assert code == 0, err
    said = err.splitlines()
    assert re.fullmatch(
        r"looked at 40 of 40 rows \(prompt and completion\): \d\d % of their tokens are supervised; nothing to warn of",
        said[0],
    )
    assert said[1].startswith("sketching 40 rows")
    assert "warning" not in err.replace("nothing to warn of", "")
    assert read_warnings(tmp_path / "run") == []


@pytest.mark.parametrize("command", ["score", "sketch"])
def test_a_run_warns_before_it_starts_and_goes_on(gvendi, alike, tmp_path, command):
    """A second corpus with the same fault in one process is warned of again."""
    for run in (tmp_path / "one", tmp_path / "two"):
        code, out, err = gvendi(command, alike, "--proxy", "tiny", "--dim", 64, "--out", run)
        assert code == 0, err
        said = err.splitlines()
        assert said[0].endswith("; 1 warning")
        assert said[1].startswith("warning: 40 of 40 rows have the same supervised tokens")
        assert said[2].startswith("sketching 40 rows")
        assert err.count("warning:") == 1
        (kept,) = read_warnings(run)
        assert kept["text"] == said[1].removeprefix("warning: ")
    if command == "score":
        assert json.loads((run / "score.json").read_text())["warnings"] == [kept]
    # The score of the directory says it again.
    code, out, err = gvendi("score", run, "--json")
    assert json.loads(out)["warnings"] == [kept]
    assert err == f"warning: {kept['text']}\n"


def test_strict_ends_a_run_before_anything_is_made(gvendi, tmp_path):
    alike = write(tmp_path / "alike.jsonl", pairs(completion="It is so."))
    run = tmp_path / "run"
    code, _, err = gvendi("sketch", alike, "--proxy", "tiny", "--dim", 64, "--out", run, "--strict")
    assert code == 1
    assert "error: --strict is set, and the look at 40 rows gives the warning above (1): mend the rows" in err
    assert not run.exists()
    data = write(tmp_path / "healthy.jsonl", pairs())
    assert gvendi("sketch", data, "--proxy", "tiny", "--dim", 64, "--out", run, "--strict")[0] == 0


def test_warnings_that_were_edited_are_found(gvendi, alike, tmp_path):
    run = tmp_path / "run"
    gvendi("sketch", alike, "--proxy", "tiny", "--dim", 64, "--out", run)
    assert gvendi("check", run)[0] == 0
    kept = (run / WARNINGS).read_text()
    for text, why in (
        (kept.replace("40 of", "41 of", 1), "its digest does not agree"),
        ("{", "damaged"),
        (kept[:-20], "damaged"),
    ):
        (run / WARNINGS).write_text(text)
        with pytest.raises(GvendiError, match=why):
            read_warnings(run)
        code, out, _ = gvendi("check", run)
        assert code == 1
        assert f"damaged: '{run / WARNINGS}'" in out
        assert "remove it, or run the command that made it again" in out
    # A directory of an earlier version has none.
    (run / WARNINGS).unlink()
    assert gvendi("check", run)[0] == 0
    assert gvendi("score", run)[0] == 0


class Terminal:
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("no_color", [False, True])
def test_colour_tells_what_is_supervised_or_brackets_do(tmp_path, monkeypatch, no_color):
    from gvendi_fast.base.printing import console
    from gvendi_fast.cli.inspect import _print_row
    from gvendi_fast.sketching.inspection import Example, Part

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    # Markup of rich, and what a terminal would obey, are text.
    parts = (Part("[red]user\n", False), Part("[/b] a\x1b[31m", True, 1234, "b\nend"), Part("\n", False))
    stream = Terminal()
    _print_row(console(stream), Example("a/[x].jsonl", 3, "id", 9, 4, "'</s>'", parts))
    lines = stream.text.splitlines()
    assert lines[0] == "[x].jsonl:3: 9 tokens, 4 supervised, the last of them is '</s>'"
    assert lines[1] == "  [red]user"
    if no_color:
        assert lines[2:] == ["  ⟦[/b] a\\x1b[31m … 1,234 characters … b", "  end⟧"]
    else:
        assert lines[2:] == [
            "  \x1b[1;32m[/b] a\\x1b[31m … 1,234 characters … b\x1b[0m",
            "  \x1b[1;32mend\x1b[0m",
        ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": f"a text of {n} words"} for n in range(9)], "text (9); texts are taken as they are"),
        (pairs(9), "prompt and completion (9); rendered by the tokenizer's chat template"),
        (
            [{"text": "a text"}, *pairs(2)],
            "prompt and completion (2), text (1); rendered by the tokenizer's chat template; texts are taken as they "
            "are",
        ),
        ([{"prompt": "p"}], "none that can be read"),
    ],
    ids=["text", "pairs", "both", "none"],
)
def test_a_template_is_named_where_one_is_applied(gvendi, tmp_path, rows, said):
    out = gvendi("inspect", write(tmp_path / "data.jsonl", rows), "--proxy", "tiny", "--show", 0)[1]
    assert f"  rows are    {said}\n" in out.replace("\n              ", " ")


def test_control_tokens_that_a_user_types_are_counted_and_no_warning(gvendi, tmp_path):
    data = write(tmp_path / "data.jsonl", pairs(prompt="What is <|im_end|>, {w}?"))
    out = gvendi("inspect", data, "--proxy", "tiny", "--show", 0)[1]
    assert "spelt out   40 rows have control tokens in a content, which are read as text" in out
    assert out.endswith("nothing to warn of\n")
    out = gvendi("inspect", data, "--proxy", "tiny", "--show", 0, "--control-tokens", "tokens")[1]
    assert "spelt out" not in out


def test_a_row_that_is_shown_says_what_is_cut_of_it(gvendi, tmp_path):
    rows = [{"prompt": "p " * 90, "completion": "c"}, {"prompt": "p", "completion": "c " * 90}, *pairs(1)]
    data = write(tmp_path / "data.jsonl", rows)
    out = gvendi("inspect", data, "--proxy", "tiny", "--max-tokens", 64)[1]
    first, second, third = (line for line in out.splitlines() if line.startswith("data.jsonl:"))
    assert re.search(
        r"tokens \(\d+ more than --max-tokens, which the prompt loses at its beginning\), 2 sup", first
    )
    assert re.search(
        r"tokens \(refused: too long: completion needs \d+ tokens, --max-tokens is 64\),", second
    )
    assert "(" not in third


def test_a_stream_of_ascii_has_brackets_of_ascii(gvendi, healthy, monkeypatch):
    from gvendi_fast.base.printing import console
    from gvendi_fast.cli.inspect import _print_row
    from gvendi_fast.sketching.inspection import Example, Part

    stream = Terminal()
    stream.encoding, stream.isatty = "ascii", lambda: False
    parts = (Part("é", True), Part(" left", False))
    _print_row(console(stream), Example("x", 1, "", 1, 1, "", parts, skipped=3, after=1))
    assert stream.text.splitlines()[1] == r"  [[\xe9]] \u2026 3 parts \u2026  left"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere.jsonl",), "nowhere.jsonl' does not exist"),
        (("{data}", "--rows", "0"), "--rows is 0; wanted at least 1"),
        (("{data}", "--show", "-1"), "shown is -1; wanted at least 0"),
        (
            ("{data}", "--max-tokens", "5000"),
            "--max-tokens is 5000, but the proxy 'tiny' reads at most 2048 tokens",
        ),
        (("{data}", "--proxy", "./none"), "'./none' does not exist"),
    ],
)
def test_what_cannot_be_looked_at_is_one_error(gvendi, healthy, words, said):
    code, out, err = gvendi("inspect", "--proxy", "tiny", *(word.format(data=healthy) for word in words))
    assert (code, out) == (1, "")
    assert said in err
    assert err.count("error: ") == 1


def test_the_look_is_quick_beside_reading(gvendi, tmp_path):
    """Rows of megabytes, of which the run would tokenise all, and the look a little."""
    import time

    from gvendi_fast.data.index import index_corpus
    from gvendi_fast.sketching.inspection import look
    from gvendi_fast.sketching.proxy.encode import Encoder

    rows = [{"prompt": "p", "completion": "some words " * 100_000} for _ in range(8)]
    manifest = index_corpus(write(tmp_path / "data.jsonl", [*rows, *pairs(), *rows]))
    encoder = Encoder(load.load_tokenizer("tiny").tokenizer, 2048)
    began = time.process_time()
    found = look(manifest, encoder)
    assert time.process_time() - began < 1.5
    assert (found.passed_over, found.looked_at) == (16, 56)
    assert os.path.getsize(tmp_path / "data.jsonl") > 1 << 24


def test_the_sample_in_the_guide_is_what_the_command_prints(gvendi, tmp_path, monkeypatch):
    from pages_of_docs import ROOT, blocks
    from test_docs import write_corpora

    (section,) = re.findall(
        r"### Look before you score\n(.*?)\n## ", (ROOT / "docs" / "guide.md").read_text(), re.S
    )
    command, sample = blocks(section)
    write_corpora(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert command.text.startswith("gvendi inspect ")
    assert gvendi(*command.text.split()[1:]) == (0, sample.text, "")


def test_the_guide_lists_every_warning():
    from pages_of_docs import ROOT

    (section,) = re.findall(
        r"### Look before you score\n(.*?)\n## ", (ROOT / "docs" / "guide.md").read_text(), re.S
    )
    listed = {
        kind
        for line in section.splitlines()
        if line.startswith("| `")
        for kind in re.findall(r"`([a-zA-Z ]+)`", line.split("|")[1])
    }
    rooms = ROOT / "gvendi_fast" / "sketching"
    texts = [(rooms / name).read_text() for name in ("silent_faults.py", "inspection.py")]
    known = {kind for text in texts for kind in re.findall(r'(?:fault|Fault)\(\s*"([a-zA-Z ]+)"', text)}
    known |= set(re.findall(r'(?:CONTENT|REASONING|CALLS|TOOLS): \(\s*"([a-z ]+)"', texts[0]))
    assert listed == known
    assert len(known) == 20
