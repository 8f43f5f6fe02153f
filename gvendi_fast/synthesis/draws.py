"""Which rows a prompt shows: a function of (seed, round, number of the prompt) and of the rows there are."""

from __future__ import annotations

import hashlib

import numpy as np


def draw(seed: int, round_: int, number: int, rows: int, count: int) -> list[int]:
    """`count` different numbers below `rows`, uniformly and in random order; all of them where there are no more."""
    digest = hashlib.blake2b(f"shots|{seed}|{round_}|{number}".encode(), digest_size=16).digest()
    # Raw words only: methods of Generator may change between releases of NumPy.
    words = np.random.Philox(key=int.from_bytes(digest, "little"))
    if count >= rows:
        return np.argsort(words.random_raw(rows), kind="stable").tolist()
    taken: dict[int, None] = {}
    while len(taken) < count:
        taken[int(words.random_raw()) % rows] = None
    return list(taken)
