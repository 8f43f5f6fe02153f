"""Keeping test questions out: word n-grams that a text shares with test files, and texts that were there before.

Words are those of `tasks.words`. Word n-grams live as 64-bit hashes, 12 bytes for each n-gram of the tests:
    h_i = Σ_j w_{i+j} P^{n−1−j} mod 2^64, w the BLAKE2b hash of a word and P odd.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.kinds import kind_of
from gvendi_fast.data.listing import find_files, short_names
from gvendi_fast.data.rows import Fields, Rejected, Row, parse_row
from gvendi_fast.data.shapes import recognise
from gvendi_fast.data.sources import first_records, records_of_file
from gvendi_fast.data.unpacking import Damage
from gvendi_fast.synthesis.tasks.words import normal_form, words

_BASE = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Match:
    """What a text shares with a test row: where that row stands (line or Parquet row from 1) and the words.

    file: as seen from the folder that holds all test files.
    """

    file: str
    line: int
    words: str

    def __str__(self) -> str:
        return f'shares "{self.words}" with {self.file}:{self.line}'


@dataclass(frozen=True, slots=True)
class Question:
    """A question of a test set and where its row stands (line or Parquet row from 1); file: as in `Match`."""

    file: str
    line: int
    text: str


class Decontaminator:
    """The n-grams of test files, for matching.

    inputs: files, folders or globs in the forms a corpus has. n: words. completions: also take the tests' completions
    and assistant turns. A question shorter than n words matches a text of the same words only; a completion shorter
    than n words is left out, for it is a number or a label.
    `rows`: test rows read; `rejected`: rows that could not be read, with file, line and reason. Memory: 12 bytes for
    each n-gram. A wrong match has a chance of (n-grams of the tests) / 2^64 for each n-gram that is looked up.
    """

    def __init__(
        self,
        inputs: str | os.PathLike | Sequence[str | os.PathLike],
        n: int = 10,
        completions: bool = True,
        fields: Fields | None = None,
    ) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise GvendiError(f"n is {n!r}; wanted a number of words of at least 1")
        self.n, self.rows = n, 0
        self.rejected: list[Rejected] = []
        self._files = find_files(inputs)
        self._names = short_names(self._files)
        self._where: list[tuple[int, int]] = []
        self._whole: dict[int, int] = {}
        hashes, owners = [], []
        for number, path in enumerate(self._files):
            for row in _rows(path, fields or Fields()):
                if isinstance(row, Rejected):
                    self.rejected.append(row)
                    continue
                self._where.append((number, row.line))
                for found in self._texts(row, completions):
                    hashes.append(found)
                    owners.append(np.full(len(found), self.rows, np.uint32))
                self.rows += 1
        if not self.rows:
            reason = f" (first: {self.rejected[0].reason})" if self.rejected else ""
            raise GvendiError(f"tests: {', '.join(self._files)} hold no readable row{reason}")
        # The first row of an n-gram is the one reported, so one place for each is enough.
        joined = np.concatenate([*hashes, np.zeros(0, np.uint64)])
        self._hashes, first = np.unique(joined, return_index=True)
        self._owners = np.concatenate([*owners, np.zeros(0, np.uint32)])[first]

    def _texts(self, row: Row, completions: bool) -> Iterator[np.ndarray]:
        for text, question in _texts_of(row):
            if not question and not completions:
                continue
            found = words(text)
            if len(found) >= self.n:
                yield _ngrams(_word_hashes(found), self.n)
            elif found and question:
                self._whole.setdefault(_whole_hash(found), self.rows)

    @property
    def size(self) -> int:
        """Different n-grams held."""
        return len(self._hashes)

    def match(self, text: str) -> Match | None:
        """The first n-gram of `text` that a test row has, or the whole text where it is shorter; None for neither."""
        return self._match_words(words(text))

    def check(self, prompt: str, completion: str = "") -> Match | None:
        """`match` of a row's prompt, else of its completion where that has n words (a short one is no question)."""
        found, answer = self.match(prompt), words(completion)
        return self._match_words(answer) if found is None and len(answer) >= self.n else found

    def _match_words(self, found: list[str]) -> Match | None:
        if not found:
            return None
        if len(found) < self.n:
            row = self._whole.get(_whole_hash(found))
            return None if row is None else self._match(row, found)
        if not self.size:
            return None
        grams = _ngrams(_word_hashes(found), self.n)
        places = np.minimum(np.searchsorted(self._hashes, grams), self.size - 1)
        hits = np.flatnonzero(self._hashes[places] == grams)
        if not len(hits):
            return None
        start = int(hits[0])
        return self._match(int(self._owners[places[start]]), found[start : start + self.n])

    def _match(self, row: int, found: list[str]) -> Match:
        file, line = self._where[row]
        return Match(self._names[file], line, " ".join(found))


class Seen:
    """Texts that were there before, by the hash of their normal form (8 bytes each, in a set)."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._hashes: set[bytes] = set()
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, text: str) -> bool:
        return _text_hash(text) in self._hashes

    def add(self, text: str) -> bool:
        """Remember a text; False where it was there before, but for case, white space and Unicode form."""
        before = len(self._hashes)
        self._hashes.add(_text_hash(text))
        return len(self._hashes) > before


def read_questions(
    inputs: str | os.PathLike | Sequence[str | os.PathLike], fields: Fields | None = None
) -> Iterator[Question]:
    """Every question of test files in their order: prompts, user turns, bare texts. Unreadable rows are left out."""
    files = find_files(inputs)
    for path, name in zip(files, short_names(files), strict=True):
        for row in _rows(path, fields or Fields()):
            if not isinstance(row, Rejected):
                yield from (Question(name, row.line, text) for text, asked in _texts_of(row) if asked)


def _rows(path: str, fields: Fields) -> Iterator[Row | Rejected]:
    kind = kind_of(path) or ""
    first, seen = first_records(path, kind, fields)
    fields = recognise(first, fields, seen).fields
    for line, record in records_of_file(path, kind, fields):
        if isinstance(record, Damage):
            # Whatever it held behind this would count as clean.
            raise GvendiError(f"tests: '{path}' is a {record}; fetch or write it again")
        yield parse_row(record, fields, 0, path, line)


def _texts_of(row: Row) -> Iterator[tuple[str, bool]]:
    """(text, whether it is a question) of every text of a test row."""
    if row.prompt is not None:
        yield row.prompt, True
        yield row.completion, False
    elif row.messages is not None:
        for message in row.messages:
            # Instructions are the same in every row, and in rows of other sets.
            if message["role"] != "system":
                yield message["content"], message["role"] != "assistant"
    else:
        yield row.text, True


@lru_cache(maxsize=1 << 16)
def _common_hash(word: str) -> int:
    return _word_hash(word)


def _word_hash(word: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def _word_hashes(found: Sequence[str]) -> np.ndarray:
    # Words repeat, but a hostile text's longest ones must not fill the cache.
    hashes = (_common_hash(word) if len(word) <= 32 else _word_hash(word) for word in found)
    return np.fromiter(hashes, np.uint64, len(found))


def _ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    count = len(hashes) - n + 1
    total = np.zeros(count, np.uint64)
    for j in range(n):
        # Unsigned arrays wrap around: arithmetic modulo 2^64.
        total = total * np.uint64(_BASE) + hashes[j : j + count]
    return total


def _whole_hash(found: Sequence[str]) -> int:
    return _word_hash(" ".join(found))


def _text_hash(text: str) -> bytes:
    return hashlib.blake2b(normal_form(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
