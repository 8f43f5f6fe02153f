"""Whether intervals and forecasts of G-Vendi hold: on known spectra, and on real rows that were held back.

    python -m benchmarks.studies.coverage [--runs DIR ...] [--only draws differences halves forecasts spectra]

draws        the interval for another draw of n rows, against all other draws of the same source; and the interval that
             stood here before, of unlimited data, against the source's own value
differences  the interval of a ratio at equal n, of equal and of unequal sources, against the ratio of mean draws
halves       the interval of one half of a run, against the other half
forecasts    n rows of a run, and 2n with as many that were held back: the forecast, its band and the truth
spectra      the same on known spectra, and what is said of unlimited data

--runs takes run directories of `gvendi sketch`, with any K from 1024 on; of more, 1024 coordinates are used, which are
a sketch too. Results of parts that are not run again stay in the file.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from benchmarks.corpora.spectra import sources
from benchmarks.environment import ROOT, describe_machine
from gvendi_fast.data.pool import as_pool
from gvendi_fast.vendi import Interval, VendiState, gvendi, jackknife
from gvendi_fast.vendi.gains import removals
from gvendi_fast.vendi.growth import growth

OUT = ROOT / "benchmarks" / "results" / "coverage.json"
DIM, TRIALS, TIMES = 64, 200, (0.5, 1, 2, 5, 20)
WIDTH, SPLITS = 1024, 20


def in_few_dimensions(rows: torch.Tensor) -> torch.Tensor:
    """The same angles between n rows in n coordinates, where those are fewer."""
    if len(rows) >= rows.shape[1]:
        return rows
    eigenvalues, vectors = torch.linalg.eigh(rows @ rows.T)
    return (vectors * eigenvalues.clamp_min(0).sqrt()).contiguous()


def interval_of(rows: torch.Tensor) -> Interval:
    """The interval for another draw of as many rows."""
    rows = in_few_dimensions(rows.double())
    return jackknife(VendiState(rows.shape[1]).update(rows), rows)


def old_interval(rows: torch.Tensor) -> tuple[float, float]:
    """What was printed before: H_J -+ 1.96 SE around the jackknife's estimate for unlimited data, clipped to [1, K]."""
    n, dim = rows.shape
    state = VendiState(dim).update(rows)
    change = torch.cat([change for change, _, _ in removals(state, rows)])
    middle = n * math.log(n) - (n - 1) * math.log(n - 1) + float(change.mean())
    reach = 1.959964 * float(change.std()) / math.sqrt(n)
    low, high = (math.exp(min(max(h, 0.0), math.log(dim))) for h in (middle - reach, middle + reach))
    return low, high


def draws(trials: int) -> list[dict]:
    """Coverage before and after by source and n."""
    found = []
    for name, draw in sources(DIM).items():
        generator = torch.Generator().manual_seed(1)
        # Of a list, no more rows than it has.
        truth = gvendi(draw(1600 if name.startswith("listed") else 40_000, generator))
        for times in TIMES:
            n = max(8, int(times * truth))
            if name.startswith("listed"):
                n = min(n, 800)
            rows = [draw(n, generator) for _ in range(trials)]
            new, old = [interval_of(x) for x in rows], [old_interval(x) for x in rows]
            value = np.array([i.value for i in new])
            inside = [(value >= i.low - 1e-9) & (value <= i.high + 1e-9) for i in new]
            # A draw does not count for itself.
            after = (np.sum(inside) - trials) / (trials * (trials - 1))
            before = np.mean([low <= truth <= high for low, high in old])
            half = np.median([(i.high - i.low) / 2 / i.value for i in new])
            found.append(
                {
                    "source": name,
                    "times": times,
                    "n": n,
                    "unlimited": truth,
                    "mean": float(value.mean()),
                    "before": float(before),
                    "after": float(after),
                    "half width": float(half),
                    "trials": trials,
                }
            )
            print(found[-1], flush=True)
    return found


def differences(trials: int) -> list[dict]:
    """Coverage of the interval of a ratio at equal n; its truth is the ratio of geometric means over all draws."""
    from gvendi_fast.analysis.compare import difference

    found = []
    for n in (60, 240):
        of = {}
        for name, draw in sources(DIM).items():
            generator = torch.Generator().manual_seed(2)
            of[name] = [interval_of(draw(n, generator)) for _ in range(trials)]
        for kind in ("equal", "unequal"):
            shares = []
            for i, first in enumerate(of):
                second = first if kind == "equal" else list(of)[(i + 1) % len(of)]
                log_mean = [np.mean([math.log(x.value) for x in of[name]]) for name in (first, second)]
                truth, inside = math.exp(log_mean[0] - log_mean[1]), 0
                for k in range(trials):
                    d = difference("a", of[first][k], "b", of[second][(k + 1) % trials])
                    inside += d.ratio_low <= truth <= d.ratio_high
                shares.append(inside / trials)
            found.append(
                {
                    "kind": kind,
                    "n": n,
                    "pairs": len(shares),
                    "mean": float(np.mean(shares)),
                    "least": min(shares),
                    "most": max(shares),
                    "trials": trials,
                }
            )
            print(found[-1], flush=True)
    return found


