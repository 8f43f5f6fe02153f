"""Train the embedded proxy `tiny`: a 1.2 M-parameter Qwen2 with a byte-level BPE of 2048 tokens.

The shipped weights come from

    python -m benchmarks.corpora.train_tiny path/to/gsm8k/train.jsonl

run at the repository root; all defaults are the shipped settings. Training text: the GSM8K training split
(MIT licence; JSON lines with "prompt" and "completion") and rows of benchmarks/corpora/made_up.py, most of it in the
chat template, some as plain text. The last 5 % of GSM8K and procedural rows of another seed are held out. The
same machine, threads and library versions give the same weights; elsewhere sums differ in their last bits.
`training.json` beside the weights records settings, versions, data digests and held-out losses.
"""

import argparse
import hashlib
import json
import math
import platform
import random
import time
from collections import Counter
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from benchmarks.corpora.made_up import varied
from benchmarks.environment import ROOT

ASSETS = ROOT / "gvendi_fast" / "assets" / "tiny"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
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


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a JSON-lines file, in file order."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def turn(role: str, content: str) -> str:
    """One ChatML turn."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def render(rows: list[dict[str, str]], rng: random.Random) -> list[str]:
    """Documents: 55 % one-turn chats, 15 % with a system turn, 15 % of two or three, 15 % plain."""
    documents, left = [], list(rows)
    while left:
        kind = rng.random()
        taken = [left.pop() for _ in range(min(len(left), 1 + (kind < 0.15) + (kind < 0.05)))]
        if kind >= 0.85:
            form = PLAIN[int(rng.random() * len(PLAIN))]
            documents.append(form.format(prompt=taken[0]["prompt"], completion=taken[0]["completion"]))
            continue
        text = turn("system", SYSTEM[int(rng.random() * len(SYSTEM))]) if 0.15 <= kind < 0.30 else ""
        for row in taken:
            text += turn("user", row["prompt"]) + turn("assistant", row["completion"])
        documents.append(text)
    return documents


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
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[list[int]]:
    """Token ids of each document, each closed by <|endoftext|>."""
    end = tokenizer.token_to_id(SPECIAL[0])
    return [[*encoding.ids, end] for encoding in tokenizer.encode_batch(documents)]


def pack(ids: list[list[int]], length: int) -> torch.Tensor:
    """Documents back to back in rows of `length` + 1 tokens (the label of the last one included)."""
    flat = torch.tensor([token for document in ids for token in document])
    rows = (len(flat) - 1) // length
    return torch.stack([flat[i * length : i * length + length + 1] for i in range(rows)])


def token_loss(model: torch.nn.Module, block: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats. block [B, T + 1] int64."""
    logits = model(input_ids=block[:, :-1]).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, blocks: torch.Tensor, batch: int) -> float:
    """Mean loss per token over all blocks, fp32 weights."""
    model.eval()
    losses = [float(token_loss(model, part)) * len(part) for part in blocks.split(batch)]
    model.train()
    return sum(losses) / len(blocks)


def unigram_entropy(train: torch.Tensor, held_out: torch.Tensor, size: int) -> float:
    """Cross-entropy in nats per token of the add-one unigram model of `train` on `held_out`."""
    counts = torch.bincount(train.flatten(), minlength=size) + 1.0
    return float(-(counts / counts.sum()).log()[held_out[:, 1:].flatten()].mean())


def build_model(size: int, seed: int) -> torch.nn.Module:
    """The architecture of `tiny`: Qwen2, tied embeddings, 4 layers of width 128."""
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=size,
        hidden_size=128,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.03,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=SPECIAL.index("<|endoftext|>"),
    )
    return transformers.Qwen2ForCausalLM(config)


def train(model: torch.nn.Module, pool: torch.Tensor, held_out: dict[str, torch.Tensor], args) -> list[dict]:
    """AdamW, warm-up of 5 % and cosine decay to 5 % of the rate; returns the log."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    warm = max(1, args.steps // 20)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm) / max(1, args.steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = torch.Generator().manual_seed(args.seed)
    queue: list[torch.Tensor] = []
    log, since, start = [], [], time.perf_counter()
    model.train()
    for step in range(1, args.steps + 1):
        if not queue:
            queue = [part for part in torch.randperm(len(pool), generator=order).split(args.batch)]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = token_loss(model, pool[queue.pop()])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        since.append(float(loss.detach()))
        if step % args.report == 0 or step == args.steps:
            entry = {"step": step, "train": round(sum(since) / len(since), 4)}
            entry |= {
                name: round(held_out_loss(model, part, args.batch), 4) for name, part in held_out.items()
            }
            log.append(entry)
            since = []
            print(f"{time.perf_counter() - start:7.1f} s  {entry}", flush=True)
    return log


def save(model: torch.nn.Module, tokenizer: Tokenizer, out: Path) -> None:
    """Config, bf16 safetensors and a fast tokenizer, in terms that transformers 4 and 5 both know."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    # Written here and not by save_pretrained, whose version 5 names a class that version 4 does not have.
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    # save_pretrained makes the weights private to the user who trained them.
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded proxy model; see the top of this file.")
    parser.add_argument(
        "gsm8k", type=Path, help="GSM8K training split, JSON lines with prompt and completion"
    )
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write (default: the package's)")
    parser.add_argument("--rows", type=int, default=18000, help="procedural rows (default 18000)")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (default 4000)")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (default 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default 512)")
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens (default 2048)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and text (default 0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument(
        "--report", type=int, default=1000, help="steps between held-out losses (default 1000)"
    )
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast (default)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    gsm8k, rng = read_rows(args.gsm8k), random.Random(f"tiny|{args.seed}")
    cut = len(gsm8k) - len(gsm8k) // 20
    made, unseen = varied(args.rows, args.seed + 1), varied(1800, args.seed + 2)
    prompts = {row["prompt"] for row in made}
    unseen = [row for row in unseen if row["prompt"] not in prompts]
    mixed = sorted(gsm8k[:cut] + made, key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())
    documents = render(mixed, rng)
    tokenizer = train_tokenizer(documents, args.vocabulary)
    pool = pack(encode(tokenizer, documents), args.length)
    size = tokenizer.get_vocab_size()
    held_out = {
        name: pack(encode(tokenizer, render(rows, rng)), args.length)
        for name, rows in (("gsm8k", gsm8k[cut:]), ("procedural", unseen))
    }
    model = build_model(size, args.seed)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count} parameters, {size} tokens, {pool.numel()} training tokens", flush=True)

    log = train(model, pool, held_out, args)
    save(model, tokenizer, args.out)
    stored = transformers.AutoModelForCausalLM.from_pretrained(args.out).float()
    record = {
        "parameters": count,
        "uniform_nats_per_token": math.log(size),
        "unigram_nats_per_token": {
            name: unigram_entropy(pool, part, size) for name, part in held_out.items()
        },
        "held_out_nats_per_token": {
            name: held_out_loss(stored, part, args.batch) for name, part in held_out.items()
        },
        "settings": {k: v for k, v in vars(args).items() if k not in ("gsm8k", "out", "report")},
        "training_tokens": pool.numel(),
        "data": {
            "gsm8k_train_sha256": hashlib.sha256(args.gsm8k.read_bytes()).hexdigest(),
            "documents_sha256": hashlib.sha256("\0".join(documents).encode()).hexdigest(),
            "documents": len(documents),
            "rows_by_family": dict(Counter(row.get("family", "gsm8k") for row in mixed)),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "log": log,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
