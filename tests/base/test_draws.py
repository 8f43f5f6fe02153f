"""Seeded draws are pinned: a golden file holds what every room drew before they had one place for it."""

import json

import numpy as np
import pytest
from places import GOLDEN

from gvendi_fast.analysis.equal_n import draws
from gvendi_fast.base.draws import numbered_stream, order, places_by_id, random_words, stream
from gvendi_fast.synthesis.loop.proposer import shot_rows

RECORD = GOLDEN / "draws.json"
SEEDS = 0, 7, -3, 2**64 + 5, 2**130 + 1
NAMES = [f"row-{i}" for i in range(40)] + ["", "ä", "|", "0|1"]


def report_words() -> dict:
    keys = [f"growth|{seed}|{draw}" for seed in SEEDS for draw in (0, 4)]
    keys += [f"{room}|{seed}" for room in ("map", "clusters") for seed in SEEDS]
    return {key: stream(*key.split("|")).random_raw(5).tolist() for key in keys}


def group_draws() -> dict:
    cases = [(f"{seed}|{group}", 50, 10) for seed in SEEDS for group in ("math", "", "a|b", "ä")]
    cases += [("0|large", 700, 300), ("synthesis|3|grown", 40, 40)]
    return {
        f"{key}: {n} of {rows}": [drawn.tolist() for drawn in draws(np.arange(rows) * 3, n, key)][:6]
        for key, rows, n in cases
    }


def shots() -> dict:
    cases = [(seed, round_, number) for seed in SEEDS for round_, number in ((0, 0), (12, 345))]
    sizes = (10**6, 5), (20, 5), (5, 5), (3, 5), (4, 3)
    return {f"{case} {size}": shot_rows(*case, *size) for case in cases for size in sizes}


def selection_words() -> dict:
    streams = 0, 1, 2, 1000, 2**63
    return {f"{seed} {s}": random_words(seed, s, 4).tolist() for seed in SEEDS for s in streams}


def ids() -> dict:
    return {str(seed): places_by_id(NAMES, 12, seed).tolist() for seed in SEEDS}


def partitions() -> dict:
    return {str(seed): numbered_stream(seed).random_raw(4).tolist() for seed in SEEDS}


ROOMS = {
    "report": report_words,
    "groups": group_draws,
    "shots": shots,
    "selection": selection_words,
    "ids": ids,
    "partitions": partitions,
}


@pytest.mark.parametrize("room", ROOMS)
def test_draws_are_the_golden_ones(room):
    assert ROOMS[room]() == json.loads(RECORD.read_text())[room]


def test_words_of_a_key_are_joined_as_they_are_written():
    whole = stream("growth|7|0").random_raw(3).tolist()
    assert (
        stream("growth", 7, 0).random_raw(3).tolist()
        == whole
        == stream("growth|7", "0").random_raw(3).tolist()
    )
    assert stream("growth", 7, 1).random_raw(3).tolist() != whole


def test_an_order_holds_every_number_once_and_follows_the_words():
    first, again = (order(stream("order", 3), 100) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(np.sort(first), np.arange(100))
    assert np.array_equal(first, np.argsort(stream("order", 3).random_raw(100), kind="stable"))
