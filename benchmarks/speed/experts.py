"""Mixtures of experts on a CPU: sketching a batch beside a training step on it, in turns, in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.experts [--rounds 7] [--out benchmarks/results/experts.json]

Random weights, a Mixtral of 4 layers with 8 experts of which a token sees 2; its random router spreads tokens over all.
A round times, one after the other, the sketch, a training step of the same batch (forward and backward, no optimiser)
and the forward pass with input gradients alone, which any sketch needs; ratios are of one round. Sketches are first
compared with the definition's, of autograd's gradient. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from benchmarks.environment import ROOT, describe_machine
from gvendi_fast import GradientSketcher, SketchSpec
from gvendi_fast.kernels import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETTINGS = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}
BATCH, LENGTH, WARM_UP = 16, 256, 2
# Of a sketch in float32, to the definition's by the cosine; bfloat16 rounds by 1/256.
LEAST_COSINE = {"fp32": 1 - 1e-6, "bf16": 0.99}


def build(dtype: torch.dtype, settings: dict[str, int]) -> nn.Module:
    """The model in eval mode."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def training_step(model: nn.Module, ids: torch.Tensor) -> None:
    """Forward and backward over all parameters."""
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def input_gradients(model: nn.Module, ids: torch.Tensor) -> None:
    """Forward, and backward to the embedding's output alone."""
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    model.requires_grad_(True)


def cosine_to_definition(model: nn.Module, sketcher: GradientSketcher, ids: torch.Tensor) -> float:
    """Cosine of the sketch of one sample to the definition's, of the gradient that autograd gives."""
    model.requires_grad_(True)
    logits = model(input_ids=ids[:1], use_cache=False).logits[0].float()
    nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wanted = reference.sketch_of_gradient(gradients, sketcher.spec, sketcher.transposed, sketcher.stacked)
    model.zero_grad(set_to_none=True)
    return float(torch.cosine_similarity(sketcher(ids[:1], ids[:1])[0].double(), wanted, dim=0))


def measure(name: str, settings: dict[str, int], batch: int, length: int, rounds: int) -> dict[str, Any]:
    """Quantiles of seconds, and of the ratios of rounds, for one number format."""
    model = build(DTYPES[name], settings)
    ids = torch.randint(
        0, settings["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(0)
    )
    sketcher = GradientSketcher(model, SketchSpec())
    cosine = cosine_to_definition(model, sketcher, ids)
    if not cosine >= LEAST_COSINE[name]:
        raise SystemExit(f"the sketch in {name} has the cosine {cosine} to the definition's; it is not timed")
    calls: dict[str, Callable[[], object]] = {
        "sketch": lambda: sketcher(ids, ids),
        "training step": lambda: training_step(model, ids),
        "forward + input gradients": lambda: input_gradients(model, ids),
    }
    taken: dict[str, list[float]] = {call: [] for call in calls}
    for turn in range(WARM_UP + rounds):
        for call, function in calls.items():
            began = time.perf_counter()
            function()
            if turn >= WARM_UP:
                taken[call].append(time.perf_counter() - began)
    ratios = {
        f"ratio to {call}": quantiles([a / b for a, b in zip(taken["sketch"], times, strict=True)])
        for call, times in taken.items()
        if call != "sketch"
    }
    return {
        "cosine to the definition": cosine,
        "seconds": {call: quantiles(times) for call, times in taken.items()},
        **ratios,
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    return {f"p{p}": float(np.percentile(values, p)) for p in (20, 50, 80)}


def main() -> None:
    """Measure both formats and write one JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.experts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "experts.json")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "settings": {**SETTINGS, "batch": BATCH, "length": LENGTH, "rounds": args.rounds, "seed": 0},
    }
    for name in DTYPES:
        results[name] = measure(name, SETTINGS, BATCH, LENGTH, args.rounds)
        print(name, json.dumps(results[name]), flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
