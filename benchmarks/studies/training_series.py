"""What a meter shows of a training run in which one source repeats itself: series by source, and their picture.

    python -m benchmarks.studies.training_series --data ../shared/data [--proxy NAME=FOLDER --every 4] [--out FILE.json]

Five sources of as many rows in random order: two halves of GSM8K that share no row, e-SNLI, all tasks of BBH, and
"repeated", fourteen other rows of GSM8K thirty times each. `tiny` is trained on them for one epoch. Its own backward
passes are tapped, the sources travelling with the batch as tags; beside it `tiny` as it was before looks at the same
batches as a frozen proxy, and so does another proxy at every so many of them. Each feeds a meter of its own, whose
window holds about as many rows of each source, so that their G-Vendi are compared at about equal n.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.corpora.real_rows import BBH, ESNLI, GSM8K, Reader, Row, collate
from benchmarks.environment import ROOT, describe_machine
from gvendi_fast import GradientSketcher, SketchSpec, load_proxy
from gvendi_fast.base.draws import order, stream
from gvendi_fast.integrations.meter import DiversityMeter

OUT = ROOT / "benchmarks" / "results" / "training_series.json"
MOST_TOKENS, DIM, BATCH, RATE, LOOK_EVERY = 160, 256, 16, 1e-3, 5
ROWS, REPEATED, TIMES = 420, 14, 30
SOURCES = ("GSM8K, one half", "GSM8K, other half", "e-SNLI", "BBH", "repeated")
# Rows of the window: about 128 of each source.
WINDOW = 128 * len(SOURCES)
# Of a proxy that looks at some batches only.
FEW = 64 * len(SOURCES)


def corpus(reader: Reader) -> list[Row]:
    """All rows, in the order of training."""
    gsm8k = reader.rows(GSM8K, "GSM8K")
    parts = [
        gsm8k[:ROWS],
        gsm8k[ROWS : 2 * ROWS],
        reader.rows(ESNLI, "e-SNLI")[:ROWS],
        reader.rows(BBH, "BBH")[:ROWS],
        gsm8k[2 * ROWS : 2 * ROWS + REPEATED] * TIMES,
    ]
    rows = [
        Row(name, r.ids, r.prompt, r.text) for name, part in zip(SOURCES, parts, strict=True) for r in part
    ]
    return [rows[i] for i in order(stream("training series", 0), len(rows))]


class Watched:
    """A meter and its series."""

    def __init__(self, window: int) -> None:
        self.meter = DiversityMeter(DIM, window=window, names=dict(enumerate(SOURCES)))
        self.steps: list[int] = []
        self.series: list[dict[str, float]] = []

    def look(self, step: int) -> None:
        self.steps.append(step)
        self.series.append(self.meter.compute(("batch", "novelty", "window", "sources")))

    def result(self) -> dict[str, Any]:
        """Steps, series by name (null where a figure is not yet there), and the sources at the end."""
        names = sorted({name for figures in self.series for name in figures})
        return {
            "steps": self.steps,
            "series": {name: [figures.get(name) for figures in self.series] for name in names},
            "last": {name: vars(figures) for name, figures in self.meter.by_source().items()},
        }


def train(rows: list[Row], others: dict[str, Path], every: int) -> dict[str, Any]:
    """One epoch of `tiny` under a tap, with proxies beside it."""
    model = load_proxy("tiny").model.float().train()
    for p in model.parameters():
        p.requires_grad_(True)
    spec = SketchSpec(dim=DIM)
    tap = GradientSketcher(model, spec).tap(model, tag="source")
    watched = {"tap": Watched(WINDOW), "tiny": Watched(WINDOW)}
    proxies = {"tiny": (GradientSketcher(load_proxy("tiny").model.float(), spec), None, 1)}
    for name, folder in others.items():
        proxy = load_proxy(folder)
        reader = Reader(Path(), proxy.tokenizer, MOST_TOKENS)
        proxies[name], watched[name] = (
            (GradientSketcher(proxy.model, spec), reader, every),
            Watched(FEW),
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    steps, losses = len(rows) // BATCH, []
    spent = dict.fromkeys(("training with the tap", *proxies), 0.0)
    for step in range(steps):
        batch = rows[step * BATCH : (step + 1) * BATCH]
        tags = torch.tensor([SOURCES.index(row.source) for row in batch])
        inputs = collate(batch)
        before = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / 10)
        with tap:
            loss = model(**inputs, source=tags, use_cache=False).loss
            loss.backward()
            watched["tap"].meter.update(tap.take())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        spent["training with the tap"] += time.process_time() - before
        for name, (sketcher, reader, step_of) in proxies.items():
            if step % step_of:
                continue
            before = time.process_time()
            own = inputs if reader is None else collate([reader.row(row.source, *row.text) for row in batch])
            watched[name].meter.update(sketcher.sketch(**own), group=tags)
            spent[name] += time.process_time() - before
        if step % LOOK_EVERY == LOOK_EVERY - 1 or step == steps - 1:
            for one in watched.values():
                one.look(step + 1)
            print(
                step + 1,
                f"loss {np.mean(losses[-LOOK_EVERY:]):.3f}",
                {k: round(v) for k, v in spent.items()},
                flush=True,
            )
    return {
        "loss": losses,
        "seconds": spent,
        "watched": {name: one.result() for name, one in watched.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--proxy", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument(
        "--every", type=int, default=4, help="the other proxies look at every so many batches"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    others = {name: Path(folder) for name, _, folder in (text.partition("=") for text in chosen.proxy)}
    rows = corpus(Reader(chosen.data, load_proxy("tiny").tokenizer, MOST_TOKENS))
    result = {
        "settings": {
            "steps": len(rows) // BATCH, "batch": BATCH, "rate": RATE, "dim": DIM, "most tokens": MOST_TOKENS,
            "window": WINDOW, "window of others": FEW, "every": chosen.every,
            "repeated": REPEATED, "times": TIMES, "model": "tiny",
        },
        "rows": {name: sum(row.source == name for row in rows) for name in SOURCES},
        "different texts": {
            name: len({row.text for row in rows if row.source == name}) for name in SOURCES
        },
        "machine": describe_machine(),
    }  # fmt: skip
    result |= train(rows, others, chosen.every)
    chosen.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for name, one in result["watched"].items():
        for source, figures in one["last"].items():
            print(f"{name:8}{source:20}", {k: round(v, 4) for k, v in figures.items()})


if __name__ == "__main__":
    main()
