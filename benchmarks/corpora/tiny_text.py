"""The training text of `tiny` as documents, its tokenizer, and rows of tokens."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from benchmarks.corpora.write_text import read_texts

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SYSTEM = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a careful tutor.",
    "Think step by step.",
)
PLAIN = (
    "{prompt}\n{completion}\n",
    "Question: {prompt}\nAnswer: {completion}\n",
    "{prompt}\n\n{completion}\n\n",
)
# A chat as the writer's template has it: its own system turn, a request, an answer and its end if it came to one.
CHAT = re.compile(
    r"<\|im_start\|>(?:system\n.*?<\|im_end\|>\n<\|im_start\|>)?user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(.*?)"
    r"(<\|im_end\|>|<\|endoftext\|>)?",
    re.DOTALL,
)
# Characters that the tokenizer is trained on at most.
TOKENIZER_CHARACTERS = 20_000_000
Document = tuple[str, bool]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a JSON-lines file, in file order."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def turn(role: str, content: str) -> str:
    """One ChatML turn."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def render(rows: list[dict[str, str]], rng: random.Random) -> list[Document]:
    """Documents: 55 % one-turn chats, 15 % with a system turn, 15 % of two or three, 15 % plain. All are whole."""
    documents, left = [], list(rows)
    while left:
        kind = rng.random()
        taken = [left.pop() for _ in range(min(len(left), 1 + (kind < 0.15) + (kind < 0.05)))]
        if kind >= 0.85:
            form = PLAIN[int(rng.random() * len(PLAIN))]
            documents.append(
                (form.format(prompt=taken[0]["prompt"], completion=taken[0]["completion"]), True)
            )
            continue
        text = turn("system", SYSTEM[int(rng.random() * len(SYSTEM))]) if 0.15 <= kind < 0.30 else ""
        for row in taken:
            text += turn("user", row["prompt"]) + turn("assistant", row["completion"])
        documents.append((text, True))
    return documents


def written_documents(texts: list[tuple[str, bool]], rng: random.Random) -> list[Document]:
    """Documents (text, whether it is whole) of what the writer wrote: (text, whether cut off)."""
    rows, rest = [], []
    for text, cut in texts:
        found = CHAT.fullmatch(text)
        if found is None:
            plain = text.replace("<|endoftext|>", "").removesuffix("<|im_end|>")
            # An opening of a chat that was cut off before its answer teaches nothing.
            if plain.strip() and not plain.startswith("<|im_start|>"):
                rest.append((plain, not cut))
        elif found[3]:
            rows.append({"prompt": found[1], "completion": found[2].strip()})
        elif found[2].strip():
            rest.append((turn("user", found[1]) + f"<|im_start|>assistant\n{found[2].strip()}", False))
    return mixed_order(render(rows, rng) + rest)


def mixed_order(documents: list[Document]) -> list[Document]:
    """In the order of their digests."""
    return sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest())


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Byte-level BPE cut as Qwen2 cuts text (single digits): transformers 5 cuts any qwen2 so."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    kept, characters = [], 0
    for text in texts:
        kept.append(text)
        characters += len(text)
        if characters >= TOKENIZER_CHARACTERS:
            break
    tokenizer.train_from_iterator(kept, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, documents: list[Document], length: int) -> torch.Tensor:
    """Documents back to back, whole ones closed by <|endoftext|>: int32 [N, length + 1], the last label included."""
    end = tokenizer.token_to_id(SPECIAL[0])
    flat = []
    # In parts, so that the ids of a hundred million characters are never all Python integers.
    for first in range(0, len(documents), 4096):
        part = documents[first : first + 4096]
        for encoding, (_, whole) in zip(
            tokenizer.encode_batch([text for text, _ in part]), part, strict=True
        ):
            flat.append(np.array([*encoding.ids, end] if whole else encoding.ids, dtype=np.int32))
    tokens = torch.from_numpy(np.concatenate(flat))
    rows = (len(tokens) - 1) // length
    return tokens[: rows * length + 1].unfold(0, length + 1, length).contiguous()


def digest(documents: list[Document]) -> str:
    """SHA-256 of all documents in order."""
    hashed = hashlib.sha256()
    for text, whole in documents:
        hashed.update(text.encode() + (b"\0" if whole else b"\1"))
    return hashed.hexdigest()


def written_by(folder: Path, writer: Path, seed: int) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents of a folder of benchmarks.corpora.write_text; the last 2 % are held out."""
    texts = read_texts(folder, Tokenizer.from_file(str(writer / "tokenizer.json")))
    cut = len(texts) - len(texts) // 50
    rng = random.Random(f"written|{seed}")
    return written_documents(texts[:cut], rng), written_documents(texts[cut:], rng)
