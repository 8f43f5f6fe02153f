"""The candidates of a synthesis run as its report shows them: some of each kind with their texts, and what is counted.

Files are gone through line by line; no more than the rows that are shown stays in memory.
"""

from __future__ import annotations

import heapq
import math
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.originals import original_rows
from gvendi_fast.data.texts import original_text, text_parts
from gvendi_fast.synthesis.disk.record import RunRecord

# Accepted rows of each kind that are shown, and of each stage the first and last rejected candidates.
SHOWN, FIRST, LAST = 3, 2, 1
# Characters of a reason that are kept.
REASON = 1000


def accepted_rows(record: RunRecord, label: np.ndarray) -> dict[str, Any]:
    """Accepted rows to show, `judged` (see `_cell`), and `elsewhere`.

    label: each row's nearest cluster of the first round, int64 [n]. elsewhere: rows of that round for which the run
    had found another one, as may be where it clustered on another kind of hardware.
    """
    judged: Counter[str] = Counter()
    first, last = [], deque(maxlen=SHOWN)
    best: list[tuple[float, int, dict[str, Any]]] = []
    in_first = max((event["accepted"] for event in record.blocks if event["round"] == 0), default=0)
    elsewhere = 0
    for number, row in enumerate(record.accepted()):
        judged[_cell(row)] += 1
        elsewhere += number < in_first and row["cluster"] != int(label[number])
        if number < SHOWN:
            first.append(_accepted(row))
        else:
            last.append(row)
        # A gain falls with the rows there are; of equal ones the first stays.
        entry = (row["gain"] / math.log1p(1 / (record.seeds + number)), -number, row)
        if len(best) < SHOWN:
            heapq.heappush(best, entry)
        else:
            heapq.heappushpop(best, entry)
    return {
        "judged": judged,
        "elsewhere": elsewhere,
        "first": first,
        "last": [_accepted(row) for row in last],
        "gain": [_accepted(row) for _, _, row in sorted(best, reverse=True)],
    }


def rejected_rows(record: RunRecord) -> dict[str, Any]:
    """`judged` (see `_cell`), and by stage the first and the last candidates that were rejected there."""
    judged: Counter[str] = Counter()
    first: dict[str, list[dict[str, Any]]] = {}
    last: dict[str, deque[dict[str, Any]]] = {}
    for line in record.rejected():
        if "sparse" in line:
            judged[_cell(line)] += 1
        here = first.setdefault(line["stage"], [])
        if len(here) < FIRST:
            here.append(line)
        else:
            last.setdefault(line["stage"], deque(maxlen=LAST)).append(line)
    stages = {
        stage: [_rejected(line) for line in (*lines, *last.get(stage, ()))] for stage, lines in first.items()
    }
    return {"judged": judged, "stages": stages}


def add_texts(data: dict[str, Any], record: RunRecord, corpus: str | os.PathLike | None) -> str | None:
    """Give the rows that clusters name (`number`: of the seeds, then of the accepted rows) their id and text.

    Returns why the seeds have no texts, else None.
    """
    clusters = data["clusters"]
    named = [row for c in (*clusters["largest"], *clusters["smallest"]) for row in c["rows"]]
    ordinals, missing = record.seed_pool.numbers("row"), None
    texts: dict[int, list[dict[str, Any]]] = {}
    wanted = {row["number"] for row in named}
    # Not a fallback: the report shows the error in place of the texts.
    try:
        of_seeds = {int(ordinals[number]): number for number in wanted if number < record.seeds}
        for original in list(original_rows(record.seed_run, of_seeds, corpus)):
            texts[of_seeds[original.ordinal]] = original_text(original, record.seed_run)
    except GvendiError as error:
        texts, missing = {}, str(error)
    ids = {number: record.seed_pool.ids[number] for number in wanted if number < record.seeds}
    # A file that is gone through to its end for nothing would cost seconds.
    if any(number >= record.seeds for number in wanted):
        for number, row in enumerate(record.accepted(), record.seeds):
            if number in wanted:
                texts[number], ids[number] = _pair(row), row["id"]
    for row in named:
        number = row["number"]
        row["id"], row["new"], row["text"] = ids[number], number >= record.seeds, texts.get(number)
    return missing


def _cell(judged: Mapping[str, Any]) -> str:
    """What both rules say of a candidate."""
    return ("sparse_" if judged["sparse"] else "dense_") + ("above" if judged["above"] else "below")


def _accepted(row: Mapping[str, Any]) -> dict[str, Any]:
    meta = row.get("meta") or {}
    votes = meta.get("votes")
    return {
        **{name: row[name] for name in ("id", "parents", "cluster", "sparse", "gain", "above")},
        "votes": None if votes is None else [votes, len(meta.get("answers") or ())],
        "text": _pair(row),
    }


def _rejected(line: Mapping[str, Any]) -> dict[str, Any]:
    if line.get("row") is not None:
        text = _pair(line["row"])
    elif line.get("prompt") is not None:
        text = text_parts([("prompt", line["prompt"])])
    else:
        text = None
    return {"id": line["id"], "parents": line["parents"], "reason": line["reason"][:REASON], "text": text}


def _pair(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return text_parts([(name, str(row[name])) for name in ("prompt", "completion")])


def shown_rows(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every row with a text in `data`."""
    for name in ("first", "last", "gain"):
        yield from data["accepted"][name]
    for stage in data["acceptance"]["stages"]:
        yield from stage["examples"]
    for cluster in (*data["clusters"]["largest"], *data["clusters"]["smallest"]):
        yield from cluster["rows"]
