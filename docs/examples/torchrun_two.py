"""Two processes that train one model (DistributedDataParallel over gloo), and one meter over both, on a CPU.

    torchrun --standalone --nproc-per-node 2 docs/examples/torchrun_two.py

Each process has rows of another kind, so neither can tell by itself how diverse the step's data is. `sync` gives every
process the same figures; nothing of the processes' own meters is changed.
"""

from __future__ import annotations

import random
import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from gvendi_fast import DiversityMeter, GradientSketcher, SketchSpec, load_proxy


def text(rank: int, draw: random.Random) -> str:
    """A row of a process's own kind."""
    a, b = draw.randrange(100), draw.randrange(100)
    return f"The sum of {a} and {b} is {a + b}." if rank == 0 else f"I have read page {a} of book {b}, and liked it."


def main(steps: int = 20) -> list[tuple[float, float]]:
    """Train for so many steps; returns and prints G-Vendi of this process's window, and of all processes'."""
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")
    is_joined = distributed.is_initialized()
    rank = distributed.get_rank() if is_joined else 0
    torch.manual_seed(0)
    start, draw = load_proxy("tiny", device="cpu", dtype="float32"), random.Random(rank)
    model, tokenizer = start.model.train(), start.tokenizer
    sketcher = GradientSketcher(model, SketchSpec(dim=512))
    wrapped = DistributedDataParallel(model) if is_joined else model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    meter, series = DiversityMeter(window=256), []
    with sketcher.tap(wrapped) as tap:
        for step in range(1, steps + 1):
            batch = tokenizer([text(rank, draw) for _ in range(8)], return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            wrapped(**batch, labels=labels).loss.backward()
            meter.update(tap.take())
            optimizer.step()
            optimizer.zero_grad()
            if step % max(1, steps // 5) == 0:
                own, joined = meter.compute()["gvendi/window"], meter.sync().compute()["gvendi/window"]
                series.append((own, joined))
                print(f"step {step}, process {rank}: G-Vendi of its own {own:.3g}, of all {joined:.3g}", flush=True)
    if is_joined:
        distributed.destroy_process_group()
    return series


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
