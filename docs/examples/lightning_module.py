"""A LightningModule around a causal LM, measured by a callback, on a CPU in a minute.

    pip install "gvendi-fast" lightning && python docs/examples/lightning_module.py

Rows come from two sources, told by a key of the batch. Two batches are accumulated for a step, whose samples are those
of both.
"""

from __future__ import annotations

import random
import sys
import tempfile

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from gvendi_fast import GvendiLightningCallback, load_proxy


class Tuned(L.LightningModule):
    """Fine-tunes a causal LM on its next token."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        """The loss of a batch."""
        loss = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all weights."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def rows(count: int) -> list[dict[str, str]]:
    """Rows of two sources: sums of every size, and one of ten sentences."""
    draw, found = random.Random(0), []
    for _ in range(count):
        a, b = draw.randrange(1000), draw.randrange(1000)
        found.append({"source": "sums", "text": f"The sum of {a} and {b} is {a + b}."})
        found.append({"source": "ten sentences", "text": f"This is sentence number {draw.randrange(10)}."})
    return found


def main(steps: int = 30) -> dict[str, float]:
    """Train for so many steps; returns and prints the last figures."""
    start = load_proxy("tiny", device="cpu", dtype="float32")

    def collate(batch: list[dict[str, str]]) -> dict:
        found = dict(start.tokenizer([row["text"] for row in batch], return_tensors="pt", padding=True))
        found["labels"] = found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
        return {**found, "source": [row["source"] for row in batch]}

    data = torch.utils.data.DataLoader(rows(8 * steps), batch_size=8, collate_fn=collate)
    measured = GvendiLightningCallback(every=2, window=512, dim=512, source="source")
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, accumulate_grad_batches=2, log_every_n_steps=2, callbacks=[measured],
            logger=CSVLogger(folder), default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Tuned(start.model), data)
    figures = {name.removeprefix("diversity/"): value for name, value in measured.figures.items()}
    print(f"G-Vendi {figures['gvendi/window']:.3g} of {figures['samples/window']:.0f} samples")
    for source in ("sums", "ten sentences"):
        print(f"    {source:14} G-Vendi {figures[f'gvendi/source/{source}']:5.3g} of "
              f"{figures[f'samples/source/{source}']:.0f}, mean squared cosine of two samples "
              f"{figures[f'similarity/source/{source}']:.3g}")  # fmt: skip
    return figures


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
