"""SFTTrainer with packing: the diversity of each source while a small model is fine-tuned, on a CPU in a minute.

    pip install "gvendi-fast" trl && python docs/examples/sft_packing.py

Three sources: sums, sentences on days, and one source that says the same few things over and over. The samples of a
packed row are told apart, so each has the gradient and the source that it would have by itself.
"""

from __future__ import annotations

import random
import sys
import tempfile

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from gvendi_fast import GvendiCallback, load_proxy, pack_with_sources

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def text(source: str, draw: random.Random) -> str:
    """A row of a source."""
    if source == "sums":
        a, b = draw.randrange(100), draw.randrange(100)
        return f"The sum of {a} and {b} is {a + b}."
    if source == "days":
        day, after = draw.randrange(7), draw.randrange(1, 30)
        return f"{after} days after {DAYS[day]} it is {DAYS[(day + after) % 7]}."
    return draw.choice(["Thank you for your question!", "I am happy to help you with that."])


def main(steps: int = 40) -> list[dict[str, float]]:
    """Train for so many steps; returns and prints what was logged of the sources."""
    draw = random.Random(0)
    sources = ["sums", "days", "pleasantries"]
    rows = [{"source": source, "text": text(source, draw)} for _ in range(500) for source in sources]
    # The package's own small model stands for the one to be fine-tuned.
    start = load_proxy("tiny", device="cpu", dtype="float32")

    def tokenised(row: dict[str, str]) -> dict[str, list[int]]:
        ids = start.tokenizer(row["text"])["input_ids"]
        return {"input_ids": ids, "labels": ids}

    data = Dataset.from_list(rows).map(tokenised, remove_columns=["text"])
    callback = GvendiCallback(every=2, window=512, dim=512, source="source")
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            start.model,
            SFTConfig(
                output_dir=folder,
                packing=True,
                max_length=64,
                # Packed here already, with the sources, which the trainer's own packing drops.
                dataset_kwargs={"skip_prepare_dataset": True},
                per_device_train_batch_size=4,
                max_steps=steps,
                learning_rate=1e-3,
                logging_steps=max(1, steps // 5),
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=pack_with_sources(data, max_length=64),
            processing_class=start.tokenizer,
            callbacks=[callback],
        )
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "diversity/gvendi/window" in entry]
    for entry in logged:
        print(f"step {entry['step']}: loss {entry['loss']:.3g}, G-Vendi {entry['diversity/gvendi/window']:.3g} of "
              f"{entry['diversity/samples/window']:.0f} samples")  # fmt: skip
        for source in sources:
            if f"diversity/gvendi/source/{source}" in entry:
                print(f"    {source:12}  G-Vendi {entry[f'diversity/gvendi/source/{source}']:6.3g}  "
                      f"of {entry[f'diversity/samples/source/{source}']:.0f}")  # fmt: skip
    return logged


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
