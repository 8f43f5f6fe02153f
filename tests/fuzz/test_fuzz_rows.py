"""Rows of a corpus with small changes: each is what the documented rules make of it, or rejected."""

import contextlib
import gzip
import json
import random
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz.mutations import (
    BYTES,
    Tally,
    WrongResultError,
    as_json,
    bounded_memory,
    check,
    mutated_bytes,
    mutated_lines,
    mutated_value,
)

from gvendi_fast.data.index import Fields, Rejected, UnitReader, index_corpus
from gvendi_fast.sketching.proxy.encode import Encoder, Sample
from gvendi_fast.sketching.proxy.load import load_proxy

FIELDS = Fields(by="family")
ROWS = [
    {"id": "a", "prompt": "What is two and two?", "completion": "Four.", "family": "sum"},
    {
        "id": 17,
        "prompt": "",
        "completion": "An answer – with ünïcode \U0001f40d.",
        "family": {"x": [1, None]},
    },
    {
        "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}],
        "id": "c",
    },
    {"text": "A plain text of a few words.\nTwo lines.", "family": "plain"},
    {
        "prompt": "no id here",
        "completion": "\tnone at all ",
        "family": None,
        "extra": [1.5, True, {"a": "b"}],
    },
    {
        "id": "f",
        "family": 3,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Call it."},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
            },
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Done."},
        ],
    },
    {"id": "g", "prompt": "x" * 300, "completion": "y " * 50, "text": "not this one"},
]
FLAT = [
    {"id": f"p{i}", "prompt": f"Question {i}?", "completion": f"Answer {i}.", "family": f"f{i % 2}"}
    for i in range(7)
]


def lone(text):
    """Whether a text holds half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def texts_in(value):
    if isinstance(value, str):
        yield value
    for item in value if isinstance(value, list) else value.items() if isinstance(value, dict) else ():
        for part in item if isinstance(item, tuple) else (item,):
            yield from texts_in(part)


ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool"}
KNOWN = ("system", "user", "assistant", "tool", "developer")


def as_text(value):
    """A text, also as bytes of UTF-8; None for anything else."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return value if type(value) is str and not lone(value) else None


def turns_of(value):
    """[(role, content, whether something of it is supervised)] of messages, None where they are none."""
    if type(value) is str:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if type(value) is not list or any(map(lone, texts_in(value))):
        return None
    found = []
    for message in value:
        if type(message) is not dict:
            return None
        role, content = message.get("role"), message.get("content")
        role = message.get("from") if role is None else role
        content = message.get("value") if content is None else content
        calls = message.get("tool_calls")
        calls = [] if calls is None or (type(calls) is str and not calls.strip()) else calls
        if type(calls) is not list or type(role) is not str:
            return None
        role = role.strip().lower()
        role = ROLES.get(role, role)
        if content is None and calls:
            content = ""
        if type(content) is list and all(type(part) is str for part in content):
            content = "".join(content)
        if role not in KNOWN or type(content) is not str:
            return None
        found.append((role, content, role == "assistant" and bool(calls or content.strip())))
    return found


def by_the_rules(record):
    """(id, group, texts) of a record as docs and docstrings of `Fields` say, None where it is no row."""
    if not isinstance(record, dict):
        return None
    own, group = record.get("id"), record.get("family")
    own = as_text(own) if isinstance(own, bytes) else own
    if type(own) is float:
        own = None if own != own else int(own) if own.is_integer() and abs(own) < 2**53 else False
    if own is not None and (type(own) not in (str, int) or (type(own) is str and lone(own))):
        return None
    group = as_text(group) or group if isinstance(group, bytes) else group
    if any(map(lone, texts_in(group))):
        return None
    if group is None:
        group = ""
    elif type(group) is not str:
        group = json.dumps(group, ensure_ascii=False, sort_keys=True, default=str)
    prompt, completion, messages, text = map(record.get, ("prompt", "completion", "messages", "text"))
    if prompt is not None and completion is not None:
        if list in (type(prompt), type(completion)):
            asked, told = (
                turns_of([{"role": role, "content": value}] if type(value) is not list else value)
                for role, value in (("user", prompt), ("assistant", completion))
            )
            if asked is None or told is None or not any(own for _, _, own in told):
                return None
            found = [(role, said) for role, said, _ in asked + told]
        else:
            found = [("prompt", as_text(prompt)), ("completion", as_text(completion))]
            if None in (found[0][1], found[1][1]) or not found[1][1].strip():
                return None
    elif messages is not None:
        told = turns_of(messages)
        if told is None or not any(own for _, _, own in told):
            return None
        found = [(role, said) for role, said, _ in told]
    elif text is not None:
        found = [("text", as_text(text))]
        if found[0][1] is None or not found[0][1].strip():
            return None
    else:
        return None
    return (None if own is None else str(own)), group, found


