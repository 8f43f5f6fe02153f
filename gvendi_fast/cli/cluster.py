"""`gvendi cluster`: spherical k-means of a run directory, written by id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gvendi_fast.base.errors import keeping
from gvendi_fast.base.files import atomic_write, make_folder, two_outputs
from gvendi_fast.base.printing import note, put, put_json
from gvendi_fast.base.shown import shown
from gvendi_fast.cli.options import EngineOptions, Json, RunDir, path_or_url, unbundled, warn_unfinished

if TYPE_CHECKING:
    from gvendi_fast.clusters.kmeans import Assignment, SphericalKMeans
    from gvendi_fast.data.pool import Pool


@unbundled
def cluster(
    directory: RunDir,
    engines: EngineOptions,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            parser=path_or_url,
            metavar="FILE.parquet",
            help="Where the cluster of each row is written: id, cluster, cosine, second_cluster, second_cosine. The "
            "centroids are written beside it, under the same name with .safetensors.",
        ),
    ],
    clusters: Annotated[
        int | None,
        typer.Option(
            "--clusters",
            metavar="C",
            min=1,
            help="Number of clusters. (Default: 1 % of the rows, at least one.)",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", metavar="S", help="Seed of the first centroids; the same seed gives the same clusters."
        ),
    ] = 0,
    max_iterations: Annotated[
        int,
        typer.Option(
            "--max-iterations", metavar="N", min=1, help="Stop after so many updates of the centroids."
        ),
    ] = 50,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="T",
            min=0.0,
            help="Stop before that when an update raises the mean cosine of rows and centroids by no more than this.",
        ),
    ] = 1e-5,
    center: Annotated[
        bool,
        typer.Option(
            "--center",
            help="Cluster rows without their mean direction, scaled to length 1 again; rows that equal the mean are in "
            "no cluster and not in the file. (The paper clusters rows as they are.)",
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Overwrite --out and the file beside it; without it they are an error."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Group rows whose gradients point the same way: spherical k-means of a run's sketches.

    A cluster is a kind of training signal. The cosine says how typical a row
    is of its cluster, and the second cluster is the next nearest: a row with
    two similar cosines lies between both. Sparse clusters are the smallest
    half by size: kinds of which the corpus has few rows.

    The result does not depend on the order of the rows. Memory is bounded for
    runs of any size: sketches are read block by block, once per iteration.

    Example: gvendi cluster runs/mine --clusters 200 --out clusters.parquet
    """
    from gvendi_fast.clusters.kmeans import SphericalKMeans
    from gvendi_fast.data.pool import as_pool
    from gvendi_fast.data.run_directory import RunDirectory
    from gvendi_fast.vendi.centered_pool import CenteredPool

    with engines.over(directory) as engine:
        # What the first rank may have written by now is no error.
        _, centroids = two_outputs(out, ".parquet", ".safetensors", force or not engine.is_first)
        run = RunDirectory.load(directory)
        if engine.is_first:
            warn_unfinished(run)
        pool = CenteredPool(run, engine=engine) if center else as_pool(run)
        model = SphericalKMeans(clusters, seed=seed, max_iterations=max_iterations, tolerance=tolerance)
        model.fit(pool, progress=_say if engine.is_first else None, engine=engine)
        assignment = model.assign(pool, engine)
    if not engine.is_first:
        return
    make_folder(out.parent)
    model.save(centroids)
    _write(out, pool, assignment)
    summary = _summary(model, len(pool), out, centroids)
    summary |= {"left_out": pool.left_out} if isinstance(pool, CenteredPool) else {}
    with keeping(lambda _: f"the clusters are in '{out}', the centroids in '{centroids}'"):
        if as_json:
            put_json(summary)
        else:
            _print(summary)


def _say(iteration: int, objective: float, empty: int) -> None:
    also = f", {empty:,} empty" if empty else ""
    note(f"iteration {iteration}: mean cosine {shown(objective, '.6f')}{also}")


def _write(out: Path, pool: Pool, assignment: Assignment) -> None:
    """Rows in the order of the pool; with one cluster the second columns are null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gvendi_fast.data.strings import arrow_strings

    none = (assignment.second < 0).numpy()
    table = pa.table(
        {
            "id": arrow_strings(pool.ids),
            "cluster": pa.array(assignment.label.numpy()),
            "cosine": pa.array(assignment.cosine.numpy()),
            "second_cluster": pa.array(assignment.second.numpy(), mask=none),
            "second_cosine": pa.array(assignment.second_cosine.numpy(), mask=none),
        }
    )
    with atomic_write(out) as stream:
        pq.write_table(table, stream)


def _summary(model: SphericalKMeans, rows: int, out: Path, centroids: Path) -> dict[str, Any]:
    from gvendi_fast.clusters.kmeans import sparse_clusters

    sizes, sparse = model.counts, sparse_clusters(model.counts)
    return {
        "n": rows,
        "dim": model.centroids.shape[1],
        "clusters": len(sizes),
        "seed": model.seed,
        "mean_cosine": model.objective,
        "iterations": model.iterations,
        "converged": model.converged,
        "largest": int(sizes.max()),
        "smallest": int(sizes.min()),
        "sparse": int(sparse.sum()),
        "sparse_rows": int(sizes[sparse].sum()),
        "sizes": sizes.tolist(),
        "out": str(out),
        "centroids": str(centroids),
    }


def _print(summary: dict[str, Any]) -> None:
    steps = f"{summary['iterations']} iterations, {'converged' if summary['converged'] else 'not converged'}"
    lines = {
        "rows": f"{summary['n']:,} in {summary['clusters']:,} cluster{'s' * (summary['clusters'] != 1)}, "
        f"seed {summary['seed']}",
        "mean cosine": f"{shown(summary['mean_cosine'], '.4f')} after {steps}",
        "sizes": f"largest {summary['largest']:,}, smallest {summary['smallest']:,}",
        # The smaller half by rank is never empty, though nothing may be sparse.
        "sparse clusters": f"{summary['sparse']:,} with {summary['sparse_rows']:,} rows"
        if summary["smallest"] < summary["largest"]
        else "none: all have the same size",
        "written": f"{summary['out']}, {summary['centroids']}",
    }
    if "left_out" in summary:
        rows = f"less their mean; {summary['left_out']:,} equal to it left out"
        lines = {"rows": lines.pop("rows"), "centred": rows, **lines}
    for name, value in lines.items():
        put(f"{name:<17}{value}")
