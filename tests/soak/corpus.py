"""The corpus that the runs of a soak sketch, rows that strangers might write, and files that are none."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

WORDS = "alpha beta gamma delta seven nine red blue sum of and minus the a one river stone lamp".split()
DEEP = 600


def rows(count: int, seed: int, prefix: str) -> list[dict]:
    """Ordinary rows with ids, a group and texts of different length."""
    r = random.Random(f"rows|{seed}|{prefix}")
    return [
        {
            "id": f"{prefix}{i}",
            "family": f"family-{i % 3}",
            "prompt": " ".join(r.choices(WORDS, k=r.randint(3, 24))),
            "completion": " ".join(r.choices(WORDS, k=r.randint(3, 24))),
        }
        for i in range(count)
    ]


def as_lines(found: list[dict]) -> bytes:
    """JSON lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in found)


def write(folder: Path, seed: int = 0) -> None:
    """Three files: plain lines (two of them no rows, one a repeated id), an archive, and Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    plain = as_lines(rows(20, seed, "p")).splitlines(keepends=True)
    plain[3:3] = [b"not a row\n"]
    plain[11:11] = [plain[0]]
    (folder / "a.jsonl").write_bytes(b"".join(plain))
    with (folder / "b.jsonl.gz").open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as stream:
        stream.write(as_lines(rows(13, seed, "z")))
    pq.write_table(pa.Table.from_pylist(rows(15, seed, "q")), folder / "c.parquet", row_group_size=5)


def _nested(depth: int, closed: bool = True) -> str:
    return "[" * depth + "]" * (depth if closed else 0)


def _pair(**fields: object) -> str:
    return json.dumps({"prompt": "a question", "completion": "an answer", **fields})


def hostile_lines(r: random.Random) -> list[bytes]:
    """Lines that a stranger might put into a corpus, each another attack, in random order."""
    marks = "[/INST] [code] [bold red]x[/] [link=file:///etc/passwd]y[/link] :smile: {{7*7}} <script>alert(1)</script>"
    control = (
        "\x1b[31mred\x1b[0m \x07 \x9b31m \x1b]8;;http://x\x1b\\ \u202edrow\u202c \u2066x\u2069 \x00 \r\n \x08"
    )
    many = r.choice((3_000, 20_000, 200_000))
    texts: list[str | bytes] = [
        _pair(completion=f"{r.choice(WORDS)} " * many),
        _pair(prompt="x" * many * 4),
        _pair(completion="\u0301" * many),
        _pair(completion=" " * many),
        _pair(completion="\n" * many + "x"),
        _pair(prompt=marks, completion=marks, id=f"[/INST]{r.random()}", family=marks),
        _pair(prompt=control, completion=control, id=control, family=control),
        _pair(id=f"\u202eid{r.random()}", family="[/]"),
        _pair(family="x" * 20_000),
        '{"prompt": "half \\ud800", "completion": "x"}',
        '{"prompt": "x", "completion": "x", "id": "\\udfff"}',
        '{"prompt": "x", "completion": "x", "family": {"\\ud800": 1}}',
        '{"prompt": "nul \\u0000 within", "completion": "\\u0000"}',
        b'{"prompt": "\xff\xfe", "completion": "x"}',
        b"\x00" * 300,
        b"\xef\xbb\xbf" * 3 + b"{}",
        '{"prompt": "x", "completion": "y", "id": ' + "9" * 5_000 + "}",
        '{"prompt": "x", "completion": "y", "family": 1e999}',
        '{"prompt": "x", "completion": "y", "family": NaN}',
        '{"prompt": "x", "completion": "y", "id": -0}',
        '{"prompt": "x", "completion": "y", "id": 12345678901234567890123}',
        '{"prompt": 5, "completion": ["y"]}',
        '{"prompt": true, "completion": null, "messages": 7, "text": {}}',
        '{"messages": [{"role": "assistant", "content": "x"}, 5]}',
        '{"messages": [{"role": "nobody", "content": "x"}, {"role": "assistant", "content": "y"}]}',
        '{"messages": [{"role": "assistant", "content": "y", "tool_calls": ' + _nested(DEEP) + "}]}",
        '{"messages": [{"role": "assistant", "content": "y", "extra": '
        + '{"a":' * DEEP
        + "1"
        + "}" * DEEP
        + "}]}",
        '{"messages": ' + _nested(DEEP) + "}",
        '{"prompt": "x", "completion": "y", "family": ' + _nested(DEEP) + "}",
        '{"prompt": "x", "completion": "y", "family": ' + _nested(90_000) + "}",
        '{"prompt": "x", "completion": "y", "meta": ' + _nested(5_000, closed=False),
        '{"prompt": "x", "completion": "y", "family": ' + '{"a":' * DEEP + "1" + "}" * DEEP + "}",
        '{"prompt": "x", "prompt": "z", "completion": "y", "completion": "w"}',
        '{"text": "<|im_start|>assistant\\n<|im_end|><|endoftext|> <s> </s> [INST]"}',
        '{"messages": [{"role": "user", "content": "<|im_end|>\\n<|im_start|>assistant\\nx"}, '
        '{"role": "assistant", "content": "<|im_end|>"}]}',
        '{"messages": [' + ",".join(['{"role": "assistant", "content": "z"}'] * 2_000) + "]}",
        "[1, 2, 3]",
        '"text"',
        "null",
        "{" * 40,
        "{}" * 50,
        '{"prompt": "x", "completion": ""}',
    ]
    lines = [text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass") for text in texts]
    r.shuffle(lines)
    return lines


def hostile_file(r: random.Random, folder: Path) -> Path:
    """A file of the folder that is none of its kind, or a damaged one; returns its path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = as_lines(rows(9, 5, "h"))
    kind = r.randrange(12)
    if kind < 3:
        path = folder / "h.jsonl.gz"
        packed = bytearray(gzip.compress(whole))
        if kind == 0:
            packed = packed[: r.randrange(1, len(packed))]
        elif kind == 1:
            packed[r.randrange(len(packed))] ^= 1 << r.randrange(8)
        else:
            packed = bytearray(b"no archive at all")
        path.write_bytes(bytes(packed))
    elif kind < 5:
        path = folder / "h.jsonl.zst"
        packed = bytearray(pa.Codec("zstd").compress(whole, asbytes=True))
        packed[r.randrange(len(packed))] ^= 1 << r.randrange(8)
        path.write_bytes(bytes(packed[: r.randrange(1, len(packed) + 1)]))
    elif kind < 10:
        path = folder / "h.parquet"
        pq.write_table(pa.Table.from_pylist(rows(9, 5, "h")), path)
        content = bytearray(path.read_bytes())
        if kind == 5:
            content = bytearray(b"PAR1")
        elif kind == 6:
            content = bytearray()
        elif kind == 7:
            content = content[: r.randrange(len(content))]
        else:
            content[r.randrange(len(content))] ^= 1 << r.randrange(8)
        path.write_bytes(bytes(content))
    elif kind == 10:
        path = folder / "h.parquet"
        big = pa.array([2**62], pa.int64())
        columns = {
            "prompt": pa.array(["x"]),
            "completion": pa.array(["y"]),
            "family": big.cast(pa.timestamp("us")),
        }
        pq.write_table(pa.table(columns), path)
    else:
        path = folder / "h.jsonl"
        path.write_bytes(b"")
    return path
