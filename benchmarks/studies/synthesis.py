"""What the rules of acceptance do to a pool that grows: a writer with a favourite family of problems, several seeds.

    python -m benchmarks.studies.synthesis --seeds 5 --each 20 --grow 240

Every rule grows the same seed pool by the same number of rows, from the same writer behind a real HTTP server
(tests/problem_families.py: twelve families; four answers of five are of the favourite one, the others of a family
that the prompt shows). Printed, as mean and standard deviation over the seeds: G-Vendi of the accepted rows alone and
of the grown pool, families among the new rows, the entropy of their distribution in nats, and the requests that were
paid. The rules of a seed are compared with one another, so their difference to "everything" is printed too. The
figures go to benchmarks/results/synthesis.json.
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

import numpy as np
import torch

from benchmarks.environment import ROOT, describe_machine

sys.path.insert(0, str(ROOT / "tests"))
from chat_server import ChatServer
from problem_families import FAMILIES, family_of, seed_rows, writer

from gvendi_fast.synthesis.config.config import config_from
from gvendi_fast.synthesis.run import synthesize
from gvendi_fast.vendi import gvendi

RULES = {
    "everything": {"rule": "all"},
    "cluster": {"rule": "cluster"},
    "cluster, frozen": {"rule": "cluster", "frozen": True},
    "cluster, prompts from sparse": {"rule": "cluster", "from_sparse": True},
    "gain": {"rule": "gain"},
}
COLUMNS = {
    "accepted": "G-Vendi of the accepted rows",
    "gvendi": "of the pool",
    "families": "families",
    "entropy": "family entropy",
    "requests": "requests",
}


def grow(folder: Path, accept: dict, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One run: its figures."""
    folder.mkdir()
    seeds, rows = folder / "seeds.jsonl", options.grow
    seeds.write_text("".join(json.dumps(row) + "\n" for row in seed_rows(options.each, seed)))
    with ChatServer(writer(options.favour)) as server:
        config = {
            "out": str(folder / "run"),
            "seed": seed,
            "pool": {"data": str(seeds)},
            "task": {"name": "generic"},
            "generator": {"model": "m", "base_url": server.url, "key_variable": None, "send_seed": True},
            "proxy": {"name": "tiny", "process": False},
            "accept": {"clusters": options.clusters, **accept},
            "stop": {"target": options.each * len(FAMILIES) + rows},
        }
        status = synthesize(config_from(config))
    if status.stopped != "target":
        raise SystemExit(f"{accept} with seed {seed} ended early: {status.why}")
    accepted = (folder / "run" / "accepted.jsonl").read_text().splitlines()
    counts = Counter(family_of(json.loads(line)["prompt"]) for line in accepted)
    entropy = -sum(n / rows * math.log(n / rows) for n in counts.values())
    sketches = np.fromfile(folder / "run" / "sketches.f32", "<f4").reshape(rows, -1)
    return {
        "start": status.start_gvendi,
        "accepted": gvendi(torch.from_numpy(sketches)),
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
    parser.add_argument("--each", type=int, default=20, help="seed rows of each family")
    parser.add_argument("--grow", type=int, default=240, help="rows to add")
    parser.add_argument("--clusters", type=float, default=0.1, help="accept.clusters")
    parser.add_argument("--favour", type=float, default=0.8, help="share of the favourite family")
    options = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, accept) in enumerate(RULES.items()):
            found[name] = [
                grow(Path(folder) / f"{number}-{seed}", accept, seed, options)
                for seed in range(options.seeds)
            ]
            figures = ", ".join(f"{title} {_spread(found[name], key)}" for key, title in COLUMNS.items())
            print(f"{name:<30}{figures}", flush=True)
            if number:
                changes = [
                    {key: run[key] - plain[key] for key in COLUMNS}
                    for run, plain in zip(found[name], found["everything"], strict=True)
                ]
                told = ", ".join(f"{title} {_spread(changes, key)}" for key, title in COLUMNS.items())
                print(f"{'  less everything':<30}{told}", flush=True)
    print(f"at the start: G-Vendi {_spread(found['everything'], 'start')}")
    path = ROOT / "benchmarks" / "results" / "synthesis.json"
    result = {"options": vars(options), "runs": found, "machine": describe_machine()}
    path.write_text(json.dumps(result, indent=1) + "\n")


def _spread(runs: list[dict[str, float]], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
