"""Run directory -> every number and text of a report, as one JSON-able dict; `page.py` draws it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gvendi_fast.analysis.equal_n import MAX_GROUPS, pooled_sentence, saturation_sentence
from gvendi_fast.analysis.scoring import Score, score_run
from gvendi_fast.analysis.set_numbers import Sample
from gvendi_fast.base._version import __version__
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.places import place
from gvendi_fast.data.originals import original_rows
from gvendi_fast.data.pool import Pool, as_pool
from gvendi_fast.data.rows import Rejected, kind_of_reason
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.texts import TEXT, original_text
from gvendi_fast.report import numbers
from gvendi_fast.selection.limits import most_distinct
from gvendi_fast.vendi.state import VendiState

FORMAT = 2
# Groups that the map colours.
COLOURED = 8
EXAMPLES = 3
SHARES = (0.5, 0.9, 0.99)


def report_data(
    run: RunDirectory | str | os.PathLike,
    *,
    by: str | None = None,
    clusters: int | str | os.PathLike | None = None,
    seed: int = 0,
    corpus: str | os.PathLike | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Everything that a report of a run directory shows; it may be incomplete, but must hold a row.

    by: the field the directory was sketched with (None: that field, if there is one).
    clusters: how many (None: 1 % of the rows), or the file that `gvendi cluster` wrote.
    seed: of all draws.
    corpus: the folder that holds the corpus now, if it has moved; if its rows cannot be read, `texts_missing` says why
        and no row has a text.
    say: called with the name of each step as it begins.

    The same run, seed and settings give an equal dict. Scores are those of `score_run`; entropies and surprisals are
    in nats, and eigenvalues sum to 1. Raises GvendiError for another --by, a run without rows, and clusters that are
    not the run's.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory.load(run)
    say = say or (lambda step: None)
    recorded = run.by
    say("reading the run")
    pool = as_pool(run)
    # A field that no row has makes no groups; asked for by name, it is an error below.
    field = by or (recorded if any(pool.groups) else None)
    too_many = field is not None and len(set(pool.groups)) > MAX_GROUPS
    say("scoring")
    score = score_run(run, by=None if too_many and by is None else field, seed=seed)
    state, rows = _spectral(pool)
    say("surprisal of every row")
    values, ends = numbers.surprisal(rows, state)
    say("growth with n")
    equal = max((group.n for group in score.by.values()), default=0) or None
    grown = numbers.growth(rows, score.gvendi, (score.low, score.high), score.growth, seed, equal)
    say("clusters")
    wanted = clusters if clusters is None or isinstance(clusters, int) else place(clusters)
    label, clustered = numbers.clusters(pool, wanted, seed)
    say("map and near-duplicates")
    data = {
        "format": FORMAT,
        "version": __version__,
        "run": str(run.path),
        "seed": seed,
        "score": _score(score, pool),
        "growth": grown,
        "groups": None if field is None else _groups(field, score, pool, values, grown, too_many),
        "map": _map(pool, rows, state, label, field, seed),
        "clusters": _with_groups(clustered, label, pool, field),
        "surprisal": ends,
        "duplicates": numbers.duplicates(pool),
        "rejected": rejected_reasons(run.rejected()),
        "spectrum": _spectrum(state),
    }
    say("texts")
    data["texts_missing"] = _add_texts(data, run, pool, field, corpus)
    return data


def _spectral(pool: Pool) -> tuple[VendiState, Pool]:
    """The state of the rows, and the rows in the coordinates that it is in: fewer rows than K need no K x K matrix."""
    if len(pool) < pool.dim:
        sample = Sample.of_rows(torch.cat([rows for _, rows in pool.blocks()]))
        return sample.state, sample.pool
    state = VendiState(pool.dim)
    for _, rows in pool.blocks():
        state.update(rows)
    return state, pool


def _score(score: Score, pool: Pool) -> dict[str, Any]:
    """The score with its trivial limit: no rows have a G-Vendi above their number without copies, or above K."""
    values = score.to_dict()
    kept = (
        "gvendi",
        "low",
        "high",
        "entropy",
        "n",
        "dim",
        "unlimited_k",
        "centered",
        "diagnosis",
        "growth",
        "limits",
        "tokens",
        "rejected",
        "coverage",
        "norm_shares",
        "spec",
        "unreadable",
        "damaged",
        "warnings",
    )
    # The settings of a run just made are in another order than those read from its file.
    values["spec"] = json.loads(json.dumps(score.spec, sort_keys=True))
    done, total = score.units
    limit = min(most_distinct(pool, len(pool)), score.dim)
    return {
        **{name: values[name] for name in kept},
        "limit": limit,
        "units_done": done,
        "units_total": total,
    }


def _spectrum(state: VendiState) -> dict[str, Any]:
    eigenvalues = state.spectrum()
    held = state.effective_spectrum(SHARES)
    return {
        "eigenvalues": eigenvalues[eigenvalues > 1e-12].tolist(),
        "effective": [{"share": share, "count": count} for share, count in held.items()],
    }


def _groups(
    field: str, score: Score, pool: Pool, values: np.ndarray, grown: dict[str, Any], too_many: bool
) -> dict[str, Any]:
    """Groups by G-Vendi at equal n, highest first; each with its share of the rows and of the entropy.

    Small groups that are compared together stand in one more group, whose rows are counted in their own ones too.
    `mixed` is the point of the growth curve at that n: as many rows drawn from all groups together.
    """
    if too_many:
        return {"field": field, "too_many": len(set(pool.groups)), "mixed": None, "notes": [], "groups": []}
    names, place = np.unique(np.array(pool.groups, dtype=object), return_inverse=True)
    sums = dict(zip(names, np.bincount(place, weights=values).tolist(), strict=True))
    small = sum(sums[name] for name in names if score.by[name].gvendi is None)
    whole = float(values.sum())
    groups = []
    for name, of in score.by.items():
        surprisal = sums.get(name, small)
        groups.append(
            {
                "group": name,
                **of.to_dict(),
                "row_share": of.rows / len(pool),
                "entropy_share": surprisal / whole if whole > 0 else of.rows / len(pool),
                "surprisal": surprisal / of.rows,
            }
        )
    groups.sort(key=lambda group: (group["gvendi"] is None, -(group["gvendi"] or 0), group["group"]))
    n = groups[0]["n"]
    compared = [group["gvendi"] for group in groups if group["gvendi"] is not None]
    notes = [pooled_sentence(score.by), saturation_sentence(compared, n, score.dim)]
    return {
        "field": field,
        "too_many": None,
        "mixed": next((point for point in grown["points"] if point["n"] == n), None),
        "notes": [note for note in notes if note is not None],
        "groups": groups,
    }


def _map(
    pool: Pool, rows: Pool, state: VendiState, label: np.ndarray, field: str | None, seed: int
) -> dict[str, Any] | None:
    """The map with a colour for each point: its place among `colours`, or their number for all others."""
    if len(pool) < 3:
        return None
    points = numbers.principal_map(rows, state, seed)
    of_row = [f"cluster {c}" for c in label.tolist()] if field is None else pool.groups
    names, counts = np.unique(np.array(of_row, dtype=object), return_counts=True)
    largest = [str(names[i]) for i in np.argsort(-counts, kind="stable")[:COLOURED]]
    place = {name: i for i, name in enumerate(largest)}
    chosen = points.pop("rows")
    return {
        **points,
        "ids": [pool.ids[i] for i in chosen],
        "colour": [place.get(of_row[i], len(largest)) for i in chosen],
        "colours": largest,
        "others": len(names) - len(largest),
        "of": len(pool),
        "by": field,
    }


def _with_groups(
    clusters: dict[str, Any], label: np.ndarray, pool: Pool, field: str | None
) -> dict[str, Any]:
    """Clusters, each with the group that most of its rows have and the share of these rows."""
    if field is not None:
        for cluster in (*clusters["largest"], *clusters["sparsest"]):
            members = [pool.groups[i] for i in np.flatnonzero(label == cluster["cluster"])]
            names, counts = np.unique(np.array(members, dtype=object), return_counts=True)
            top = int(counts.argmax())
            cluster["group"], cluster["group_share"] = names[top], float(counts[top] / len(members))
    return clusters


def rejected_reasons(items) -> dict[str, Any]:
    """Rejected rows by kind of reason, most frequent first, with up to three examples of each."""
    kinds: dict[str, dict[str, Any]] = {}
    item: Rejected
    for item in items:
        kind = kind_of_reason(item.reason)
        entry = kinds.setdefault(kind, {"reason": kind, "count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(
                {"file": item.file, "line": item.line, "id": item.id, "reason": item.reason[:TEXT]}
            )
    reasons = sorted(kinds.values(), key=lambda entry: (-entry["count"], entry["reason"]))
    return {"count": sum(entry["count"] for entry in reasons), "reasons": reasons}


def _add_texts(
    data: dict[str, Any], run: RunDirectory, pool: Pool, field: str | None, corpus: str | os.PathLike | None
) -> str | None:
    """Give every row that `data` names its id, group and text; returns why there are no texts, else None."""
    named = list(numbers.row_numbers(data))
    ordinals = pool.numbers("row")
    texts: dict[int, list[dict[str, Any]]] = {}
    missing = None
    rows = original_rows(run, (int(ordinals[e["row"]]) for e in named), corpus)
    while True:
        # The error is not lost: the report shows it in place of the texts.
        try:
            row = next(rows, None)
        except GvendiError as error:
            texts, missing = {}, str(error)
            break
        if row is None:
            break
        # Only what is shown is kept, since a row may be megabytes long.
        texts[row.ordinal] = original_text(row, run)
    for entry in named:
        number = entry["row"]
        entry["id"], entry["row"] = pool.ids[number], int(ordinals[number])
        if field is not None:
            entry["group"] = pool.groups[number]
        entry["text"] = texts.get(entry["row"])
    return missing