def parsed(line):
    """The same of a line; None for one that is no JSON. Bytes that are no UTF-8 are halves of characters here."""
    try:
        return by_the_rules(json.loads(line.decode("utf-8", "surrogateescape")))
    except (ValueError, RecursionError):
        return None


def lines_of(content):
    """{number of a line: its content} of the lines that hold something."""
    found = {}
    for number, raw in enumerate(content.split(b"\n"), 1):
        raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if raw.strip():
            found[number] = raw
    return found


def unpacked(content):
    """What a gzip file gives, byte by byte, until it is at its end or damaged."""
    found, stream = bytearray(), zlib.decompressobj(31)
    with contextlib.suppress(zlib.error):
        for place in range(len(content)):
            if stream.eof:
                # Another archive behind the first one, with zeros between them.
                if content[place] == 0:
                    continue
                stream = zlib.decompressobj(31)
            found += stream.decompress(content[place : place + 1])
    return bytes(found)


def parquet_rows(path):
    """{number: expectation} of a Parquet file by pyarrow's own reading; None where it is not read."""
    try:
        table = pq.read_table(path, use_threads=False)
        names = table.column_names
    # Of bytes changed at random pyarrow raises errors of many kinds; whichever, there are no rows.
    except Exception:
        return None
    found = {}
    for number in range(len(table)):
        record = {}
        for name in names:
            try:
                record |= table.select([name]).slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError:
                # Bytes that are no text spoil their own field alone.
                record[name] = "\ud800"
            # Dates beyond Python's, and whatever else these bytes may mean to it.
            except Exception:
                return None
        found[number + 1] = by_the_rules(record)
    return found


def mutated_content(r, content):
    kind = r.random()
    if kind < 0.35:
        return mutated_bytes(r, content)
    if kind < 0.5:
        return mutated_lines(r, content)
    lines = content.splitlines(keepends=True)
    at = r.randrange(len(lines))
    if kind < 0.95:
        value = mutated_value(r, json.loads(lines[at]))
        lines[at] = as_json(random.Random(0), value).replace(b"\n", b" ") + b"\n"
    else:
        lines[at] = r.choice(BYTES) * r.choice((1, 3, 2000)) + b"\n"
    return b"".join(lines)


