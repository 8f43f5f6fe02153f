"""How faithful the sketches are: against exact per-sample gradients of a small trained model on real text.

    python -m benchmarks.studies.fidelity --data ../shared/data --out benchmarks/results/fidelity.json

Prints, per seed and in the mean: the root-mean-square error of the cosines between samples, the Spearman correlation
of G-Vendi over random subsets with that of the exact gradients, and its relative error; the same for a dense
Rademacher matrix at equal dimension, and for bfloat16 weights. Exact gradients of every sample are held in memory,
so the model must be small.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.environment import describe_machine
from gvendi_fast import GradientSketcher, SketchSpec, gvendi, load_proxy
from gvendi_fast.data.index import index_corpus, read_unit
from gvendi_fast.sketching.proxy.encode import Encoder, Sample, batches, collate

SOURCES = ("gsm8k/train.jsonl", "bbh_cot/bbh_cot.jsonl.gz", "esnli/dev.jsonl.gz")


def load_samples(data: Path, encoder: Encoder, count: int) -> list[tuple[str, Sample]]:
    """About `count` samples in equal parts from the sources, evenly spread over each file; (source, sample)."""
    found = []
    for source in SOURCES:
        manifest = index_corpus([data / source])
        rows = [row for unit in manifest.units for row in read_unit(manifest, unit) if hasattr(row, "prompt")]
        wanted = count // len(SOURCES)
        # Rows that are too long for the model's context drop out, so more are taken than wanted.
        picked = [rows[i] for i in np.linspace(0, len(rows) - 1, 2 * wanted).astype(int)]
        samples = [s for s in encoder.encode(picked) if isinstance(s, Sample)]
        step = max(1.0, len(samples) / wanted)
        found += [(source, samples[int(i * step)]) for i in range(min(wanted, len(samples)))]
    return found


def exact_gradients(model: torch.nn.Module, samples: list[Sample]) -> torch.Tensor:
    """float32 [N, P]: the unit-length gradient of every sample over all parameters, by plain autograd."""
    parameters = list(model.parameters())
    out = torch.empty(len(samples), sum(p.numel() for p in parameters))
    for i, sample in enumerate(samples):
        ids, labels, _ = collate([sample], 0)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits[:-1], labels[0, 1:], ignore_index=-100, reduction="sum"
        )
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)], out=out[i])
    return torch.nn.functional.normalize(out)


def sketch_all(sketcher: GradientSketcher, samples: list[Sample]) -> torch.Tensor:
    """float32 [N, K], in the order of the samples."""
    place = {id(sample): i for i, sample in enumerate(samples)}
    out = torch.empty(len(samples), sketcher.spec.dim)
    for batch in batches(samples, 4096):
        out[[place[id(s)] for s in batch]] = sketcher(*collate(batch, 0))
    return out


def rademacher(exact: torch.Tensor, dim: int, seed: int) -> torch.Tensor:
    """Project materialised gradients by a dense sign matrix, a block of coordinates at a time."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(len(exact), dim)
    for start in range(0, exact.shape[1], 8192):
        block = exact[:, start : start + 8192]
        signs = torch.randint(0, 2, (block.shape[1], dim), generator=generator, dtype=torch.int8)
        out += block @ signs.float().mul_(2).sub_(1)
    return out


def make_subsets(sources: list[str], count: int, size: int) -> list[np.ndarray]:
    """Subsets of equal size from narrow to broad: a random mixture of sources with a random share of repeats."""
    generator = np.random.default_rng(0)
    names = sorted(set(sources))
    members = {name: np.flatnonzero(np.array(sources) == name) for name in names}
    subsets = []
    for _ in range(count):
        weights = generator.dirichlet(np.full(len(names), 0.5))
        parts = generator.multinomial(size, weights)
        pool = generator.uniform(0.15, 1.0)
        drawn = []
        for name, part in zip(names, parts, strict=True):
            narrow = generator.choice(members[name], max(1, int(pool * len(members[name]))), replace=False)
            drawn.append(generator.choice(narrow, part))
        subsets.append(np.concatenate(drawn))
    return subsets


