"""GainSampler against random sampling on one budget of steps and rows: loss on text of other families, by seed.

    python -m benchmarks.studies.gain_sampler --data ../shared/data [--seeds 5] [--out FILE.json]

The pool is of the kind that is collected rather than made: much of one family (GSM8K), a second one (e-SNLI), short
labels (MED), little of ten tasks of BBH, and a few rows of GSM8K thirty times each. The student is `tiny`, trained on
completions; the proxy is `tiny` as it was before, whose sketches are made once. Both arms run as many steps on as many
rows; a seed decides the order in which the rows stand in line, which is the same for both, so that seeds are pairs.
Held out: families that the pool lacks (the other ten tasks of BBH, and AQuA), other rows of the ten tasks that it has
little of, and GSM8K's test set. Every second task by name is in the pool.

The interval is Student's, of the mean of the paired differences over seeds. It speaks of the draws from this pool, not
of other pools, students or proxies.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.corpora.real_rows import (
    AQUA,
    BBH,
    ESNLI,
    GSM8K,
    GSM8K_TEST,
    MED,
    Reader,
    Row,
    collate,
    loss_per_token,
)
from benchmarks.environment import ROOT, describe_machine
from gvendi_fast import GradientSketcher, SketchSpec, gvendi, load_proxy
from gvendi_fast.base.student import quantile
from gvendi_fast.integrations.candidates import ProxySketches
from gvendi_fast.integrations.sampler import GainSampler

OUT = ROOT / "benchmarks" / "results" / "gain_sampler.json"
MOST_TOKENS, DIM, BATCH, STEPS, RATE = 160, 256, 16, 80, 1e-3
ARMS = {"random": 1, "gain": 4}
REPEATED, TIMES, BY_TASK, HELD_OUT = 32, 30, 30, 20


def corpora(reader: Reader) -> tuple[list[Row], dict[str, list[Row]]]:
    """The pool, and the held-out sets by name."""
    gsm8k = reader.rows(GSM8K, "GSM8K")
    again = [Row("repeated", row.ids, row.prompt) for row in gsm8k[:REPEATED]]
    pool = gsm8k[REPEATED : REPEATED + 2400] + again * TIMES
    pool += reader.rows(ESNLI, "e-SNLI")[:1000] + reader.rows(MED, "MED")[:500]
    few, other = [], []
    for i, task in enumerate(reader.tasks()):
        rows = reader.rows(BBH, "BBH", task)
        if i % 2 == 0:
            pool, few = pool + rows[:BY_TASK], few + rows[BY_TASK : BY_TASK + HELD_OUT]
        else:
            other += rows[:HELD_OUT]
    held_out = {
        "other tasks of BBH": other,
        "AQuA": reader.rows(AQUA, "AQuA")[:150],
        "BBH tasks of the pool": few,
        "GSM8K test": reader.rows(GSM8K_TEST, "GSM8K")[:150],
    }
    return pool, held_out


def sketches_of(model: nn.Module, pool: list[Row]) -> torch.Tensor:
    """Sketches float32 [N, DIM] of the pool."""
    ask = ProxySketches(GradientSketcher(model, SketchSpec(dim=DIM)), pool, collate, at_once=32)
    # Rows of like length together, without padding.
    places = sorted(range(len(pool)), key=lambda i: len(pool[i].ids))
    out = torch.empty(len(pool), DIM)
    out[places] = ask(places)
    return out


def run(
    pool: list[Row], z: torch.Tensor, held_out: dict[str, list[Row]], m: int, seed: int
) -> dict[str, Any]:
    """Train one student and say what it was trained on and what it then knows."""
    torch.manual_seed(seed)
    model = load_proxy("tiny").model.float().train()
    for p in model.parameters():
        p.requires_grad_(True)
    sampler = GainSampler(z, BATCH, m, steps=STEPS, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warm = STEPS // 10

    def rate(step: int) -> float:
        return (
            (step + 1) / warm
            if step < warm
            else 0.5 * (1 + math.cos(math.pi * (step - warm) / (STEPS - warm)))
        )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    seen: list[int] = []
    tokens, choosing, began = 0, 0.0, time.process_time()
    batches = iter(sampler)
    for _ in range(len(sampler)):
        before = time.process_time()
        numbers = next(batches)
        choosing += time.process_time() - before
        inputs = collate([pool[i] for i in numbers])
        tokens += int(inputs["attention_mask"].sum())
        model(**inputs, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += numbers
    trained = time.process_time() - began
    return {
        "seed": seed,
        "loss": {name: loss_per_token(model, rows) for name, rows in held_out.items()},
        "rows": len(seen),
        "tokens": tokens,
        "sources": dict(Counter(pool[i].source for i in seen)),
        "different texts": len({tuple(pool[i].ids.tolist()) for i in seen}),
        "gvendi of the rows": gvendi(z[seen]),
        "seconds": trained,
        "seconds of choosing": choosing,
    }


def compared(runs: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Mean difference (gain less random) of each held-out set with its 95 % interval over seeds."""
    out = {}
    for name in runs["gain"][0]["loss"]:
        pairs = zip(runs["gain"], runs["random"], strict=True)
        d = np.array([a["loss"][name] - b["loss"][name] for a, b in pairs])
        reach = quantile(0.95, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.inf
        out[name] = {
            "difference": float(d.mean()),
            "low": float(d.mean() - reach),
            "high": float(d.mean() + reach),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--sketches", type=Path, help="keep the pool's sketches in this file, and take them from it"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    proxy = load_proxy("tiny")
    pool, held_out = corpora(Reader(chosen.data, proxy.tokenizer, MOST_TOKENS))
    began = time.process_time()
    if chosen.sketches and chosen.sketches.exists():
        z = torch.load(chosen.sketches)
    else:
        z = sketches_of(proxy.model.float(), pool)
        if chosen.sketches:
            torch.save(z, chosen.sketches)
    print(f"{len(pool)} rows, sketched in {time.process_time() - began:.0f} s", flush=True)
    before = {name: loss_per_token(proxy.model, rows) for name, rows in held_out.items()}
    result: dict[str, Any] = {
        "pool": dict(Counter(row.source for row in pool)),
        "different texts of the pool": len({tuple(row.ids.tolist()) for row in pool}),
        "gvendi of the pool": gvendi(z),
        "held out": {name: len(rows) for name, rows in held_out.items()},
        "settings": {
            "steps": STEPS, "batch": BATCH, "rate": RATE, "dim": DIM, "most tokens": MOST_TOKENS, "m": ARMS["gain"],
            "window": 1024, "student": "tiny", "proxy": "tiny",
        },
        "loss before": before,
        "runs": {arm: [] for arm in ARMS},
        "machine": describe_machine(),
    }  # fmt: skip
    for seed in range(chosen.seeds):
        for arm, m in ARMS.items():
            found = run(pool, z, held_out, m, seed)
            result["runs"][arm].append(found)
            print(arm, json.dumps(found), flush=True)
        if seed > 0:
            result["compared"] = compared(result["runs"])
            chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["compared"], indent=1))


if __name__ == "__main__":
    main()