class Rows:
    """The target: a corpus of one file, indexed, read and encoded."""

    def __init__(self, folder):
        self.folder = folder
        self.lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
        self.packed = gzip.compress(self.lines, mtime=0)
        pq.write_table(pa.Table.from_pylist(FLAT), folder / "flat.parquet", row_group_size=3)
        self.parquet = (folder / "flat.parquet").read_bytes()
        self.encoder = Encoder(load_proxy("tiny", dtype="float32").tokenizer, 512)
        self.encoded = {}
        for name, content in (("plain.jsonl", self.lines), ("flat.parquet", self.parquet)):
            path = folder / name
            path.write_bytes(content)
            for row in self.read(path, random.Random(0)):
                assert not isinstance(row, Rejected), row
                (sample,) = self.encoder.encode([row])
                self.encoded[self.key(row)] = sample.input_ids.tobytes() + sample.labels.tobytes()
        self.known = {line: parsed(line) for line in lines_of(self.lines).values()}

    @staticmethod
    def key(row):
        return json.dumps([row.texts(), row.messages])

    def read(self, path, r):
        manifest = index_corpus(path, FIELDS, rows_per_unit=3)
        units = list(manifest.units)
        if r.random() < 0.3:
            r.shuffle(units)
        found = []
        with UnitReader(manifest) as reader:
            for unit in units:
                rows = list(reader.read(unit))
                if len(rows) != unit.rows:
                    raise WrongResultError(f"{len(rows)} rows of a work unit of {unit.rows}")
                found += rows
        if len(found) != manifest.rows:
            raise WrongResultError(f"{len(found)} rows of {manifest.rows}")
        return found

    def case(self, r):
        kind = r.choice(("plain", "plain", "packed", "parquet"))
        if kind == "plain":
            path, content = self.folder / "r.jsonl", mutated_content(r, self.lines)
            path.write_bytes(content)
            there = lines_of(content)
        elif kind == "packed":
            path = self.folder / "r.jsonl.gz"
            packed = mutated_bytes(r, self.packed) if r.random() < 0.7 else None
            packed = gzip.compress(mutated_content(r, self.lines), mtime=0) if packed is None else packed
            path.write_bytes(packed)
            there = lines_of(unpacked(packed))
        else:
            path, there = self.folder / "r.parquet", {}
            path.write_bytes(mutated_bytes(r, self.parquet))
        wanted = parquet_rows(path) if kind == "parquet" else {n: parsed(line) for n, line in there.items()}
        rows = self.read(path, r)
        ends = [self.judge(row, wanted, there) for row in rows]
        self.encode(rows)
        return "as the rules say" if "rejected" not in ends else "some rows rejected"

    def judge(self, row, wanted, there):
        if isinstance(row, Rejected):
            line = there.get(row.line)
            excused = row.reason.startswith(("damaged archive", "duplicate id"))
            if self.known.get(line) is not None and not excused:
                raise WrongResultError(f"a row that nobody changed is rejected: {row.reason}")
            return "rejected"
        if wanted is None:
            raise WrongResultError("rows of a file that pyarrow does not read")
        right = wanted.get(row.line)
        if right is None:
            raise WrongResultError(
                f"line {row.line} is no row by the rules, and was accepted: {row.texts()!r:.80}"
            )
        own, group, texts = right
        if own is not None and row.id != own:
            raise WrongResultError(f"id is {row.id!r:.40} in place of {own!r:.40}")
        if row.group != group or row.texts() != texts:
            raise WrongResultError(f"another group or other texts: {row.group!r:.40}, {group!r:.40}")
        return "row"

    def encode(self, rows):
        rows = [row for row in rows if not isinstance(row, Rejected)]
        for row, sample in zip(rows, self.encoder.encode(rows), strict=True):
            right = self.encoded.get(self.key(row))
            if not isinstance(sample, Sample):
                if right is not None:
                    raise WrongResultError(f"a row that nobody changed gives no sample: {sample.reason}")
                continue
            if right is not None and sample.input_ids.tobytes() + sample.labels.tobytes() != right:
                raise WrongResultError("a row that nobody changed has other tokens")
            own = sample.labels[sample.labels >= 0]
            if len(own) == 0 or not np.array_equal(own, sample.input_ids[sample.labels >= 0]):
                raise WrongResultError("labels are not the tokens that are supervised")


def fuzz_rows(count, seed, folder):
    target, tally = Rows(folder), Tally("rows")
    with bounded_memory():
        for number in range(count):
            tally.take(number, lambda number=number: target.case(random.Random(f"{seed}|rows|{number}")))
    return tally


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [200, pytest.param(8000, marks=pytest.mark.soak)])
def test_a_changed_row_is_what_the_rules_say_or_rejected(count, tmp_path, capsys):
    check(fuzz_rows(count, count, tmp_path), count, capsys)
