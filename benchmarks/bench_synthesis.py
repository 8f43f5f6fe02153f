"""What the rules of acceptance do to a pool that grows: a writer with a favourite family of problems, several seeds.

    python benchmarks/bench_synthesis.py --seeds 5 --grow 40

Every rule grows the same seed pool by the same number of rows, from the same writer behind a real HTTP server
(tests/problem_families.py: twelve families; four answers of five are of the favourite one, the others of a family
that the prompt shows). Printed, as mean and standard deviation over the seeds: G-Vendi of the grown pool, families
among the new rows, the entropy of their distribution in nats, and the requests that were paid. The figures go to
benchmarks/results/synthesis.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

from environment import ROOT, describe_machine

sys.path.insert(0, str(ROOT / "tests"))
from chat_server import ChatServer
from problem_families import FAMILIES, family_of, seed_rows, writer

from gvendi_fast.synthesis.config import config_from
from gvendi_fast.synthesis.running import synthesize

RULES = {
    "everything": {"rule": "all"},
    "cluster": {"rule": "cluster"},
    "cluster, frozen": {"rule": "cluster", "frozen": True},
    "cluster, prompts from sparse": {"rule": "cluster", "from_sparse": True},
    "gain": {"rule": "gain"},
}
EACH = 4
COLUMNS = {"gvendi": "G-Vendi", "families": "families", "entropy": "family entropy", "requests": "requests"}


def grow(folder: Path, accept: dict, seed: int, rows: int, favour: float) -> dict[str, float]:
    """One run: its figures."""
    folder.mkdir()
    seeds, start = folder / "seeds.jsonl", EACH * len(FAMILIES)
    seeds.write_text("".join(json.dumps(row) + "\n" for row in seed_rows(EACH, seed)))
    with ChatServer(writer(favour)) as server:
        config = {
            "out": str(folder / "run"),
            "seed": seed,
            "pool": {"data": str(seeds)},
            "task": {"name": "generic"},
            "generator": {"model": "m", "base_url": server.url, "key_variable": None, "send_seed": True},
            "proxy": {"name": "tiny", "dim": 256, "dtype": "float32"},
            "accept": {"clusters": len(FAMILIES), **accept},
            "stop": {"target": start + rows},
            "block": 16,
        }
        status = synthesize(config_from(config))
    if status.stopped != "target":
        raise SystemExit(f"{accept} with seed {seed} ended early: {status.why}")
    accepted = (folder / "run" / "accepted.jsonl").read_text().splitlines()
    counts = Counter(family_of(json.loads(line)["prompt"]) for line in accepted)
    entropy = -sum(n / rows * math.log(n / rows) for n in counts.values())
    return {
        "start": status.start_gvendi,
        "gvendi": status.gvendi,
        "families": len(counts),
        "entropy": entropy,
        "requests": status.requests,
    }


def main() -> None:
    """Run all rules with all seeds, print the table and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--grow", type=int, default=40, help="rows to add")
    parser.add_argument("--favour", type=float, default=0.8, help="share of the favourite family")
    options = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, accept) in enumerate(RULES.items()):
            found[name] = [
                grow(Path(folder) / f"{number}-{seed}", accept, seed, options.grow, options.favour)
                for seed in range(options.seeds)
            ]
            figures = ", ".join(f"{title} {_spread(found[name], key)}" for key, title in COLUMNS.items())
            print(f"{name:<30}{figures}", flush=True)
    print(f"at the start: G-Vendi {_spread(found['everything'], 'start')}")
    path = ROOT / "benchmarks" / "results" / "synthesis.json"
    result = {"options": vars(options), "runs": found, "machine": describe_machine()}
    path.write_text(json.dumps(result, indent=1) + "\n")


def _spread(runs: list[dict[str, float]], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
