"""What the sketch dimension K does to G-Vendi, and how well its value for unlimited K is told from one K.

    python -m benchmarks.studies.sketch_dimension --data ../shared/data --out benchmarks/results/sketch_dimension.json

Populations: known spectra, sketched by dense Gaussian matrices, and texts under small models, sketched by the package;
in both the truth is the Gram matrix of exact gradients. --runs adds run directories of larger models whose K is large
(8192): there the value for unlimited K of all coordinates stands for the truth, and each block of coordinates is a
sketch of its own. Printed per population and K, in the mean over sketches: the error of the plain value, of the
extrapolations 2 G_K - G_(K/2) and (8 G_K - 6 G_(K/2) + G_(K/4)) / 3, and of `unlimited_k`; how often its interval
covers the truth; and the same for order 2.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.environment import describe_machine
from benchmarks.studies.fidelity import exact_gradients, sketch_all
from gvendi_fast import GradientSketcher, SketchSpec, gvendi, load_proxy
from gvendi_fast.data.index import index_corpus, read_unit
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.spectrum import renyi_entropy
from gvendi_fast.sketching.proxy.encode import Encoder, Sample
from gvendi_fast.vendi import VendiState, unlimited_k

SOURCES = ("bbh_cot/bbh_cot.jsonl.gz", "gsm8k/train.jsonl", "esnli/dev.jsonl.gz", "aqua_rat/dev.jsonl")
# Coordinates of the gradients with known spectra, and rows of them.
COORDINATES, ROWS = 1500, 400
DIMS = (128, 256, 512, 1024)
ORDERS = (1, 2)


def spectra() -> dict[str, torch.Tensor]:
    """{name: unit gradients float64 [ROWS, P]} whose covariance has this spectrum in expectation."""
    k = torch.arange(1, COORDINATES + 1, dtype=torch.float64)
    scales = {
        "k^-0.5": k**-0.5,
        "k^-1": k**-1,
        "k^-1.3": k**-1.3,
        "exponential": torch.exp(-k / 60),
        "flat, 300 directions": torch.ones(300, dtype=torch.float64),
        "common direction and flat": torch.ones(COORDINATES, dtype=torch.float64),
    }
    rows = {}
    for seed, (name, scale) in enumerate(scales.items()):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(ROWS, len(scale), generator=generator, dtype=torch.float64) * scale.sqrt()
        x = torch.nn.functional.normalize(x)
        if name.startswith("common"):
            # A mean cosine of 0.1.
            x = torch.cat([x * 0.9**0.5, torch.full((ROWS, 1), 0.1**0.5, dtype=torch.float64)], dim=1)
        rows[name] = x
    return rows


def gaussian_sketches(rows: torch.Tensor, seeds: int) -> list[torch.Tensor]:
    """[N, max(DIMS)] for each seed."""
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        found.append(rows @ torch.randn(rows.shape[1], max(DIMS), generator=generator, dtype=torch.float64))
    return found


def mixed_samples(data: Path, encoder: Encoder, count: int) -> list[tuple[str, Sample]]:
    """About `count` samples in equal parts from SOURCES, evenly spread over each file; (source, sample)."""
    wanted, found = count // len(SOURCES), []
    for source in SOURCES:
        manifest = index_corpus([data / source])
        rows = [row for unit in manifest.units for row in read_unit(manifest, unit) if hasattr(row, "prompt")]
        # Rows that are too long for the model drop out, so more are taken than wanted.
        picked = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), 3 * wanted)).astype(int)]
        samples = [s for s in encoder.encode(picked) if isinstance(s, Sample)]
        step = max(1.0, len(samples) / wanted)
        found += [(source.split("/")[0], samples[int(i * step)]) for i in range(min(wanted, len(samples)))]
    return found


def blocks(sketch: torch.Tensor, dim: int, most: int) -> Iterator[torch.Tensor]:
    """Sketches of `dim` coordinates, cut out of a larger one, up to `most` of them."""
    for i in range(min(most, sketch.shape[1] // dim)):
        yield sketch[:, i * dim : (i + 1) * dim]


def measure(sketches: Sequence[torch.Tensor], truth: dict[int, float], dim: int) -> dict[str, dict]:
    """Errors of every way to tell the value for unlimited K, over all sketches of this dimension."""
    errors: dict[str, list[float]] = {}
    inside: dict[int, list[bool]] = {q: [] for q in ORDERS}
    unseen = []
    for z in (block for sketch in sketches for block in blocks(sketch, dim, 2)):
        state = VendiState(dim).update(z)
        for q in ORDERS:
            found, exact = unlimited_k(state, q=q), truth[q]
            inside[q].append(found.low <= exact <= found.high)
            _note(errors, f"plain, order {q}", found.plain / exact)
            _note(errors, f"unlimited K, order {q}", found.value / exact)
            if q == 1:
                unseen.append(found.unseen)
                half = np.mean([gvendi(part) for part in blocks(z, dim // 2, 2)])
                quarter = np.mean([gvendi(part) for part in blocks(z, dim // 4, 4)])
                _note(errors, "2 G_K - G_(K/2)", (2 * found.plain - half) / exact)
                _note(errors, "three values of K", (8 * found.plain - 6 * half + quarter) / 3 / exact)
    summary = {
        name: {
            "mean": float(np.mean(e)),
            "sd": float(np.std(e, ddof=1)),
            "rms": float(np.sqrt(np.mean(np.square(e)))),
        }
        for name, e in errors.items()
    }
    cover = {f"order {q}": [int(sum(inside[q])), len(inside[q])] for q in ORDERS}
    return {"errors": summary, "covered": cover, "not seen": float(np.mean(unseen))}


def _note(errors: dict[str, list[float]], name: str, ratio: float) -> None:
    errors.setdefault(name, []).append(float(ratio) - 1)


def exact_values(gram: torch.Tensor) -> dict[int, float]:
    """{q: G-Vendi} of unit gradients with these inner products [N, N]."""
    eigenvalues = torch.linalg.eigvalsh(gram.double()).clamp_min(0)
    return {q: math.exp(renyi_entropy(eigenvalues / eigenvalues.sum(), q)) for q in ORDERS}


def of_model(
    name: str, data: Path, samples: int, seeds: int
) -> Iterator[tuple[str, dict, list[torch.Tensor], int]]:
    """(population, truth, sketches, n) of the mixed texts and of each source alone, under a small model."""
    proxy = load_proxy(name, dtype="float32")
    longest = min(512, proxy.model.config.max_position_embeddings)
    pairs = mixed_samples(data, Encoder(proxy.tokenizer, longest), samples)
    rows = [sample for _, sample in pairs]
    exact = exact_gradients(proxy.model, rows)
    gram = (exact @ exact.T).double()
    sketches = [
        sketch_all(GradientSketcher(proxy.model, SketchSpec(max(DIMS), seed=seed)), rows)
        for seed in range(seeds)
    ]
    model, sources = Path(name).name, np.array([source for source, _ in pairs])
    yield f"{model}: four sources", exact_values(gram), sketches, len(rows)
    for source in sorted(set(sources)):
        at = np.flatnonzero(sources == source)
        yield f"{model}: {source}", exact_values(gram[np.ix_(at, at)]), [z[at] for z in sketches], len(at)


def of_run(path: Path) -> tuple[str, dict, list[torch.Tensor], int]:
    """The same of a run directory, whose own value for unlimited K is the truth."""
    run = RunDirectory.load(path)
    rows = torch.from_numpy(np.concatenate([part.sketches for part in run.iterate(["sketch"])]))
    state = VendiState(rows.shape[1]).update(rows)
    truth = {q: unlimited_k(state, q=q).value for q in ORDERS}
    name = f"{run.spec['proxy']['name']}: {path.name} (truth from K = {rows.shape[1]})"
    return name, truth, list(rows.split(2 * max(DIMS), dim=1)), len(rows)


def main() -> None:
    """Run and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with bbh_cot, gsm8k, esnli, aqua_rat, models"
    )
    parser.add_argument("--samples", type=int, default=192, help="of texts")
    parser.add_argument("--seeds", type=int, default=3, help="of sketches of texts")
    parser.add_argument("--gaussian-seeds", type=int, default=10, help="of sketches of known spectra")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="run directories of a large K")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    start, populations = time.perf_counter(), []

    def take(name: str, truth: dict, sketches: Sequence[torch.Tensor], n: int) -> None:
        for dim in DIMS:
            found = measure(sketches, truth, dim)
            populations.append({"population": name, "n": n, "dim": dim, "gvendi": truth, **found})
            errors = {key: f"{100 * e['mean']:+.1f} %" for key, e in found["errors"].items()}
            print(f"{name}, n = {n}, K = {dim}, G = {truth[1]:.1f}: {errors} {found['covered']}", flush=True)

    for name, rows in spectra().items():
        take(
            f"spectrum {name}",
            exact_values(rows @ rows.T),
            gaussian_sketches(rows, args.gaussian_seeds),
            len(rows),
        )
    for model in ("tiny", str(args.data / "models" / "stories260K")):
        for found in of_model(model, args.data, args.samples, args.seeds):
            take(*found)
    for path in args.runs:
        take(*of_run(path))
    result = {
        "machine": describe_machine(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "seeds": {"texts": args.seeds, "spectra": args.gaussian_seeds},
        "populations": populations,
    }
    print(f"{time.perf_counter() - start:.0f} s")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
