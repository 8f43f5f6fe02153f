"""Configurations of a synthesis with small changes: what the file says, or an error."""

import random

import pytest
from fuzz.mutations import (
    WrongResultError,
    check,
    fuzz,
    mutated_bytes,
    mutated_lines,
    mutated_value,
)

yaml = pytest.importorskip("yaml", reason="the extra `synthesis` is not installed")
pytest.importorskip("pydantic", reason="the extra `synthesis` is not installed")

from gvendi_fast.synthesis.config.config import dump_config, load_config  # noqa: E402

TEXT = """\
out: runs/grown
pool: {data: seeds.jsonl, limit: 500}
task:
  name: math
  settings: {agree: 3, solutions: 4}
generator:
  base_url: "http://localhost:8000/v1"
  model: my-model
  key_variable: null
  prices: [0.5, 1.5]
filter:
  tests: [tests/a.jsonl, tests/b.jsonl]
  near: 0.97
accept: {rule: gain, quantile: 0.5}
stop: {target: 20000, requests: 100000, seconds: 3.5}
block: 32
"""
# What YAML reads otherwise than it looks.
WORDS = (
    "&a [*a, *a]",
    "&a {<<: *a}",
    "<<: {a: 1}",
    "!!python/object/apply:os.system [id]",
    "!!timestamp 99999-01-01",
    "2024-13-45",
    "2024-02-30T25:61:61Z",
    "!!int x",
    "!!float x",
    "!!bool maybe",
    "!!binary a===",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!null x",
    "!x y",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "{[a]: b}",
    ".inf",
    "-.nan",
    "0x" + "f" * 5000,
    "9" * 5000,
    "1:2:3:99999999",
    "0o17",
    "012",
    "1_000",
    "=",
    "yes",
    "~",
    "'",
    '"\\ud800"',
    '"\\x1b[31m"',
    "[" * 500,
    "[" * 500 + "]" * 500,
    "{a: " * 400,
    "- " * 400,
    "|\n x\n",
    "%YAML 9.9\n---\n",
    "---\na: 1\n---\nb: 2\n",
    "\x00",
    "\t",
)


def mutate(r):
    kind = r.random()
    if kind < 0.3:
        return mutated_bytes(r, TEXT.encode())
    if kind < 0.45:
        return mutated_lines(r, TEXT.encode())
    if kind < 0.7:
        # A word in place of a value.
        lines = TEXT.splitlines(keepends=True)
        at = r.randrange(len(lines))
        head, colon, _ = lines[at].partition(": ")
        lines[at] = f"{head}{colon}{r.choice(WORDS)}\n" if r.random() < 0.8 else f"{r.choice(WORDS)}\n"
        return "".join(lines).encode("utf-8", "surrogatepass")
    value = mutated_value(r, yaml.safe_load(TEXT))
    return yaml.safe_dump(value, allow_unicode=r.random() < 0.5).encode("utf-8", "surrogatepass")


def leaves(value, place=()):
    """(path, value) of what is no section."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*place, key))
    else:
        yield place, value


def at(value, place):
    for key in place:
        value = value[key]
    return value


def fuzz_configuration(count, seed, folder):
    path = folder / "grow.yaml"

    def case(number):
        r = random.Random(f"{seed}|configuration|{number}")
        content = mutate(r)
        path.write_bytes(content)
        config = load_config(path)
        found = config.to_dict()
        said = yaml.safe_load(content.decode("utf-8"))
        for place, value in leaves(said):
            now = at(found, place)
            # One text stands for a list of it, and an integer for a number.
            if now != value and now != [value]:
                raise WrongResultError(
                    f"{'.'.join(map(str, place))} is {value!r} in the file and {now!r} in the run"
                )
        path.write_text(dump_config(config), encoding="utf-8")
        if load_config(path) != config:
            raise WrongResultError("what is dumped is read as another configuration")
        return "as the file says"

    return fuzz("configurations", count, case)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [120, pytest.param(6000, marks=pytest.mark.soak)])
def test_a_changed_configuration_is_what_the_file_says_or_refused(count, tmp_path, capsys):
    check(fuzz_configuration(count, count, tmp_path), count, capsys)
