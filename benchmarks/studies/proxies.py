"""Whether proxies rank data alike, and which kinds of layers, which K and which centring make them agree most.

    python -m benchmarks.studies.proxies --data ../shared/data --cache FOLDER \\
        --proxy smollm2=PATH --proxy gemma3=PATH --proxy stories260K=../shared/data/models/stories260K \\
        --proxy tiny=tiny --out benchmarks/results/proxies.json

benchmarks/results/tiny.json has `--variants plain centred` alone, of the real models, `tiny` and `former`: `tiny` as it
was when it had been trained on GSM8K, a folder of an earlier commit. That one is the `tiny` of proxies.json.

The pool: of each of BBH, GSM8K, e-SNLI and AQuA the rows of at most 500 characters, of these 96 by a seeded draw.
Every proxy sketches it once, with its sketches kept by kind of layer and half of the blocks, so that every variant is
a sum of what is stored. Then 200 mixtures of 90 rows are scored under every proxy and variant, and the Spearman
correlation of two proxies' scores says whether they rank data alike. A mixture draws rows one by one without putting
them back, by weights of their sources from a Dirichlet distribution (concentration 0.5).

Two intervals of 95 %. Over mixtures: percentiles of 2,000 bootstrap draws; what other mixtures of these rows would
give. Over rows: the jackknife of Fisher's z that leaves out one of twelve groups of rows (8 of each source) and takes
the mixtures from the rest by the same random numbers; what other rows of these sources would give.
K = 1024 is a quarter of the coordinates of K = 4096, drawn at random.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata, t

from benchmarks.environment import describe_machine
from gvendi_fast import GradientSketcher, SketchSpec, load_proxy
from gvendi_fast.base.draws import places_by_id
from gvendi_fast.data.index import index_corpus, read_unit
from gvendi_fast.sketching.gradients.layers import Cell, choose_groups
from gvendi_fast.sketching.proxy.encode import Encoder, Sample, batches, collate
from gvendi_fast.vendi.unlimited_k import of_spectrum

SOURCES = {
    "BBH": "bbh_cot/bbh_cot.jsonl.gz",
    "GSM8K": "gsm8k/train.jsonl",
    "e-SNLI": "esnli/dev.jsonl.gz",
    "AQuA": "aqua_rat/dev.jsonl",
}
MOST_CHARACTERS = 500
# Read as they are published; the others are small.
REAL = ("smollm2", "gemma3")
ROW_GROUPS = 12
BATCH_TOKENS = 2048
# (name, preset of layers, whether the pool's mean is taken out)
VARIANTS = (
    ("plain", "all", False),
    ("centred", "all", True),
    ("no embedding, no head", "no-embedding-or-head", False),
    ("no embedding, no head, centred", "no-embedding-or-head", True),
    ("no norms", "no-norm", False),
    ("attention alone", "attention", False),
    ("attention alone, centred", "attention", True),
    ("MLP alone", "mlp", False),
    ("MLP alone, centred", "mlp", True),
    ("first half of the blocks", "first-half", False),
    ("last half of the blocks", "last-half", False),
    ("last half of the blocks, centred", "last-half", True),
)
SMALL_DIM = 1024
# A task of fewer rows in the pool gets no figure.
FEWEST_ROWS = 6
DRAWS = 2000


@dataclass(frozen=True)
class Sketched:
    """A pool under one proxy. by_group: float32 [N, G, K]. cells, names: of the groups. about: of the proxy."""

    by_group: torch.Tensor
    cells: list[list[Cell]]
    names: list[str]
    about: dict[str, object]


def choose_rows(data: Path, each: int, sources: dict[str, str] = SOURCES) -> list:
    """`each` rows of every source in turn."""
    rows = []
    for source in sources.values():
        manifest = index_corpus([data / source])
        short = [
            row
            for unit in manifest.units
            for row in read_unit(manifest, unit)
            if hasattr(row, "prompt") and len(row.prompt) + len(row.completion) <= MOST_CHARACTERS
        ]
        if len(short) < each:
            raise SystemExit(
                f"{source} has {len(short)} rows of at most {MOST_CHARACTERS} characters, not {each}"
            )
        rows += [short[i] for i in places_by_id((row.id for row in short), each, seed=0)]
    return rows


def sketch_pool(name: str, where: str, rows: list, dim: int, seed: int, cache: Path) -> Sketched:
    """The pool's sketches by group under a proxy, from the cache if it holds them."""
    dtype = "bfloat16" if name in REAL else "float32"
    proxy = load_proxy(where, dtype=dtype)
    ids = [row.id for row in rows]
    about = {
        "revision": proxy.revision,
        "dtype": dtype,
        "parameters": sum(p.numel() for p in proxy.model.parameters()),
        "dim": dim,
        "seed": seed,
    }
    path = cache / f"{name}-{dim}-{seed}.npz"
    if path.exists():
        stored = np.load(path)
        meta = json.loads(str(stored["meta"]))
        if meta["about"] != about or meta["ids"] != ids:
            raise SystemExit(f"{path} is of another proxy or pool; delete it or give another --cache")
        cells = [[Cell(*cell) for cell in group] for group in meta["cells"]]
        return Sketched(torch.from_numpy(stored["by_group"]), cells, meta["names"], about)
    sketcher = GradientSketcher(proxy.model, SketchSpec(dim, seed=seed), groups="kind-and-half")
    samples = Encoder(proxy.tokenizer, proxy.model.config.max_position_embeddings).encode(rows)
    refused = [s for s in samples if not isinstance(s, Sample)]
    if refused:
        raise SystemExit(f"{name} cannot score row {refused[0].id}: {refused[0].reason}")
    # A row's ordinal within its work unit, which the order of batches goes by, is not unique here.
    place = {id(sample): i for i, sample in enumerate(samples)}
    groups = sketcher.groups
    out = torch.empty(len(samples), len(groups.names), dim)
    pad = proxy.tokenizer.pad_token_id or 0
    done = 0
    for batch in batches(samples, BATCH_TOKENS):
        out[[place[id(s)] for s in batch]] = sketcher.sketch(*collate(batch, pad)).by_group
        done += len(batch)
        print(f"{name}, seed {seed}: {done} of {len(samples)} rows", flush=True)
    cells = [[(cell.kind, cell.half) for cell in group] for group in groups.cells]
    meta = {"about": about, "ids": ids, "cells": cells, "names": list(groups.names)}
    cache.mkdir(parents=True, exist_ok=True)
    np.savez(path, by_group=out.numpy(), meta=json.dumps(meta))
    return Sketched(out, [list(group) for group in groups.cells], list(groups.names), about)


