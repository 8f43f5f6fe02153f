"""A configuration of a stranger's is read in bounded time and memory, and every error names the file."""

import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.config.config import load_config
from gvendi_fast.synthesis.config.yaml_text import LONGEST, parse

GOOD = """
defaults: &task
  name: math
task: *task
pool: {data: [a.jsonl]}
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "\n".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 10)}]}}" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "billion laughs": (BOMB, "20,000 values"),
    "billion merges": (MERGES, "20,000 values"),
    "deep lists": ("a: " + "[" * 10000 + "]" * 10000, "32 deep"),
    "deep maps": ("{a: " * 5000 + "1" + "}" * 5000, "32 deep"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(200)), "32 deep"),
    "deep keys": ("? " * 500 + "a", "32 deep"),
    "itself": ("a: &a [*a]", "holds itself"),
    "a python object": ("a: !!python/object/apply:os.system [echo]", "is not YAML"),
    "a python name": ("a: !!python/name:os.system", "is not YAML"),
    "an unknown tag": ("a: !mine 1", "is not YAML"),
    "a key twice": ("task: {name: math}\ntask: {name: nli}", "'task' is there twice"),
    "an inner key twice": ("task: {name: math, name: nli}", "line 1: the key 'name' is there twice"),
    "a list as a key": ("? [a, b]\n: 1", "is not YAML|a key is no text"),
    "an unknown alias": ("a: *b", "is not YAML"),
    "two documents": ("a: 1\n---\nb: 2", "is not YAML"),
    "an impossible date": ("a: 2024-13-45", "is not YAML"),
    "too many digits": ("a: " + "1" * 5000, "is not YAML"),
    "too many hexadecimal digits": ("a: 0x" + "f" * 5000, "line 1: an integer has too many digits"),
    "no boolean": ("a: !!bool maybe", "is not YAML"),
    "control characters": ("a: \x07", "is not YAML"),
    "a tab": ("a:\n\tb: 1", "is not YAML"),
    "a merge of no section": ("a: {<<: 1}", "is not YAML"),
    "a text": ("only words", "wanted sections"),
    "nothing": ("", "wanted sections"),
    "long": ("a: " + "x" * LONGEST, "more than 131,072 characters"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_configuration_is_refused_by_name(text, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(GvendiError, match=words) as error:
        load_config(path)
    assert "mine.yaml" in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_file_of_a_gigabyte_is_not_read_whole(tmp_path):
    path = tmp_path / "mine.yaml"
    with open(path, "wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(GvendiError, match="more than 131,072 characters"):
        load_config(path)


@pytest.mark.parametrize(
    "value", ["[" * 5000, "&a [*a]", "!!python/name:os.system", "1" * 5000, "{a: 1, a: 2}"]
)
def test_a_hostile_override_is_refused_by_name(value, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD, encoding="utf-8")
    with pytest.raises(GvendiError, match=r"stop\.target="):
        load_config(path, [f"stop.target={value}"])


@pytest.mark.parametrize(
    "key", ["out", "pool.data", "generator.model", "generator.base_url", "proxy.name", "filter.tests"]
)
def test_no_text_is_empty(key, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD, encoding="utf-8")
    for value in ("''", "['']") if key in ("pool.data", "filter.tests") else ("''",):
        with pytest.raises(GvendiError, match=rf"{key} is empty; wanted "):
            load_config(path, [f"{key}={value}"])


def test_aliases_merges_and_values_of_every_kind_are_read_as_ever():
    text = "a: &a {x: 1, y: 2.5}\nb:\n  <<: *a\n  x: 3\nc:\n  - *a\n  - null\n  - true\n  - 'é'\n  - |\n    long\n"
    wanted = {
        "a": {"x": 1, "y": 2.5},
        "b": {"x": 3, "y": 2.5},
        "c": [{"x": 1, "y": 2.5}, None, True, "é", "long\n"],
    }
    assert parse(text, "text") == wanted
