"""Text that SmolLM2-135M-Instruct writes: training text for `tiny`.

    python -m benchmarks.corpora.write_text MODEL_FOLDER OUT_FOLDER --seconds 150 --batch 3072

MODEL_FOLDER is a Llama in Hugging Face's format with a chat template. Round r of a seed answers its own requests
(benchmarks/corpora/text_prompts.py) and writes OUT_FOLDER/text-SEED-RRR.npz: the documents' token ids one after the
other, where each begins, and which were cut off; text-SEED.json says how they were drawn. The same machine, versions
and batch give the same text; elsewhere sums differ in their last bits and the draws with them.

A loop of its own, without prefill: a batch of B rows takes one position at a time, a row is fed the tokens of its
request and then what it draws, and when a document ends the row begins the next request at the next position, with a
mask that hides what went before. So every step does the same work on all rows, none waits for the longest, and the
key-value cache is one static tensor. Rotary positions are relative, so a document does not see where it begins.

The draw: of the TOP likeliest tokens those whose probability at temperature 1 is at least MIN_P of the largest, by
Gumbel's maximum.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from benchmarks.corpora.text_prompts import ask

MIN_P, TOP = 0.05, 64
# A request of more tokens than this is passed over.
LONGEST_REQUEST = 96


class Decoder:
    """A Llama that takes one token of every row at a position. cache[layer]: keys and values [B, KV, T, D] each."""

    def __init__(self, folder: Path, batch: int, positions: int, device: str, dtype: torch.dtype) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        config = model.config
        if config.model_type != "llama":
            raise SystemExit(f"{folder} is a {config.model_type}; this loop computes a llama alone")
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.width = config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.embedding, self.head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
        self.norm = model.model.norm.weight.data
        self.layers = [
            {
                "norm": layer.input_layernorm.weight.data,
                "qkv": torch.cat(
                    [getattr(layer.self_attn, f"{name}_proj").weight.data for name in "qkv"]
                ).T.contiguous(),
                "out": layer.self_attn.o_proj.weight.data.T.contiguous(),
                "second norm": layer.post_attention_layernorm.weight.data,
                "gate and up": torch.cat(
                    [layer.mlp.gate_proj.weight.data, layer.mlp.up_proj.weight.data]
                ).T.contiguous(),
                "down": layer.mlp.down_proj.weight.data.T.contiguous(),
            }
            for layer in model.model.layers
        ]
        shape = (len(self.layers), 2, batch, self.kv, positions, self.width)
        self.cache = torch.zeros(shape, device=device, dtype=dtype)
        rotary = model.model.rotary_emb
        places = torch.arange(positions, device=device)[None]
        cos, sin = rotary(torch.zeros(1, 1, device=device, dtype=dtype), places)
        self.cos, self.sin = cos[0], sin[0]
        self.places = places[0]

    def rotate(self, x: Tensor, at: int) -> Tensor:
        """x [B, heads, D] at position `at`."""
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * self.cos[at] + turned * self.sin[at]

    @torch.no_grad()
    def step(self, tokens: Tensor, begins: Tensor, at: int) -> Tensor:
        """Logits [B, V] after tokens [B] at position `at`; begins [B]: the first position that a row may see."""
        x = self.embedding[tokens]
        batch, group = len(tokens), self.heads // self.kv
        hidden = (self.places[: at + 1] < begins[:, None])[:, None, None]
        for layer, cache in zip(self.layers, self.cache, strict=True):
            h = functional.rms_norm(x, x.shape[-1:], layer["norm"], self.eps) @ layer["qkv"]
            q, k, v = h.view(batch, -1, self.width).split([self.heads, self.kv, self.kv], dim=1)
            cache[0, :, :, at] = self.rotate(k, at)
            cache[1, :, :, at] = v
            keys, values = (part.flatten(0, 1)[:, : at + 1] for part in cache)
            q = self.rotate(q, at).reshape(batch * self.kv, group, self.width) * self.width**-0.5
            weights = torch.bmm(q, keys.transpose(1, 2)).view(batch, self.kv, group, at + 1)
            weights = weights.masked_fill(hidden, float("-inf")).softmax(-1)
            mixed = torch.bmm(weights.view(batch * self.kv, group, at + 1), values)
            x = x + mixed.reshape(batch, -1) @ layer["out"]
            h = functional.rms_norm(x, x.shape[-1:], layer["second norm"], self.eps) @ layer["gate and up"]
            gate, up = h.chunk(2, dim=-1)
            x = x + (functional.silu(gate) * up) @ layer["down"]
        return functional.rms_norm(x, x.shape[-1:], self.norm, self.eps) @ self.head.T


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each row [B], of the TOP likeliest those whose probability is at least MIN_P of the largest."""
    values, tokens = logits.topk(min(TOP, logits.shape[-1]), -1)
    values = values.float()
    noise = torch.empty_like(values).exponential_(generator=generator).log_()
    least = values[:, :1] + float(np.log(MIN_P))
    chosen = (values - noise).masked_fill_(values < least, float("-inf")).argmax(-1, keepdim=True)
    return tokens.gather(1, chosen)[:, 0]


def requests(tokenizer, seed: int, first: int, count: int) -> list[list[int]]:
    """Token ids of the requests first, ..., first + count - 1, those too long left out."""
    texts = []
    for i in range(first, first + count):
        kind, text = ask(seed, i)
        if kind == "chat":
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        else:
            text = "<|endoftext|>" + text
        texts.append(text)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [row for row in ids if 0 < len(row) <= LONGEST_REQUEST]