def real_rows(runs: list[Path]) -> dict[str, torch.Tensor]:
    """Unit rows [N, 1024] by name of run, and mixtures of the sources of each proxy."""
    found = {}
    for path in runs:
        pool = as_pool(path)
        rows = torch.cat([block for _, block in pool.blocks()])[:, :WIDTH].double()
        found[path.name] = rows / rows.norm(dim=1, keepdim=True)
    for proxy in ("tiny", "stories260K", "smol"):
        alike = [rows for name, rows in found.items() if proxy in name]
        if len(alike) > 1:
            least = min(len(rows) for rows in alike)
            found[f"mix_{proxy}"] = torch.cat([rows[:least] for rows in alike])
    return found


def halves(rows_of: dict[str, torch.Tensor]) -> list[dict]:
    """Share of intervals that hold the score of as many other rows of the same run."""
    found = []
    for name, rows in rows_of.items():
        generator = torch.Generator().manual_seed(3)
        for n in sorted({40, 120, min(len(rows) // 2, 500)}):
            if 2 * n > len(rows):
                continue
            inside, half = [], []
            for _ in range(SPLITS):
                place = torch.randperm(len(rows), generator=generator)
                a, b = (interval_of(rows[p]) for p in (place[:n], place[n : 2 * n]))
                inside += [a.low <= b.value <= a.high, b.low <= a.value <= b.high]
                half += [(i.high - i.low) / 2 / i.value for i in (a, b)]
            found.append(
                {"run": name, "n": n, "inside": float(np.mean(inside)), "half width": float(np.median(half))}
            )
            print(found[-1], flush=True)
    return found


def forecast_of(rows: torch.Tensor, n: int) -> dict:
    """The forecast from n rows and the truth of 2n."""
    made, truth = growth(rows[:n]), gvendi(rows[: 2 * n])
    f = made.forecast
    return {
        "n": n,
        "score": made.points[-1].mean,
        "truth": truth,
        "forecast": f.value,
        "low": f.low,
        "high": f.high,
        "inside": f.low <= truth <= f.high,
        "unlimited": None if made.unlimited is None else [made.unlimited.low, made.unlimited.high],
    }


def forecasts(rows_of: dict[str, torch.Tensor]) -> list[dict]:
    """Splits of every run at up to five sizes."""
    found = []
    for name, rows in rows_of.items():
        generator = torch.Generator().manual_seed(4)
        for n in sorted({40, 80, 160, 320, min(len(rows) // 2, 600)}):
            if 2 * n <= len(rows):
                place = torch.randperm(len(rows), generator=generator)
                found.append({"run": name, **forecast_of(rows[place], n)})
                print(found[-1], flush=True)
    return found


def spectra(trials: int) -> list[dict]:
    """Forecasts on known spectra."""
    found = []
    for name, draw in sources(DIM).items():
        if name.startswith("listed"):
            continue
        generator = torch.Generator().manual_seed(5)
        truth = gvendi(draw(40_000, generator))
        for times in (1, 3, 10, 30):
            n = max(16, int(times * truth))
            made = [forecast_of(draw(2 * n, generator), n) for _ in range(trials)]
            given = [m["unlimited"] for m in made if m["unlimited"] is not None]
            found.append(
                {
                    "source": name,
                    "times": times,
                    "n": n,
                    "inside": float(np.mean([m["inside"] for m in made])),
                    "half width": float(
                        np.median([(m["high"] - m["low"]) / 2 / m["forecast"] for m in made])
                    ),
                    "unlimited given": len(given) / trials,
                    "unlimited inside": float(np.mean([a <= truth <= b for a, b in given]))
                    if given
                    else None,
                    "trials": trials,
                }
            )
            print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = ("draws", "differences", "halves", "forecasts", "spectra")
    parser.add_argument("--runs", nargs="*", type=Path, default=[])
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    rows_of = real_rows(chosen.runs)
    run = {
        "draws": lambda: draws(chosen.trials),
        "differences": lambda: differences(chosen.trials),
        "halves": lambda: halves(rows_of),
        "forecasts": lambda: forecasts(rows_of),
        "spectra": lambda: spectra(max(1, chosen.trials // 10)),
    }
    for part in chosen.only:
        result = {"machine": describe_machine(), "found": run[part]()}
        # Parts may run side by side.
        results = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
        chosen.out.write_text(json.dumps(results | {part: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
