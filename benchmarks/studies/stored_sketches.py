"""What it costs to store sketches in a half or a quarter of the bytes: cosines, G-Vendi, chosen rows and clusters.

    python -m benchmarks.studies.stored_sketches --data ../shared/data --proxy FOLDER --runs FOLDER
    python -m benchmarks.studies.stored_sketches --rates    # the rates of reading and writing alone, on a quiet machine

The rows: of each of BBH, GSM8K, e-SNLI and AQuA those of at most 500 characters, of these `--each` by a seeded draw, in
a seeded order; of that order the first `--rows`. They are sketched once, in float32, and a study that was interrupted
goes on. Copies of the run directory have the same sketches in the other stores, and everything is compared with
float32: cosines between all pairs of rows, G-Vendi, the rows that `select` chooses, what those score by their float32
sketches, the nearest of the float32 run's centroids, and clusters of their own. Those begin with rows drawn by the
sketches' bits, so that other roundings are other draws, as two seeds are: the index between two seeds stands beside.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.environment import ROOT, describe_machine
from benchmarks.studies.proxies import MOST_CHARACTERS, SOURCES
from gvendi_fast import SketchSpec, load_proxy, select, sketch
from gvendi_fast.analysis.scoring import score_run
from gvendi_fast.base.draws import places_by_id
from gvendi_fast.base.progress import Silent
from gvendi_fast.clusters.kmeans import SphericalKMeans
from gvendi_fast.data.index import Fields
from gvendi_fast.data.parts import COLUMNS, OPTIONAL, Part
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.stored_sketches import STORES, coded, decoded
from gvendi_fast.sketching.corpus import Settings
from gvendi_fast.vendi import gvendi

OUT = ROOT / "benchmarks" / "results" / "stored_sketches.json"
DIM, CLUSTERS, SHARE, UNIT_ROWS = 1024, 32, 0.1, 64
METHODS = ("lazy", "relaxed")
# Of a row's largest element: int8 would reach so far, and cut off what is larger.
REACHES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
RATE_ROWS, RATE_PARTS, ROUNDS = 512, 8, 9


class Saying(Silent):
    """Says how far the sketching is."""

    def __init__(self) -> None:
        self.rows = 0

    def start(self, rows: int, done: int) -> None:
        self.rows = done

    def advance(self, rows: int, tokens: int, rejected: int) -> None:
        self.rows += rows
        print(f"{self.rows} rows are sketched", flush=True)


def draw_rows(data: Path, each: int) -> list[dict]:
    """Up to `each` short rows of every source, mixed."""
    rows = []
    for name, path in SOURCES.items():
        opened = gzip.open if path.endswith(".gz") else open
        with opened(data / path, "rt", encoding="utf-8") as stream:
            texts = [json.loads(line) for line in stream]
        short = [
            {"id": f"{name}:{i}", "source": name, "prompt": text["prompt"], "completion": text["completion"]}
            for i, text in enumerate(texts)
            if len(text["prompt"]) + len(text["completion"]) <= MOST_CHARACTERS
        ]
        rows += [short[i] for i in places_by_id((row["id"] for row in short), min(each, len(short)), seed=0)]
    return [rows[i] for i in places_by_id((row["id"] for row in rows), len(rows), seed=1)]


def stored_as(run: RunDirectory, store: str) -> RunDirectory:
    """A copy of a float32 run beside it, in another store."""
    copy = RunDirectory.open(run.path.with_name(store), {**run.spec, "store": store}, run.manifest)
    for part in run.iterate([*COLUMNS, *OPTIONAL]):
        copy.write_part(part)
    return copy


def unit(run: RunDirectory) -> torch.Tensor:
    """The sketches of a run as float64 rows of length 1."""
    z = np.concatenate([part.sketches for part in run.iterate(["sketch"])])
    return torch.nn.functional.normalize(torch.from_numpy(z).double())


def errors(z: torch.Tensor, cosines: torch.Tensor) -> dict[str, float]:
    """Of the cosines between all pairs of the unit rows z."""
    above = torch.triu_indices(len(z), len(z), 1)
    off = (z @ z.T - cosines)[above[0], above[1]]
    return {"rms": float(off.square().mean().sqrt()), "max": float(off.abs().max())}


def adjusted_rand(one: torch.Tensor, other: torch.Tensor) -> float:
    """The adjusted Rand index of two lists of labels."""
    table = torch.zeros(int(one.max()) + 1, int(other.max()) + 1, dtype=torch.float64)
    table.index_put_((one, other), torch.ones(len(one), dtype=torch.float64), accumulate=True)
    both, first, second = ((x * (x - 1) / 2).sum() for x in (table, table.sum(1), table.sum(0)))
    expected = first * second / (len(one) * (len(one) - 1) / 2)
    return float((both - expected) / ((first + second) / 2 - expected))


def found_of(run: RunDirectory) -> dict:
    """What the commands find in a run."""
    scored = score_run(run, by="source")
    n = scored.n
    kmeans = SphericalKMeans(CLUSTERS).fit(run)
    return {
        "bytes": sum(run.part_path(u).stat().st_size for u in run.done()) / n,
        "gvendi": {"all": scored.gvendi, **{name: group.gvendi for name, group in scored.by.items()}},
        "interval": [scored.low, scored.high],
        "chosen": {m: [int(i) for i in select(run, int(SHARE * n), method=m).rows] for m in METHODS},
        "kmeans": kmeans,
        "labels": kmeans.assign(run).label,
    }


def compare(found: dict, whole: dict, run: RunDirectory, z: torch.Tensor) -> dict:
    """A store's findings beside those of float32, whose unit rows are z."""
    result = {
        "bytes": found["bytes"],
        "gvendi change": {name: value / whole["gvendi"][name] - 1 for name, value in found["gvendi"].items()},
        "same nearest centroid": float(
            (whole["kmeans"].assign(run).label == whole["labels"]).double().mean()
        ),
        "adjusted rand": adjusted_rand(found["labels"], whole["labels"]),
    }
    for method in METHODS:
        chosen, wanted = found["chosen"][method], whole["chosen"][method]
        result[method] = {
            "same": len(set(chosen) & set(wanted)) / len(wanted),
            "gvendi change": gvendi(z[chosen]) / gvendi(z[wanted]) - 1,
        }
    return result


