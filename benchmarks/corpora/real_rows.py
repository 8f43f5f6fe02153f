"""Real text for studies of training: rows of a corpus by a seeded draw, as tokens with the completion supervised."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gvendi_fast.base.draws import places_by_id

GSM8K, GSM8K_TEST = "gsm8k/train.jsonl", "gsm8k/test.jsonl"
BBH, ESNLI, MED, AQUA = (
    "bbh_cot/bbh_cot.jsonl.gz",
    "esnli/dev.jsonl.gz",
    "med/med.jsonl.gz",
    "aqua_rat/dev.jsonl",
)


@dataclass(frozen=True)
class Row:
    """One sample: its source, tokens int64 [T], how many of them are the prompt, and what it says."""

    source: str
    ids: torch.Tensor
    prompt: int
    text: tuple[str, str] = ("", "")


class Reader:
    """Reads rows of a folder of corpora; those whose completion begins after `most` tokens less 32 are left out."""

    def __init__(self, data: Path, tokenizer: Any, most: int) -> None:
        self.data, self.tokenizer, self.most = data, tokenizer, most

    def rows(self, file: str, source: str, task: str | None = None) -> list[Row]:
        """All rows of a file (of one task of it), in a seeded order, cut at `most` tokens."""
        path = self.data / file
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            records = [json.loads(line) for line in lines]
        if task is not None:
            records = [r for r in records if r["meta"]["task"] == task]
        places = places_by_id((f"{source}|{r['prompt']}|{r['completion']}" for r in records), len(records), 0)
        found = []
        for record in (records[i] for i in places):
            row = self.row(source, record["prompt"], record["completion"])
            if row.prompt <= self.most - 32:
                found.append(row)
        return found

    def row(self, source: str, prompt: str, completion: str) -> Row:
        """One row, cut at `most` tokens."""
        before = self.tokenizer(prompt + "\n", add_special_tokens=False).input_ids
        after = self.tokenizer(completion, add_special_tokens=False).input_ids
        ids = torch.tensor([*before, *after, self.tokenizer.eos_token_id][: self.most])
        return Row(source, ids, len(before), (prompt, completion))

    def tasks(self) -> list[str]:
        """The tasks of BBH by name."""
        with gzip.open(self.data / BBH, "rt") as lines:
            return sorted({json.loads(line)["meta"]["task"] for line in lines})


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """input_ids, labels and attention_mask [B, T] of rows, padded on the right."""
    length = max(len(row.ids) for row in rows)
    ids, labels = torch.zeros(len(rows), length, dtype=torch.int64), torch.full((len(rows), length), -100)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], mask[i, :n], labels[i, row.prompt : n] = row.ids, 1, row.ids[row.prompt :]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@torch.no_grad()
def loss_per_token(model: nn.Module, rows: Sequence[Row], batch: int = 32) -> float:
    """Mean negative log-likelihood of the completions' tokens, in nats."""
    model.eval()
    total = tokens = 0.0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for first in range(0, len(ordered), batch):
        inputs = collate(ordered[first : first + batch])
        told = int((inputs["labels"][:, 1:] != -100).sum())
        total += float(model(**inputs, use_cache=False).loss) * told
        tokens += told
    model.train()
    return total / tokens