def rows_of(pool: Sketched, preset: str, centred: bool, dims: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
    """Unit rows float64 [n, K] of a variant, for the rows `kept` and the coordinates `dims`."""
    chosen = choose_groups(preset, pool.cells, pool.names)
    z = pool.by_group[kept][:, chosen].sum(1)[:, dims].double()
    unit = torch.nn.functional.normalize(z)
    return torch.nn.functional.normalize(unit - unit.mean(0)) if centred else unit


def draw_keys(count: int, each: int, sources: int = len(SOURCES)) -> np.ndarray:
    """float64 [count, N]: a mixture takes the rows with the largest keys (Efraimidis and Spirakis, 2006)."""
    generator = np.random.default_rng(0)
    weights = generator.dirichlet(np.full(sources, 0.5), size=count).clip(1e-9)
    words = generator.random((count, sources * each))
    return np.log(words) / np.repeat(weights, each, axis=1)


def scores(unit: torch.Tensor, keys: np.ndarray, size: int) -> np.ndarray:
    """G-Vendi of every mixture, float64 [S]: unit rows [n, K], keys [S, n]."""
    subsets = torch.from_numpy(np.sort(np.argsort(-keys, axis=1)[:, :size], axis=1))
    gram = unit @ unit.T
    values = torch.linalg.eigvalsh(gram[subsets[:, :, None], subsets[:, None, :]] / size).clamp_min(1e-300)
    return torch.exp(-(values * values.log()).sum(1)).numpy()


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of scores [..., S] each."""
    x, y = (rankdata(v, axis=-1) for v in (a, b))
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def agreement(
    a: np.ndarray, b: np.ndarray, without: list[tuple[np.ndarray, np.ndarray]] = ()
) -> dict[str, float]:
    """Spearman with both intervals; without: the two scores with each group of rows left out."""
    value = float(spearman(a, b))
    draws = np.random.default_rng(1).integers(0, len(a), (DRAWS, len(a)))
    low, high = np.quantile(spearman(a[draws], b[draws]), [0.025, 0.975])
    result = {"spearman": value, "low": float(low), "high": float(high)}
    if without:
        z = np.arctanh([float(spearman(*pair)) for pair in without])
        groups = len(z)
        half = float(
            t.ppf(0.975, groups - 1) * np.sqrt((groups - 1) / groups * np.square(z - z.mean()).sum())
        )
        middle = np.arctanh(value)
        result |= {
            "low over rows": float(np.tanh(middle - half)),
            "high over rows": float(np.tanh(middle + half)),
        }
    return result


def over_plain(
    variant: tuple[np.ndarray, np.ndarray], plain: tuple[np.ndarray, np.ndarray]
) -> dict[str, float]:
    """Spearman of the variant's scores minus that of plain ones, with 95 % over the same draws of mixtures."""
    draws = np.random.default_rng(1).integers(0, len(plain[0]), (DRAWS, len(plain[0])))
    differences = spearman(*(x[draws] for x in variant)) - spearman(*(x[draws] for x in plain))
    low, high = np.quantile(differences, [0.025, 0.975])
    return {
        "difference": float(spearman(*variant) - spearman(*plain)),
        "low": float(low),
        "high": float(high),
    }


def norm_shares(pool: Sketched) -> dict[str, float]:
    """{kind of layer: mean over rows of its share of the squared norm}."""
    squares = pool.by_group.double().square().sum(-1)
    shares = (squares / squares.sum(1, keepdim=True)).mean(0).tolist()
    found: dict[str, float] = {}
    for cells, share in zip(pool.cells, shares, strict=True):
        found[cells[0].kind] = found.get(cells[0].kind, 0.0) + share
    return found


def tasks_of(rows: list) -> list[str]:
    """The task of each row of BBH, read from its line; "" for the rows of other sources."""
    lines: dict[str, list[str]] = {}
    found = []
    for row in rows:
        file, line = row.id.rsplit(":", 1)
        if file not in lines:
            opened = gzip.open if file.endswith(".gz") else open
            with opened(file, "rt", encoding="utf-8") as stream:
                lines[file] = stream.read().splitlines()
        found.append(json.loads(lines[file][int(line) - 1])["meta"].get("task", ""))
    return found


def sets_of(pool: Sketched, tasks: list[str], each: int) -> dict[str, dict[str, float]]:
    """{source or task of BBH: n, G-Vendi plain, centred by the pool's mean, and for unlimited K}."""
    every, dims = np.arange(len(pool.by_group)), torch.arange(pool.by_group.shape[-1])
    plain, centred = (rows_of(pool, "all", word, dims, every) for word in (False, True))
    places = {name: every[i * each : (i + 1) * each] for i, name in enumerate(SOURCES)}
    for task in sorted(set(tasks) - {""}):
        places[f"BBH: {task.replace('_', ' ')}"] = np.array([i for i in every if tasks[i] == task])
    found = {}
    for name, kept in places.items():
        if len(kept) < FEWEST_ROWS:
            continue
        state = spectrum(plain[kept] @ plain[kept].T / len(kept))
        of = of_spectrum(state, entropy(state), len(kept), len(dims))
        found[name] = {
            "n": len(kept),
            "plain": float(np.exp(entropy(state))),
            "centred": float(np.exp(entropy(spectrum(centred[kept] @ centred[kept].T / len(kept))))),
            "unlimited_k": of.value,
            "low": of.low,
            "high": of.high,
        }
    return found


def spectrum(matrix: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of a Gram matrix of trace 1, none negative."""
    values = torch.linalg.eigvalsh(matrix).clamp_min(0)
    return values / values.sum()


def entropy(values: torch.Tensor) -> float:
    """Of eigenvalues, in nats."""
    return float(torch.special.entr(values).sum())


def study(pools: dict[str, Sketched], each: int, count: int, size: int, wanted: list[str]) -> list[dict]:
    """The figures of every variant whose name is wanted."""
    dim = next(iter(pools.values())).by_group.shape[-1]
    order = torch.from_numpy(np.random.default_rng(2).permutation(dim))
    small, rest, whole = order[:SMALL_DIM], order[SMALL_DIM:], torch.arange(dim)
    every = np.arange(len(SOURCES) * each)
    keys = draw_keys(count, each)
    plain = {
        name: scores(rows_of(pool, "all", False, whole, every), keys, size) for name, pool in pools.items()
    }
    pairs = list(itertools.combinations(pools, 2))
    results = []
    for variant, preset, centred in VARIANTS:
        if variant not in wanted:
            continue

        def of(dims: torch.Tensor, kept: np.ndarray = every, what=(preset, centred)) -> dict[str, np.ndarray]:
            return {
                name: scores(rows_of(pool, *what, dims, kept), keys[:, kept], size)
                for name, pool in pools.items()
            }

        large, few, others = of(whole), of(small), of(rest)
        left = [of(whole, every[every % ROW_GROUPS != group]) for group in range(ROW_GROUPS)]
        results.append(
            {
                "variant": variant,
                "layers": preset,
                "centred": centred,
                f"K = {dim}": {
                    f"{a} / {b}": agreement(large[a], large[b], [(x[a], x[b]) for x in left])
                    for a, b in pairs
                },
                "over plain": {
                    f"{a} / {b}": over_plain((large[a], large[b]), (plain[a], plain[b])) for a, b in pairs
                },
                f"K = {SMALL_DIM}": {f"{a} / {b}": agreement(few[a], few[b]) for a, b in pairs},
                "with its own at disjoint coordinates": {
                    name: agreement(few[name], others[name]) for name in pools
                },
                "with plain at the largest K": {name: agreement(few[name], plain[name]) for name in pools},
                "median G-Vendi": {name: float(np.median(large[name])) for name in pools},
            }
        )
        print(variant, {k: round(v["spearman"], 3) for k, v in results[-1][f"K = {dim}"].items()}, flush=True)
    return results


def main() -> None:
    """Sketch, compare, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with bbh_cot, gsm8k, esnli, aqua_rat"
    )
    parser.add_argument(
        "--proxy",
        action="append",
        required=True,
        metavar="NAME=WHERE",
        help="the first is compared with the others",
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps the sketches")
    parser.add_argument("--each", type=int, default=96, help="rows of every source")
    parser.add_argument("--subsets", type=int, default=200)
    parser.add_argument("--size", type=int, default=90, help="rows of a subset")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0, help="of the sketch")
    every = [name for name, _, _ in VARIANTS]
    parser.add_argument("--variants", nargs="*", default=every, choices=every, help="which (default: all)")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON; without it only sketch")
    args = parser.parse_args()
    rows = choose_rows(args.data, args.each)
    proxies = dict(given.split("=", 1) for given in args.proxy)
    pools = {
        name: sketch_pool(name, where, rows, args.dim, args.seed, args.cache)
        for name, where in proxies.items()
    }
    if args.out is None:
        return
    result = {
        "machine": describe_machine(),
        "pool": {"sources": list(SOURCES), "rows": len(rows), "most characters": MOST_CHARACTERS, "seed": 0},
        "mixtures": {"count": args.subsets, "rows": args.size, "seed": 0},
        "dims": [SMALL_DIM, args.dim],
        "proxies": {name: {**pool.about, "norm shares": norm_shares(pool)} for name, pool in pools.items()},
        "sets": {name: sets_of(pool, tasks_of(rows), args.each) for name, pool in pools.items()},
        "variants": study(pools, args.each, args.subsets, args.size, args.variants),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