def reaches(z: torch.Tensor, cosines: torch.Tensor) -> dict[str, float]:
    """rms error of cosines where int8 reaches to a share of a row's largest element, and with each row's best share."""
    rows = z.numpy().astype(np.float32)
    peak = np.abs(rows).max(axis=1, keepdims=True)
    kept, lost, rms = [], [], {}
    for reach in REACHES:
        cut = np.clip(rows, -reach * peak, reach * peak)
        # What is cut off makes the cut row's largest element the one that the scale is taken of.
        kept.append(torch.nn.functional.normalize(torch.from_numpy(decoded(*coded(cut, "int8"))).double()))
        lost.append((kept[-1] - z).square().sum(1))
        rms[str(reach)] = errors(kept[-1], cosines)["rms"]
    best = torch.stack(lost).argmin(0)
    rms["best of each row"] = errors(torch.stack(kept)[best, torch.arange(len(z))], cosines)["rms"]
    return rms


def rates() -> dict[str, dict[str, float]]:
    """Millions of a sketch's float32 bytes a second that are read and written, checksums and all, in turns."""
    draw, size = np.random.default_rng(0), RATE_ROWS * DIM * 4 * RATE_PARTS / 1e6
    z = draw.standard_normal((RATE_ROWS, DIM)).astype(np.float32)
    column = np.ones(RATE_ROWS)
    times: dict[str, dict[str, list[float]]] = {store: {"write": [], "read": []} for store in STORES}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            store: RunDirectory.open(Path(folder) / store, {"sketch": {"dim": DIM}, "store": store})
            for store in STORES
        }
        for _ in range(ROUNDS + 1):
            for store, run in runs.items():
                start = time.perf_counter()
                for u in range(RATE_PARTS):
                    rows = np.arange(RATE_ROWS) + u * RATE_ROWS
                    run.write_part(Part(u, list(map(str, rows)), [""] * RATE_ROWS, rows, z, *[column] * 4))
                middle = time.perf_counter()
                for _ in run.iterate(["sketch"]):
                    pass
                times[store]["write"].append(middle - start)
                times[store]["read"].append(time.perf_counter() - middle)
    return {
        store: {what: size / float(np.median(seconds[1:])) for what, seconds in both.items()}
        for store, both in times.items()
    }


def measure(options: argparse.Namespace) -> dict:
    """Everything but the rates."""
    options.runs.mkdir(parents=True, exist_ok=True)
    rows = draw_rows(options.data, options.each)[: options.rows]
    corpus = options.runs / "rows.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    proxy = load_proxy(options.proxy, device="cpu")
    settings = Settings(
        spec=SketchSpec(DIM), unit_rows=UNIT_ROWS, fields=Fields(by="source"), store="float32"
    )
    run = sketch(str(corpus), out=options.runs / "float32", proxy=proxy, settings=settings, progress=Saying())
    z = unit(run)
    cosines, whole = z @ z.T, found_of(run)
    seeds = SphericalKMeans(CLUSTERS, seed=1).fit(run).assign(run).label
    stores = {}
    for store in STORES:
        copy = run if store == "float32" else stored_as(run, store)
        found = whole if copy is run else found_of(copy)
        stores[store] = {**compare(found, whole, copy, z), "cosine": errors(unit(copy), cosines)}
        print(store, json.dumps(stores[store]), flush=True)
    return {
        "proxy": {"revision": proxy.revision, "parameters": proxy.parameters},
        "rows": len(z),
        "chosen": int(SHARE * len(z)),
        "clusters": CLUSTERS,
        "dim": DIM,
        "gvendi": whole["gvendi"],
        "interval": whole["interval"],
        "stores": stores,
        "two seeds": adjusted_rand(seeds, whole["labels"]),
        "reaches": reaches(z, cosines),
        "machine": describe_machine(),
    }


def main() -> None:
    """Run the study, or its rates, and write what it found into its file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with bbh_cot, gsm8k, esnli, aqua_rat")
    parser.add_argument("--proxy", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--runs", type=Path, help="folder of the run directories")
    parser.add_argument("--each", type=int, default=460, help="rows of each source at most")
    parser.add_argument("--rows", type=int, help="how many of them (default: all)")
    parser.add_argument("--rates", action="store_true", help="only measure the rates of reading and writing")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found: dict = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.rates:
        found["rates"] = {"stores": rates(), "machine": describe_machine()}
    elif None in (options.data, options.proxy, options.runs):
        parser.error("--data, --proxy and --runs are needed without --rates")
    else:
        found |= measure(options)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
