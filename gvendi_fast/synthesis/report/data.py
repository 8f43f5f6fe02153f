"""Directory of a synthesis run -> every number and text of its report, as one JSON-able dict; `page.py` draws it."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from gvendi_fast.analysis.compare import LEAST_ROWS
from gvendi_fast.analysis.equal_n import band, draws
from gvendi_fast.base._version import __version__
from gvendi_fast.base.student import quantile
from gvendi_fast.clusters.distinct import cluster_rows
from gvendi_fast.clusters.kmeans import sparse_clusters
from gvendi_fast.data.pool import MatrixPool
from gvendi_fast.report.numbers import SHOWN_CLUSTERS, SHOWN_ROWS
from gvendi_fast.synthesis.config.config import Config
from gvendi_fast.synthesis.disk.record import RunRecord
from gvendi_fast.synthesis.loop.pool_numbers import pool_numbers
from gvendi_fast.synthesis.report.examples import accepted_rows, add_texts, rejected_rows
from gvendi_fast.vendi.of_rows import gvendi

FORMAT = 2
# Windows that acceptance is shown in.
WINDOWS = 60


def synthesis_report_data(
    path: str | os.PathLike,
    *,
    seed: int = 0,
    corpus: str | os.PathLike | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Everything that the report of a synthesis run shows, from its directory alone; it may have ended or not.

    seed: of the draws of equal size. corpus: the folder that holds the seeds' corpus now, if it has moved; where it
    cannot be read, `texts_missing` says why and the seeds have no text. say: is told each step. The same files and
    seed give an equal dict. Entropies in nats; G-Vendi of unit sketches.

    Memory: the pool's sketches, twice 4 K bytes a row, and the lines of one event a block; accepted and rejected rows
    are gone through one at a time. Raises GvendiError as `RunRecord` does.
    """
    say = say or (lambda step: None)
    say("reading the run")
    record = RunRecord(path)
    seeds, new = record.seed_sketches(), record.sketches()
    say("G-Vendi")
    whole = torch.cat([seeds, torch.from_numpy(np.array(new))]) if len(new) else seeds
    at_start, at_end = pool_numbers(whole, len(seeds))
    start, now = at_start.gvendi, at_end.gvendi
    equal = _at_equal_n(seeds, new, start, seed)
    say("clusters")
    clusters, label = _clusters(record, seeds, new)
    say("candidates")
    accepted = accepted_rows(record, label)
    rejected = rejected_rows(record)
    judged: Counter[str] = Counter()
    for part in (accepted, rejected):
        judged.update(part.pop("judged"))
    clusters["elsewhere"] = accepted.pop("elsewhere")
    decided = sum(event["decided"] for event in record.blocks)
    data = {
        "format": FORMAT,
        "version": __version__,
        "run": str(record.path),
        "seed": seed,
        "task": record.config.task.name,
        "rule": record.config.accept.rule,
        "proxy": record.config.proxy.name,
        "generator": record.config.generator.model,
        "stop": _stop(record),
        "score": {
            "seeds": len(seeds),
            "accepted": len(new),
            "rows": len(seeds) + len(new),
            "target": record.config.stop.target,
            "dim": record.dim,
            "decided": decided,
            "rounds": len(record.rounds),
            "gvendi_start": start,
            "gvendi": now,
            "at_start": at_start.to_dict(),
            "at_end": at_end.to_dict(),
            "equal": equal,
        },
        "growth": _growth(record, now),
        "acceptance": _acceptance(record, rejected.pop("stages")),
        "clusters": clusters,
        "rules": {"judged": sum(judged.values()), **{name: judged[name] for name in _CELLS}},
        "accepted": accepted,
        "spent": _spent(record),
        "settings": _settings(record.config),
    }
    say("texts")
    data["texts_missing"] = add_texts(data, record, corpus)
    return data


# Candidates by what both rules said of them: in a sparse cluster or not, gain above the threshold or not.
_CELLS = ("sparse_above", "sparse_below", "dense_above", "dense_below")


