"""Train the embedded proxy `tiny`: a 1.2 M-parameter Qwen2 with a byte-level BPE of 2048 tokens.

The shipped weights come from

    python -m benchmarks.corpora.train_tiny --init FORMER --documentation 2500 --length 256 --batch 8 --steps 300 \\
        --lr 1e-3 --threads 1 --keep 0.5

where FORMER is the folder of `tiny` before it, which had learnt GSM8K's training set and benchmarks/corpora/made_up.py
(`begun_from` in `training.json` has its record). With a GPU, text that SmolLM2 writes takes the place of both:

    python -m benchmarks.corpora.write_text SMOLLM2_FOLDER TEXT_FOLDER
    python -m benchmarks.corpora.train_tiny --text TEXT_FOLDER --writer SMOLLM2_FOLDER

Everything that decides the weights is in `training.json` beside them: settings, seeds, versions, digests of the text,
losses on text held out. The same machine, threads and library versions give the same weights; elsewhere sums differ in
their last bits.

Neither the corpora that proxies are compared on nor anything of their form is trained on last: the mean gradient of a
distribution that a model was trained on to the end is zero, so its rows share no direction and look as diverse as
noise, which a real model, that has not learnt a corpus by heart, does not say of it. `--gsm8k-rows` and `--made-up` add
GSM8K's training set and benchmarks/corpora/made_up.py, to measure that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer

from benchmarks.corpora.docstrings import documentation
from benchmarks.corpora.made_up import varied
from benchmarks.corpora.tiny_text import (
    SPECIAL,
    Document,
    digest,
    mixed_order,
    pack,
    read_rows,
    render,
    train_tokenizer,
    written_by,
)
from benchmarks.environment import ROOT

ASSETS = ROOT / "gvendi_fast" / "assets" / "tiny"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def token_loss(model: torch.nn.Module, block: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats. block [B, T + 1]."""
    block = block.long()
    logits = model(input_ids=block[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, blocks: torch.Tensor, batch: int) -> float:
    """Mean loss per token over all blocks."""
    model.eval()
    losses = [float(token_loss(model, part)) * len(part) for part in blocks.split(batch)]
    model.train()
    return sum(losses) / len(blocks)


def unigram_entropy(train: torch.Tensor, held_out: torch.Tensor, size: int) -> float:
    """Cross-entropy in nats per token of the add-one unigram model of `train` on `held_out`."""
    counts = torch.bincount(train.flatten(), minlength=size) + 1.0
    return float(-(counts / counts.sum()).log()[held_out[:, 1:].flatten().long()].mean())


def build_model(size: int, args: argparse.Namespace) -> torch.nn.Module:
    """A Qwen2 in the sizes of args, or the one of --init."""
    torch.manual_seed(args.seed)
    if args.init:
        return transformers.AutoModelForCausalLM.from_pretrained(args.init).float()
    config = transformers.Qwen2Config(
        vocab_size=size,
        hidden_size=args.width,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=args.tie,
        initializer_range=0.03,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=SPECIAL.index("<|endoftext|>"),
    )
    return transformers.Qwen2ForCausalLM(config)


def train(
    model: torch.nn.Module, pool: torch.Tensor, held_out: dict[str, torch.Tensor], tokenizer: Tokenizer, args
) -> list[dict]:
    """AdamW, warm-up of 5 % and cosine decay to 2 % of the rate over the steps or the seconds; returns the log.

    With --keep the weights of these parts of the way are stored too.
    """
    device = pool.device
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    generator = torch.Generator().manual_seed(args.seed)
    queue: list[torch.Tensor] = []
    keep = sorted(args.keep)
    log, start = [], time.perf_counter()
    running, since, step, progress = torch.zeros((), device=device), 0, 0, 0.0
    reported = start
    model.train()
    while progress < 1:
        rate = min(1.0, progress / 0.05 + 0.01) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        if not queue:
            queue = list(torch.randperm(len(pool), generator=generator).split(args.batch))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = token_loss(model, pool[queue.pop().to(device)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        step, since = step + 1, since + 1
        # Every tenth step waits for the device, so that the clock says what was done and not what was asked for.
        if device.type == "cuda" and step % 10 == 0:
            torch.cuda.synchronize()
        now = time.perf_counter()
        progress = max(step / args.steps, (now - start) / args.seconds if args.seconds else 0.0)
        if now - reported >= args.report or progress >= 1:
            log.append({"step": step, "train": round(float(running) / since, 4)})
            running, since, reported = torch.zeros((), device=device), 0, now
            if progress >= 1:
                log[-1] |= {
                    name: round(held_out_loss(model, part, args.batch), 4) for name, part in held_out.items()
                }
            print(f"{args.out.name} {now - start:7.1f} s  {log[-1]}", flush=True)
        while keep and progress >= keep[0]:
            save(model, tokenizer, args.out.with_name(f"{args.out.name}-{keep.pop(0):g}"))
    return log


def save(model: torch.nn.Module, tokenizer: Tokenizer, out: Path) -> None:
    """Config, bf16 safetensors and a fast tokenizer, in terms that transformers 4 and 5 both know."""
    out.mkdir(parents=True, exist_ok=True)
    stored = transformers.Qwen2ForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stored.save_pretrained(out)
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


def describe_weights(folder: Path) -> dict[str, object]:
    """The digest of a folder's weights and what its training.json says of them."""
    record = folder / "training.json"
    return {
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "training": json.loads(record.read_text(encoding="utf-8")) if record.exists() else None,
    }


def prepare(args: argparse.Namespace) -> tuple[Tokenizer, torch.Tensor, dict[str, torch.Tensor], dict]:
    """Tokenizer, training rows [N, T + 1], held-out rows by name, and where the text is from.

    With --prepared they are kept in that folder, and several models with one text and vocabulary make them once.
    """
    words = (args.vocabulary, args.length, args.documentation, args.gsm8k_rows, args.made_up)
    path = args.prepared and args.prepared / f"{'-'.join(map(str, words))}.pt"
    if path and path.exists():
        stored = torch.load(path)
        return Tokenizer.from_str(stored["tokenizer"]), stored["pool"], stored["held_out"], stored["data"]
    parts: dict[str, list[Document]] = {}
    unseen: dict[str, list[Document]] = {}
    data: dict[str, object] = {}
    rng = random.Random(f"tiny|{args.seed}")
    if args.text:
        parts["written"], unseen["written"] = written_by(args.text, args.writer, args.seed)
        data["written"] = [json.loads(path.read_text()) for path in sorted(args.text.glob("text-*.json"))]
    if args.documentation:
        rows = documentation()
        rng.shuffle(rows)
        cut = args.documentation + args.documentation // 50
        parts["documentation"] = render(rows[: args.documentation], rng)
        unseen["documentation"] = render(rows[args.documentation : cut], rng)
    if args.gsm8k_rows:
        parts["gsm8k"] = render(read_rows(args.gsm8k)[: args.gsm8k_rows], rng)
    if args.made_up:
        parts["made up"] = render(varied(args.made_up, args.seed + 1), rng)
    if not parts:
        raise SystemExit("nothing to train on: give --text with --writer, --documentation or both")
    documents = mixed_order([document for part in parts.values() for document in part])
    tokenizer = (
        Tokenizer.from_file(str(args.init / "tokenizer.json"))
        if args.init
        else train_tokenizer([text for text, _ in documents], args.vocabulary)
    )
    pool = pack(tokenizer, documents, args.length)
    held_out = {name: pack(tokenizer, part, args.length) for name, part in unseen.items()}
    data |= {
        "documents": {name: len(part) for name, part in parts.items()},
        "documents_sha256": {name: digest(part) for name, part in parts.items()},
        "characters": {name: sum(len(text) for text, _ in part) for name, part in parts.items()},
        "tokens": pool.shape[0] * args.length,
    }
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = {"tokenizer": tokenizer.to_str(), "pool": pool, "held_out": held_out, "data": data}
        torch.save(stored, path)
    return tokenizer, pool, held_out, data


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings."""
    parser = argparse.ArgumentParser(
        description="Train the embedded proxy model; see the top of this file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--text", type=Path, help="folder of benchmarks.corpora.write_text")
    parser.add_argument("--writer", type=Path, help="folder of the model that wrote it, for its tokenizer")
    parser.add_argument(
        "--documentation", type=int, default=0, help="rows of benchmarks/corpora/docstrings.py to add"
    )
    parser.add_argument(
        "--init", type=Path, help="go on from this folder's weights, in its sizes and with its tokenizer"
    )
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write")
    parser.add_argument(
        "--gsm8k", type=Path, help="GSM8K training split, JSON lines with prompt and completion"
    )
    parser.add_argument("--gsm8k-rows", type=int, default=0, help="rows of it to add")
    parser.add_argument("--made-up", type=int, default=0, help="rows of benchmarks/corpora/made_up.py to add")
    parser.add_argument("--prepared", type=Path, help="folder that keeps tokenizer and tokens")
    parser.add_argument("--only-prepare", action="store_true", help="stop when the text is prepared")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps at most")
    parser.add_argument("--seconds", type=float, help="end after this, the rate's decay with it")
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--inner", type=int, default=480, help="width of the MLP")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--tie", action=argparse.BooleanOptionalAction, default=True, help="tied embeddings")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and text")
    parser.add_argument(
        "--keep", type=float, nargs="*", default=[], help="store the weights at these parts too"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--report", type=float, default=20, help="seconds between losses")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main() -> None:
    """Prepare, train, save, and record."""
    args = parse()
    torch.set_num_threads(args.threads)
    # On a GPU the backward of an embedding has no fast deterministic form.
    torch.use_deterministic_algorithms(args.device == "cpu")
    tokenizer, pool, held_out, data = prepare(args)
    if args.only_prepare:
        return
    size = tokenizer.get_vocab_size()
    # Read now: --out may be the same folder.
    begun_from = args.init and describe_weights(args.init)
    pool = pool.to(args.device)
    held_out = {name: part.to(args.device) for name, part in held_out.items()}
    model = build_model(size, args).to(args.device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.out.name}: {count} parameters, {size} tokens, {data['tokens']} training tokens", flush=True)
    log = train(model, pool, held_out, tokenizer, args)
    save(model, tokenizer, args.out)
    stored = transformers.AutoModelForCausalLM.from_pretrained(args.out).float().to(args.device)
    left_out = ("text", "writer", "init", "out", "gsm8k", "prepared", "only_prepare", "report", "threads")
    record = {
        "parameters": count,
        "uniform_nats_per_token": math.log(size),
        "unigram_nats_per_token": {name: unigram_entropy(pool, x, size) for name, x in held_out.items()},
        "held_out_nats_per_token": {
            name: held_out_loss(stored, x, args.batch) for name, x in held_out.items()
        },
        "begun_from": begun_from,
        "settings": {k: v for k, v in vars(args).items() if k not in left_out},
        "steps": log[-1]["step"],
        "trained_tokens": log[-1]["step"] * args.batch * args.length,
        "data": data,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "log": log,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
