"""Whichever decoder is installed, a line is the same record or has the same reason."""

import json
import random

import pytest

from gvendi_fast.data import json_scanner
from gvendi_fast.data import records as module

ODD = [
    b'{"a": 18446744073709551616, "b": -9223372036854775809, "c": 0.1, "d": 1E5, "e": -0, "f": -0.0}',
    b'{"a": 1e400, "b": 123456789012345678901234567890.5, "c": 4.9e-324}',
    b'{"a": NaN}',
    b'{"a": "\\ud800"}',
    b'{"a": "\\ud83d\\ude00 \\/ \\u0000", "\\u0061": 2, "a": 3}',
    b'{"a": "\x01"}',
    b'{"a": "\xff"}',
    b'{"a": "\xed\xa0\x80"}',
    b'{"a": 01}',
    b'{"a": 1,}',
    b'{"a": 1} x',
    b' {"a": 1}\t',
    b"\xef\xbb\xbf{}",
    b"[1]",
    b"",
    b'{"a": ' + b"7" * 5000 + b"}",
    b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}",
]


@pytest.fixture
def by_both(monkeypatch):
    pytest.importorskip("msgspec", reason="there is Python's decoder alone")

    def decoded(raw):
        found = module.decode_line(raw)
        with monkeypatch.context() as changed:
            changed.setattr(module, "scan", json_scanner.scan_by_python)
            changed.setattr(json_scanner, "REFUSED", (ValueError, StopIteration))
            return found, module.decode_line(raw)

    return decoded


def test_both_decoders_give_the_same_record_or_reason(by_both):
    draws = random.Random(4)
    good = json.dumps(
        {"text": 'ä "\\ \u2028', "n": [1, 2.5, None, True, {"k": -1e-7}], "id": 10**20}
    ).encode()
    for number in range(1000 + len(ODD)):
        raw = bytearray(ODD[number] if number < len(ODD) else good)
        for _ in range(draws.randrange(3) if number >= len(ODD) else 0):
            raw[draws.randrange(len(raw))] = draws.randrange(256)
        one, two = by_both(bytes(raw))
        assert repr(one) == repr(two), raw
        assert type(one) is type(two)


def test_python_scans_what_is_json_as_it_stands_and_nothing_else():
    assert json_scanner.scan_by_python(b'{"a": [1, "\xc3\xa4"]}') == {"a": [1, "ä"]}
    for raw in (b'{"a": 1} ', b"", b"{", b'{"a": "\xff"}'):
        with pytest.raises((ValueError, StopIteration)):
            json_scanner.scan_by_python(raw)
