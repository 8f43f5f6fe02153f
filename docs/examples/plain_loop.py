"""A training loop of one's own: a tap on the model, and a meter, on a CPU in a minute.

    python docs/examples/plain_loop.py

The data gets poorer on the way: from the middle on, four rows of five are one of two. The loss alone looks like progress;
the meter says what has happened.
"""

from __future__ import annotations

import random
import sys

import torch

from gvendi_fast import DiversityMeter, GradientSketcher, SketchSpec, load_proxy

REPEATED = ("The answer is always the same.", "Nothing is new here at all.")


def text(is_poor: bool, draw: random.Random) -> str:
    """A row of the data; of poorer data, four of five are one of two."""
    if is_poor and draw.random() < 0.8:
        return draw.choice(REPEATED)
    a, b = draw.randrange(100), draw.randrange(100)
    return draw.choice([f"{a} plus {b} is {a + b}.", f"{a} times {b} is {a * b}.", f"{max(a, b)} is the larger."])


def main(steps: int = 60) -> list[dict[str, float]]:
    """Train for so many steps; returns and prints the figures of every tenth."""
    start, draw = load_proxy("tiny", device="cpu", dtype="float32"), random.Random(0)
    model, tokenizer = start.model.train(), start.tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tap = GradientSketcher(model, SketchSpec(dim=512)).tap(model)
    meter = DiversityMeter(window=64)
    series = []
    for step in range(1, steps + 1):
        texts = [text(step > steps // 2, draw) for _ in range(8)]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        # Every second step: the others run without the tap, at no cost.
        is_measured = step % 2 == 0
        if is_measured:
            tap.attach()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        if is_measured:
            meter.update(tap.take())
            tap.detach()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(2, steps // 6) == 0:
            figures = {"step": step, "loss": loss.item(), **meter.compute()}
            series.append(figures)
            print(f"step {step}: loss {figures['loss']:.3g}, G-Vendi of the last {figures['samples/window']:.0f} "
                  f"samples {figures['gvendi/window']:.3g}")  # fmt: skip
    return series


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