def _stop(record: RunRecord) -> dict[str, str] | None:
    """Why the last run ended; None where it has not."""
    if record.stop is None:
        return None
    why, address = record.stop["why"], record.config.generator.base_url
    return {
        "reason": record.stop["reason"],
        "why": why if address is None else why.replace(address, _public(address)),
    }


def _at_equal_n(seeds: torch.Tensor, new: np.ndarray, start: float, seed: int) -> dict[str, Any]:
    """G-Vendi of random subsets of one size: the grown pool by as many rows as the seeds; both kinds of row alone.

    `alone` is None where one of them has fewer than 8 rows.
    """
    s, m = len(seeds), len(new)

    def take(numbers: np.ndarray) -> torch.Tensor:
        old, young = numbers[numbers < s], numbers[numbers >= s] - s
        return torch.cat([seeds[torch.from_numpy(old)], torch.from_numpy(np.asarray(new[young]))])

    def score(first: int, rows: int, n: int, name: str) -> dict[str, Any]:
        known = [start] if (first, rows, n) == (0, s, s) else None
        drawn = draws(np.arange(first, first + rows), n, f"synthesis|{seed}|{name}")
        values = known or [gvendi(take(numbers)) for numbers in drawn]
        low, high = band(values)
        return {
            "gvendi": statistics.fmean(values),
            "low": low,
            "high": high,
            "draws": len(values),
            "reach": _reach(values),
            "rows": rows,
        }

    n = min(s, m)
    grown = score(0, s + m, s, "grown")
    return {
        "pool": {
            "n": s,
            "seeds": score(0, s, s, "seeds"),
            "grown": grown,
            "told_apart": abs(start - grown["gvendi"]) > grown["reach"],
        },
        "alone": {"n": n, "seeds": score(0, s, n, "seeds alone"), "accepted": score(s, m, n, "accepted")}
        if n >= LEAST_ROWS
        else None,
    }


def _reach(values: list[float]) -> float:
    """How far from the mean of these draws another one lies at most, in 95 of 100 cases: t s sqrt(1 + 1/m).

    If the new rows are of the seeds' kind, the seeds are another draw of the pool like any other.
    """
    m = len(values)
    return quantile(0.95, m - 1) * statistics.stdev(values) * math.sqrt(1 + 1 / m) if m > 1 else 0.0


def _growth(record: RunRecord, now: float) -> dict[str, Any]:
    """G-Vendi and rows by the number of candidates decided, and the rounds' starts.

    An event holds the score of the rows that its gains refer to. Where these are not all of the pool before the block,
    for it has grown since, the point is there already.
    """
    points, before, starts = [], 0, {event["block"]: event for event in record.rounds}
    rounds, pool, frozen = [], record.seeds, record.config.accept.frozen
    for event in record.blocks:
        begins = starts.get(event["block"])
        if begins is not None:
            rounds.append({"round": begins["round"], "decided": before, "rows": pool})
        if event.get("gvendi_rows", rounds[-1]["rows"] if frozen else pool) == pool:
            points.append({"decided": before, "rows": pool, "gvendi": event["gvendi"]})
        before, pool = before + event["decided"], event["pool"]
    points.append({"decided": before, "rows": pool, "gvendi": now})
    return {"points": points, "rounds": rounds}


