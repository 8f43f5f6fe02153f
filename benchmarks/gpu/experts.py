"""Mixtures of experts on a GPU: sketching a batch beside a training step on it, in turns.

Random weights in bfloat16; routers of random weights spread tokens evenly. Both run transformers' grouped experts, one
matrix product for all experts of a layer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from benchmarks.gpu.model import DTYPE, Step, make_sketcher, peak_bytes, prefer, ratios, what_fits
from benchmarks.gpu.timing import Bench, Figure, quantiles

# A Qwen3-MoE of each. experts: (of a layer, that a token is sent to).
COMMON = {"vocab_size": 32000, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
MODELS = {
    "8 of 2": {"hidden_size": 1024, "moe_intermediate_size": 2048, "num_hidden_layers": 8, "experts": (8, 2)},
    "64 of 8": {
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 8,
        "experts": (64, 8),
    },
}
BATCH, LENGTH = 64, 512


def figures(section: str, bench: Bench) -> Iterator[Figure]:
    """Each model with the kernels that users get."""
    for name in MODELS:
        yield Figure(f"experts, {name}", lambda n=name: experts(bench, n), seconds=60)


def experts(bench: Bench, name: str) -> dict[str, object]:
    """Sketching a batch, a training step on it, and forward + input gradients, in turns."""
    import transformers

    values = {**COMMON, **MODELS[name]}
    count, each = values.pop("experts")
    if bench.dry:
        values |= {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 128}
    torch.manual_seed(0)
    with bench.device:
        config = transformers.Qwen3MoeConfig(
            **values, intermediate_size=values["hidden_size"], num_experts=count, num_experts_per_tok=each
        )
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    batch, length = (4, 16) if bench.dry else (BATCH, LENGTH)
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    best = "cuda" if bench.device.type == "cuda" else "cpu"
    with prefer(best, bench.device):
        sketcher = make_sketcher(model, False)
        began = time.perf_counter()
        ids = what_fits(bench, sketcher, ids)
        first = time.perf_counter() - began
        peak = peak_bytes(bench, lambda: sketcher(ids, ids))
        step = Step(bench, model, ids)
        calls = {
            "sketch": lambda: sketcher(ids, ids),
            "training": step.train,
            "forward + input gradients": step.inputs_only,
        }
        for call in calls.values():
            call()
        taken = bench.take_turns(calls, 5)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "experts": count,
        "experts a token": each,
        "tokens": ids.numel(),
        "dtype": "bf16",
        "experts' implementation": getattr(config, "_experts_implementation", None),
        "samples a piece of training": step.piece,
        "first call seconds": round(first, 2),
        "peak memory bytes": peak,
        "milliseconds": {n: quantiles(times) for n, times in taken.items()},
        "tokens per second": {n: quantiles([1e3 * ids.numel() / t for t in ts]) for n, ts in taken.items()},
        **{f"speed over {n}": ratios(taken[n], taken["sketch"]) for n in calls if n != "sketch"},
    }