def compare(sketch: torch.Tensor, cosines: torch.Tensor, subsets, wanted: np.ndarray) -> dict[str, float]:
    """The three figures for one set of sketches."""
    unit = torch.nn.functional.normalize(sketch.double())
    off_diagonal = ~torch.eye(len(unit), dtype=torch.bool)
    error = ((unit @ unit.T) - cosines)[off_diagonal]
    got = np.array([gvendi(unit[s]) for s in subsets])
    return {
        "cosine rms error": float(error.square().mean().sqrt()),
        "spearman of gvendi": float(spearmanr(got, wanted).statistic),
        "relative gvendi error": float((got / wanted - 1).mean()),
    }


def mean_and_spread(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """{figure: {"mean", "sd", "min", "max"}} over seeds."""
    table = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        table[name] = {
            "mean": float(values.mean()),
            "sd": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
            "min": float(values.min()),
            "max": float(values.max()),
        }
    return table


def bf16_against_fp32(fp32: torch.Tensor, bf16: torch.Tensor, subsets) -> dict[str, float]:
    """What bfloat16 weights do to the sketches of one seed."""
    cosine = torch.cosine_similarity(fp32.double(), bf16.double(), dim=1)
    ratio = np.array([gvendi(bf16[s]) / gvendi(fp32[s]) - 1 for s in subsets])
    return {
        "median cosine to float32": float(cosine.median()),
        "1st percentile of cosine": float(cosine.quantile(0.01)),
        "relative gvendi difference, mean": float(ratio.mean()),
        "relative gvendi difference, largest": float(np.abs(ratio).max()),
        "spearman of gvendi": float(
            spearmanr([gvendi(bf16[s]) for s in subsets], [gvendi(fp32[s]) for s in subsets]).statistic
        ),
    }


def main() -> None:
    """Run and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with gsm8k, bbh_cot, esnli and models"
    )
    parser.add_argument("--model", help="a small trained model [default: DATA/models/stories260K]")
    parser.add_argument("--samples", type=int, default=980)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--subsets", type=int, default=150)
    parser.add_argument("--subset-size", type=int, default=200)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    name = args.model or str(args.data / "models" / "stories260K")
    proxy = load_proxy(name, dtype="float32")
    pairs = load_samples(
        args.data, Encoder(proxy.tokenizer, proxy.model.config.max_position_embeddings), args.samples
    )
    sources, samples = [source for source, _ in pairs], [sample for _, sample in pairs]
    start = time.perf_counter()
    exact = exact_gradients(proxy.model, samples)
    cosines = exact.double() @ exact.double().T if exact.numel() < 4e8 else (exact @ exact.T).double()
    print(
        f"{len(samples)} samples, {exact.shape[1]:,} parameters, exact in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    subsets = make_subsets(sources, args.subsets, args.subset_size)
    # The Gram matrix of a subset has the spectrum of its covariance.
    wanted = np.array([gram_gvendi(cosines[np.ix_(s, s)]) for s in subsets])
    ours, dense, sketches = [], [], None
    for seed in range(args.seeds):
        spec = SketchSpec(args.dim, seed=seed)
        sketch = sketch_all(GradientSketcher(proxy.model, spec), samples)
        sketches = sketch if sketches is None else sketches
        ours.append(compare(sketch, cosines, subsets, wanted))
        dense.append(compare(rademacher(exact, args.dim, seed), cosines, subsets, wanted))
        print(f"seed {seed}: hadamard {ours[-1]}\n        rademacher {dense[-1]}", flush=True)
    half = load_proxy(name, dtype="bfloat16")
    bf16 = sketch_all(GradientSketcher(half.model, SketchSpec(args.dim)), samples)
    result = {
        "machine": describe_machine(),
        "model": Path(name).name,
        "samples": len(samples),
        "parameters": exact.shape[1],
        "subsets": args.subsets,
        "subset size": args.subset_size,
        "dim": args.dim,
        "gvendi of the subsets": {"min": float(wanted.min()), "max": float(wanted.max())},
        "hadamard": mean_and_spread(ours),
        "rademacher": mean_and_spread(dense),
        "bfloat16": bf16_against_fp32(sketches, bf16, subsets),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def gram_gvendi(gram: torch.Tensor) -> float:
    """G-Vendi of unit rows from their Gram matrix [n, n]."""
    eigenvalues = torch.linalg.eigvalsh(gram.double()) / len(gram)
    kept = eigenvalues[eigenvalues > 0]
    return float(torch.exp(-(kept * kept.log()).sum()))


if __name__ == "__main__":
    main()
