"""Seeded draws of rows, orders and tables: the one place that turns (seed, words) into random words and choices.

The seeds of k-means come from the rows' own content (clusters/seeds.py), tokens of a local model from its generator
(synthesis/generators/local.py). All randomness here is raw words of a Philox4x64 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), which are the same in every release of NumPy; methods of its Generator are not.
A draw is a function of its key alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def stream(*words: str | int) -> np.random.Philox:
    """Random words that depend on `words` alone: ("growth", 0, 3) is keyed by the BLAKE2b hash of "growth|0|3"."""
    digest = hashlib.blake2b("|".join(map(str, words)).encode(), digest_size=16).digest()
    return numbered_stream(int.from_bytes(digest, "little"))


def numbered_stream(key: int) -> np.random.Philox:
    """Random words that depend on `key`, modulo 2^128, alone."""
    return np.random.Philox(key=key % 2**128)


def random_words(seed: int, number: int, count: int) -> np.ndarray:
    """Random uint64 [count] that depend on the seed, modulo 2^64, and the number of the draw, below 2^64, alone."""
    return numbered_stream(seed % 2**64 | number << 64).random_raw(count)


def order(words: np.random.Philox, n: int) -> np.ndarray:
    """The numbers below n in random order, int64 [n]."""
    return np.argsort(words.random_raw(n), kind="stable")


def subset(words: np.random.Philox, n: int, count: int) -> np.ndarray:
    """`count` different numbers below n, in ascending order, int64 [count]."""
    # Takes time n; sorting all words would take n log n.
    return np.sort(np.argpartition(words.random_raw(n), count - 1)[:count])


def a_few(words: np.random.Philox, n: int, count: int) -> list[int]:
    """`count` different numbers below n in random order, all n if count >= n; takes time `count`, not n."""
    if count >= n:
        return order(words, n).tolist()
    taken: dict[int, None] = {}
    while len(taken) < count:
        taken[int(words.random_raw()) % n] = None
    return list(taken)


def places_by_id(ids: Iterable[str], count: int, seed: int) -> np.ndarray:
    """Places of the `count` ids with the smallest hashes, by hash: a random order that ids and seed alone decide."""
    keys = [hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest() for name in ids]
    return np.argsort(np.frombuffer(b"".join(keys), dtype=">u8"), kind="stable")[:count]
