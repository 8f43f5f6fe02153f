"""What a report says of single rows and how they are spread: growth, surprisal, map, clusters, near-duplicates.

Every function goes through the pool block by block; draws are those of `base.draws`.
All results are plain dicts, lists and numbers; a row is named by its number in the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.draws import order, stream
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.os_errors import named
from gvendi_fast.base.places import open_file
from gvendi_fast.base.tensor_files import LENGTH
from gvendi_fast.clusters.kmeans import SphericalKMeans, sparse_clusters
from gvendi_fast.data.pool import MatrixPool, Pool
from gvendi_fast.vendi.growth import Growth
from gvendi_fast.vendi.state import VendiState

# Draws of each subset size; one where a spectrum takes minutes.
GROWTH_DRAWS, LARGE_DIM, GROWTH_SIZES, LEAST_SIZE = 5, 2048, 12, 4
MAP_POINTS = 2000
# Default clusters: most rows that they are fitted to, most clusters, and how many are shown from each end.
CLUSTER_ROWS, MOST_CLUSTERS, SHOWN_CLUSTERS, SHOWN_ROWS = 50_000, 256, 5, 3
EXTREMES = 10
# All pairs of more rows take too long beside the rest.
DUPLICATE_ROWS, DUPLICATE_COSINE, DUPLICATE_BLOCK, SHOWN_FAMILIES = 20_000, 0.99, 512, 5
BINS = 40
# What is read of a file of clusters, and the types of each column.
_CLUSTERS = {"id": ("string", "large_string"), "cluster": ("int64",), "cosine": ("float", "double")}


def growth(
    pool: Pool,
    value: float,
    another: tuple[float, float],
    known: Growth | None,
    seed: int,
    also: int | None = None,
) -> dict[str, Any]:
    """G-Vendi of random subsets of n, n / 2, n / 4, ... (and `also`) rows: mean, least and most over draws.

    value, another: the score of all n rows, and the interval for another draw of n rows.
    known: the score's own growth, whose points stand for n / 4 and n / 2 and whose forecast ends the curve; None for
        too few rows.
    A draw is one order of all rows, its subsets are the beginnings of it. One pass over the pool a draw; memory is a
    K x K state for each size.
    """
    n = len(pool)
    scored = [] if known is None else known.points[:-1]
    sizes = {n >> i for i in range(3 if scored else 0, GROWTH_SIZES) if n >> i >= min(n, LEAST_SIZE)}
    if also is not None and also not in {n, *(point.n for point in scored)}:
        sizes.add(also)
    drawn = sorted(sizes - {n})
    draws = GROWTH_DRAWS if pool.dim <= LARGE_DIM else 1
    scores: dict[int, list[float]] = {size: [] for size in drawn}
    for draw in range(draws if scores else 0):
        place = np.empty(n, np.int64)
        place[order(stream("growth", seed, draw), n)] = np.arange(n)
        shells = [VendiState(pool.dim) for _ in scores]
        for first, rows in pool.blocks():
            shell = np.searchsorted(drawn, place[first : first + len(rows)], side="right")
            for index, state in enumerate(shells):
                here = torch.from_numpy(np.flatnonzero(shell == index))
                if len(here):
                    state.update(rows[here])
        state = VendiState(pool.dim)
        for size, shell in zip(scores, shells, strict=True):
            scores[size].append(state.merge(shell).gvendi())
    points = [
        {
            "n": size,
            "mean": float(np.mean(values)),
            "low": min(values),
            "high": max(values),
            "draws": len(values),
        }
        for size, values in scores.items()
    ]
    points = sorted([*points, *map(vars, scored)], key=lambda point: point["n"])
    points.append({"n": n, "mean": value, "low": value, "high": value, "draws": 1})
    # The score's halves are of whole quarters, so that they may have a row more.
    at = scored[-1].n if scored else n // 2
    half = next((point for point in points[:-1] if point["n"] == at), None)
    return {
        "points": points,
        "another_draw": list(another),
        "half": None if half is None else half["n"],
        # How much the last doubling of the rows added.
        "last_doubling": None if half is None else value / half["mean"] - 1,
        "forecast": None if known is None else vars(known.forecast),
    }


def surprisal(pool: Pool, state: VendiState) -> tuple[np.ndarray, dict[str, Any]]:
    """Each row's surprisal in nats, float64 [N], with its histogram and the rows at both ends."""
    values = np.concatenate([state.contributions(rows).numpy() for _, rows in pool.blocks()])
    by_value = np.argsort(values, kind="stable")
    shown = min(EXTREMES, len(values) // 2) or 1
    ends = {"most": by_value[::-1][:shown], "least": by_value[:shown]}
    rows = {
        name: [{"row": int(i), "surprisal": float(values[i])} for i in numbers]
        for name, numbers in ends.items()
    }
    return values, {"mean": float(values.mean()), **_histogram(values), **rows}


def principal_map(pool: Pool, state: VendiState, seed: int) -> dict[str, Any]:
    """Coordinates of up to MAP_POINTS drawn rows on the first two principal axes of the centred unit sketches.

    Axes are eigenvectors of A / n - m m^T, m the mean row; on each the drawn row that is farthest out is positive.
    """
    total = torch.zeros(pool.dim, dtype=torch.float64)
    for _, rows in pool.blocks():
        total += rows.sum(dim=0, dtype=torch.float64)
    mean = total / len(pool)
    spread, axes = torch.linalg.eigh(state.matrix.cpu() / state.n - torch.outer(mean, mean))
    chosen = np.sort(order(stream("map", seed), len(pool))[:MAP_POINTS])
    at = (pool.take(chosen).double() - mean) @ axes[:, -2:].flip(1)
    at = at * at.gather(0, at.abs().argmax(dim=0, keepdim=True)).sign()
    spread = spread.clamp_min(0)
    whole = float(spread.sum())
    # The spread of equal rows is rounding.
    shares = (spread[-2:].flip(0) / whole).tolist() if whole > 1e-9 else [0.0, 0.0]
    return {"rows": chosen.tolist(), "x": at[:, 0].tolist(), "y": at[:, 1].tolist(), "shares": shares}


def clusters(pool: Pool, wanted: int | Path | None, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Each row's cluster, int64 [N], with sizes and the rows nearest to the centroids of the clusters at both ends.

    wanted: how many (None: 1 % of the rows, at most MOST_CLUSTERS), or a file that `gvendi cluster` wrote.
    """
    fitted = len(pool)
    if wanted is not None and not isinstance(wanted, int):
        label, cosine = _read_clusters(wanted, pool)
        sizes = np.bincount(label)
    else:
        count = max(1, min(MOST_CLUSTERS, len(pool) // 100)) if wanted is None else wanted
        model, source = SphericalKMeans(count, seed=seed), pool
        if len(pool) > max(CLUSTER_ROWS, 8 * count):
            fitted = max(CLUSTER_ROWS, 8 * count)
            chosen = order(stream("clusters", seed), len(pool))[:fitted]
            source = MatrixPool(pool.take(np.sort(chosen)))
        nearest = model.fit(source).assign(pool)
        label, cosine = nearest.label.numpy(), nearest.cosine.numpy()
        sizes = np.bincount(label, minlength=count)
    by_size = np.argsort(-sizes, kind="stable")
    by_size = by_size[sizes[by_size] > 0]
    both = len(by_size) > 2 * SHOWN_CLUSTERS
    ends = {"largest": by_size[:SHOWN_CLUSTERS] if both else by_size, "sparsest": by_size[-SHOWN_CLUSTERS:]}
    if not both:
        ends["sparsest"] = by_size[:0]
    sparse = sparse_clusters(sizes).numpy()
    result: dict[str, Any] = {
        "clusters": len(sizes),
        "file": None if wanted is None or isinstance(wanted, int) else str(wanted),
        "fitted_rows": fitted,
        "sizes": sizes.tolist(),
        "mean_cosine": float(cosine.mean()),
        "sparse": int(sparse.sum()),
        "sparse_rows": int(sizes[sparse].sum()),
    }
    for name, numbers in ends.items():
        result[name] = [_cluster(int(c), label, cosine) for c in numbers]
    return label, result


def duplicates(pool: Pool) -> dict[str, Any] | None:
    """Rows whose cosine to another one is at least 0.99: counts, the histogram of the cosine to the nearest other row.

    `repeats` counts the rows that have such a row before them: leaving them out leaves one of each. A family is a row
    without such a row before it and all rows that lead back to it. None for one row or more than DUPLICATE_ROWS.
    """
    n = len(pool)
    if not 1 < n <= DUPLICATE_ROWS:
        return None
    rows = torch.cat([block for _, block in pool.blocks()])
    nearest, root = np.empty(n), np.arange(n)
    for first in range(0, n, DUPLICATE_BLOCK):
        cosine = rows[first : first + DUPLICATE_BLOCK] @ rows.T
        cosine.diagonal(first).fill_(-2)
        nearest[first : first + len(cosine)] = cosine.max(dim=1).values.numpy()
        # Of equal values argmax takes the first: the earliest row that is as near.
        earliest = (cosine >= DUPLICATE_COSINE).int().argmax(dim=1).numpy()
        for row in np.flatnonzero(nearest[first : first + len(cosine)] >= DUPLICATE_COSINE) + first:
            if earliest[row - first] < row:
                root[row] = root[earliest[row - first]]
    families, sizes = np.unique(root, return_counts=True)
    largest = [i for i in np.argsort(-sizes, kind="stable")[:SHOWN_FAMILIES] if sizes[i] > 1]
    # Two of each family can be compared.
    pairs = [np.flatnonzero(root == families[i])[:2].tolist() for i in largest]
    return {
        "cosine": DUPLICATE_COSINE,
        "rows": int((nearest >= DUPLICATE_COSINE).sum()),
        "repeats": int((root != np.arange(n)).sum()),
        "families": [
            {"size": int(sizes[i]), "rows": [{"row": row} for row in pair]}
            for i, pair in zip(largest, pairs, strict=True)
        ],
        **_histogram(np.clip(nearest, -1, 1)),
    }


def _cluster(number: int, label: np.ndarray, cosine: np.ndarray) -> dict[str, Any]:
    members = np.flatnonzero(label == number)
    nearest = members[np.argsort(-cosine[members], kind="stable")[:SHOWN_ROWS]]
    return {
        "cluster": number,
        "size": len(members),
        "mean_cosine": float(cosine[members].mean()),
        "rows": [{"row": int(i), "cosine": float(cosine[i])} for i in nearest],
    }


def _read_clusters(path: Path, pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = "wanted a file that 'gvendi cluster' wrote, or a number of clusters"
    if not path.is_file():
        raise GvendiError(f"--clusters is '{path}', which is not a file; {wanted}")
    try:
        with named(path), open_file(path) as stream, pq.ParquetFile(stream) as file:
            schema = file.schema_arrow
            # A name that is missing or there twice has the index -1.
            if any(schema.get_field_index(name) < 0 for name in _CLUSTERS):
                raise GvendiError(f"--clusters: '{path}' has columns {', '.join(schema.names)}; {wanted}")
            table = file.read(columns=list(_CLUSTERS), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        # A number is the system's; without one it is the content.
        if getattr(error, "errno", None) is not None:
            raise
        raise GvendiError(f"--clusters: '{path}' cannot be read ({error}); {wanted}") from error
    for name, kinds in _CLUSTERS.items():
        if str(table[name].type) not in kinds or table[name].null_count:
            what = "nulls" if str(table[name].type) in kinds else str(table[name].type)
            raise GvendiError(f"--clusters: '{path}' has {what} in its column {name}; {wanted}")
    cluster, cosine = table["cluster"].to_numpy(), table["cosine"].to_numpy()
    # Not finite is not within it either.
    if not ((cluster >= 0) & (cluster < len(cluster)) & (np.abs(cosine) <= 1 + LENGTH)).all():
        raise GvendiError(
            f"--clusters: '{path}' has a cluster that is not from 0 to {len(cluster) - 1}, or a cosine that is not "
            f"from -1 to 1; {wanted}"
        )
    place = {name: i for i, name in enumerate(table["id"].to_pylist())}
    places = [place.get(name, -1) for name in pool.ids]
    if -1 in places or len(cluster) != len(places):
        raise GvendiError(
            f"--clusters: the {len(cluster)} ids in '{path}' are not those of the run's {len(places)} rows; "
            "run 'gvendi cluster' on this run directory again"
        )
    return cluster[places], cosine[places]


def _histogram(values: np.ndarray) -> dict[str, list]:
    low, high = float(values.min()), float(values.max())
    # Values that differ by rounding only fill one bar, not forty.
    if high - low < 1e-3:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, bins=min(BINS, max(5, len(values) // 5)), range=(low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def row_numbers(data: Any) -> Iterator[dict[str, Any]]:
    """Every dict in `data` that names a single row by its number."""
    if isinstance(data, dict):
        if isinstance(data.get("row"), int):
            yield data
        for value in data.values():
            yield from row_numbers(value)
    elif isinstance(data, list):
        for value in data:
            if isinstance(value, dict):
                yield from row_numbers(value)