def write_round(
    decoder: Decoder, queue: list[list[int]], ends: list[int], generator: torch.Generator
) -> list[tuple[list[int], bool]]:
    """Documents (token ids, whether cut off) of one round over all positions. queue: requests, ids each.

    Row b takes requests b, b + B, b + 2 B, ... A row whose requests are used up begins them again, and what it then
    writes is another document.
    """
    batch, positions = decoder.cache.shape[2], decoder.cache.shape[4]
    device = decoder.cache.device
    each = len(queue) // batch
    if each < 1:
        raise ValueError(f"{len(queue)} requests for {batch} rows; wanted one each at least")
    table = torch.zeros(each, batch, LONGEST_REQUEST, dtype=torch.long)
    lengths = torch.zeros(each, batch, dtype=torch.long)
    for i, ids in enumerate(queue[: each * batch]):
        table[i // batch, i % batch, : len(ids)] = torch.tensor(ids)
        lengths[i // batch, i % batch] = len(ids)
    table, lengths = table.to(device), lengths.to(device)
    rows = torch.arange(batch, device=device)
    number = torch.zeros(batch, dtype=torch.long, device=device)
    begins = torch.zeros(batch, dtype=torch.long, device=device)
    ending = torch.tensor(ends, device=device)
    written = torch.zeros(positions, batch, dtype=torch.long, device=device)
    starts = torch.zeros(positions, batch, dtype=torch.bool, device=device)
    tokens = table[0, :, 0]
    starts[0] = True
    for at in range(positions):
        written[at] = tokens
        logits = decoder.step(tokens, begins, at)
        if at + 1 == positions:
            break
        drawn = draw(logits, generator)
        place = at + 1 - begins
        request = number % each
        asked = place < lengths[request, rows]
        # A document ends where a token that was drawn, and not given, is an ending one.
        ended = torch.isin(tokens, ending) & (at - begins >= lengths[request, rows])
        begins = torch.where(ended, at + 1, begins)
        starts[at + 1] = ended
        number = number + ended
        given = table[number % each, rows, torch.where(ended, 0, place.clamp(max=LONGEST_REQUEST - 1))]
        tokens = torch.where(asked | ended, given, drawn)
    written, starts = written.T.cpu().numpy(), starts.T.cpu().numpy()
    documents = []
    for row, first in zip(written, starts, strict=True):
        borders = [*np.flatnonzero(first).tolist(), positions]
        for a, b in itertools.pairwise(borders):
            documents.append((row[a:b].tolist(), b == positions))
    return documents


def store(documents: list[tuple[list[int], bool]], path: Path) -> None:
    """Token ids uint16 or int32, begins int64 [N], cut bool [N]."""
    flat = np.concatenate([np.asarray(ids) for ids, _ in documents])
    flat = flat.astype(np.uint16 if flat.max() < 1 << 16 else np.int32)
    begins = np.cumsum([0, *(len(ids) for ids, _ in documents)])[:-1]
    np.savez_compressed(path, ids=flat, begins=begins, cut=np.array([cut for _, cut in documents]))


def read_texts(folder: Path, tokenizer: tokenizers.Tokenizer) -> list[tuple[str, bool]]:
    """(text, whether cut off) of every document in a folder's files, in their order, special tokens written out."""
    texts = []
    for path in sorted(folder.glob("text-*.npz")):
        stored = np.load(path)
        parts = np.split(stored["ids"].astype(np.int64), stored["begins"][1:])
        decoded = tokenizer.decode_batch([part.tolist() for part in parts], skip_special_tokens=False)
        texts += zip(decoded, stored["cut"].tolist(), strict=True)
    return texts


def main() -> None:
    """Write rounds until the time is up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of the writer")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of requests and draws (default 0)")
    parser.add_argument("--seconds", type=float, default=150, help="no round begins after this (default 150)")
    parser.add_argument("--rounds", type=int, default=1000, help="at most so many rounds (default 1000)")
    parser.add_argument("--batch", type=int, default=3072, help="rows at a time (default 3072)")
    parser.add_argument("--positions", type=int, default=640, help="tokens of a row (default 640)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    start = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    decoder = Decoder(args.model, args.batch, args.positions, args.device, torch.bfloat16)
    args.out.mkdir(parents=True, exist_ok=True)
    each = args.batch * max(1, args.positions // 160)
    tokens, documents, took = 0, 0, []
    for number in range(args.rounds):
        began = time.perf_counter()
        # The last round is not begun where it would end late.
        if number and began - start + max(took) > args.seconds:
            break
        generator = torch.Generator(args.device).manual_seed(args.seed * 100_003 + number)
        queue = requests(tokenizer, args.seed, number * each, each)
        written = write_round(decoder, queue, ends, generator)
        store(written, args.out / f"text-{args.seed}-{number:03}.npz")
        took.append(time.perf_counter() - began)
        tokens, documents = tokens + args.batch * args.positions, documents + len(written)
        print(
            f"round {number}: {documents} documents, {tokens} tokens, "
            f"{args.batch * args.positions / took[-1]:.0f} tokens/s",
            flush=True,
        )
        record = {
            "writer": json.loads((args.model / "config.json").read_text()).get(
                "_name_or_path", args.model.name
            ),
            "seed": args.seed,
            "batch": args.batch,
            "positions": args.positions,
            "rounds": len(took),
            "documents": documents,
            "tokens": tokens,
            "min_p": MIN_P,
            "top": TOP,
            "seconds": round(time.perf_counter() - start),
            "dtype": "bfloat16",
            "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
        }
        # After every round, so that a run which is ended early is described too.
        (args.out / f"text-{args.seed}.json").write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