def _acceptance(record: RunRecord, examples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What became of the candidates, by stage, and in windows of whole blocks with about equally many decided."""
    whole: Counter[str] = Counter()
    total = sum(event["decided"] for event in record.blocks)
    windows: list[dict[str, Any]] = []
    for event in record.blocks:
        if not windows or windows[-1]["decided"] * WINDOWS >= total:
            windows.append({"decided": 0, "accepted": 0, "rejected": Counter()})
        window = windows[-1]
        window["decided"] += event["decided"]
        window["accepted"] += event["joined"]
        window["rejected"].update(event["rejected"])
        whole.update(event["rejected"])
    if len(windows) > 1 and 2 * windows[-1]["decided"] < windows[-2]["decided"]:
        # Shares of a few candidates would stand beside those of many.
        last = windows.pop()
        for name in ("decided", "accepted"):
            windows[-1][name] += last[name]
        windows[-1]["rejected"].update(last["rejected"])
    stages = [
        {"stage": stage, "count": count, "share": count / total, "examples": examples.get(stage, [])}
        for stage, count in sorted(whole.items(), key=lambda item: (-item[1], item[0]))
    ]
    return {
        "windows": [{**window, "rejected": dict(window["rejected"])} for window in windows],
        "blocks": len(record.blocks),
        "stages": stages,
    }


def _clusters(record: RunRecord, seeds: torch.Tensor, new: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Rows of the first round's clusters before and after, and the accepted rows' clusters, int64 [n]."""
    config = record.config
    model = record.clusters or cluster_rows(seeds, config.accept.clusters, config.seed)
    found = [model.assign(seeds)] + ([model.assign(MatrixPool(new))] if len(new) else [])
    label, cosine = (np.concatenate([part[i].numpy() for part in found]) for i in (0, 1))
    count, s = len(model.centroids), len(seeds)
    before, joined = (np.bincount(part, minlength=count) for part in (label[:s], label[s:]))
    sparse = sparse_clusters(before).numpy()
    order = np.argsort(before, kind="stable")[::-1]
    both = count > 2 * SHOWN_CLUSTERS
    ends = {
        "largest": order[:SHOWN_CLUSTERS] if both else order,
        "smallest": order[-SHOWN_CLUSTERS:] if both else [],
    }

    def entry(cluster: int) -> dict[str, Any]:
        members = np.flatnonzero(label == cluster)
        nearest = members[np.argsort(-cosine[members], kind="stable")[:SHOWN_ROWS]]
        return {
            "cluster": cluster,
            "column": int(np.flatnonzero(order == cluster)[0]) + 1,
            "before": int(before[cluster]),
            "after": int(before[cluster] + joined[cluster]),
            "sparse": bool(sparse[cluster]),
            "rows": [{"number": int(i), "cosine": float(cosine[i])} for i in nearest],
        }

    return {
        "clusters": count,
        "before": before.tolist(),
        "after": (before + joined).tolist(),
        "sparse": int(sparse.sum()),
        "sparse_before": float(before[sparse].sum() / s),
        "sparse_after": float((before + joined)[sparse].sum() / (s + len(new))),
        "sparse_joined": float(joined[sparse].sum() / len(new)) if len(new) else None,
        "entropy_before": _entropy(before),
        "entropy_after": _entropy(before + joined),
        **{name: [entry(int(c)) for c in numbers] for name, numbers in ends.items()},
    }, label[s:]


def _entropy(counts: np.ndarray) -> float:
    """H of the rows' distribution over clusters, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(abs(-(p * np.log(p)).sum()))


def _spent(record: RunRecord) -> dict[str, Any]:
    """What the runs that noted their end took: answers over all runs, seconds of each added up.

    `later`: blocks were decided after the last note. Fields are None where no run noted its end.
    """
    seconds: Counter[str] = Counter()
    for stop in record.stops:
        seconds.update(stop.get("seconds", {}))
    last = record.stops[-1] if record.stops else {}
    tokens = last.get("tokens")
    return {
        "requests": last.get("requests"),
        "prompt_tokens": tokens[0] if tokens else None,
        "completion_tokens": tokens[1] if tokens else None,
        "cost": last.get("cost"),
        "seconds": dict(sorted(seconds.items(), key=lambda item: -item[1])),
        "runs": len(record.stops),
        "later": record.stop is None and bool(record.blocks),
    }


def _settings(config: Config) -> dict[str, Any]:
    """The configuration, which has no key; of the endpoint's address what can be shown."""
    found = config.to_dict()
    if config.generator.base_url is not None:
        found["generator"]["base_url"] = _public(config.generator.base_url)
    return found


def _public(address: str) -> str:
    """Scheme, host and path of a URL; a name, a password or a key in its query is for nobody's eyes."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
