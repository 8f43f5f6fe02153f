"""Check every kernel on a GPU against the reference, then time it, and write what was found.

    python benchmarks/gpu.py [--out benchmarks/results/<gpu>.json] [--seconds 480]

An operation that fails its check, or is not bitwise the same when repeated, is not timed. Times are quantiles of
CUDA events; shares are of this GPU's own copy bandwidth and bf16 matrix rate, measured in the same run. --dry-run
goes through every line with tiny sizes on whatever device there is and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import ROOT, describe_machine
from gpu_checks import DTYPES, cases, relative_error
from shapes import SHAPES

from gvendi_fast import GradientSketcher, SketchSpec, VendiState, ops
from gvendi_fast.backends import NAMES, backend, use_backend

SIZES = [
    (1, 64, 64, 64),
    (63, 50, 300, 256),
    (1000, 896, 4864, 1024),
    (257, 1025, 128, 1024),
    (65, 96, 96, 8192),
]
TIMED = [(65536, 896, 896, 1024), (65536, 896, 4864, 1024)]
QWEN_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


class Bench:
    """The device, its timers and the limits that times are compared with."""

    def __init__(self, device: torch.device, dry: bool, seconds: float) -> None:
        self.device, self.dry, self.deadline = device, dry, time.monotonic() + seconds
        self.copy_rate = self.gemm_rate = None

    def time(self, call: Callable[[], object], rounds: int = 20) -> dict[str, float]:
        """{"p20", "p50", "p80"} in milliseconds."""
        taken = []
        for _ in range(3 if self.dry else rounds):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                taken.append(start.elapsed_time(end))
            else:
                began = time.perf_counter()
                call()
                taken.append(1e3 * (time.perf_counter() - began))
        taken = torch.tensor(sorted(taken[1:]), dtype=torch.float64)
        return {f"p{p}": float(taken.quantile(p / 100)) for p in (20, 50, 80)}

    def limits(self) -> dict[str, float]:
        """Copy bandwidth (bytes read and written a second) and bf16 matrix rate (FLOP/s) of this device."""
        elements, side = (1 << 16, 256) if self.dry else (1 << 30, 8192)
        source = torch.zeros(elements, dtype=torch.bfloat16, device=self.device)
        target = torch.empty_like(source)
        self.copy_rate = 4 * elements / (1e-3 * self.time(lambda: target.copy_(source))["p50"])
        a, b = (torch.randn(side, side, device=self.device).bfloat16() for _ in range(2))
        self.gemm_rate = 2 * side**3 / (1e-3 * self.time(lambda: a @ b)["p50"])
        return {"copy bytes per second": self.copy_rate, "bf16 FLOP per second": self.gemm_rate}

    def late(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() > self.deadline


def check(bench: Bench, name: str) -> dict[str, dict]:
    """{op dtype shape: {error, allowed, repeats}} of one backend; an operation it lacks is left out with its reason."""
    found = {}
    for label, dtype in DTYPES.items():
        for size in SIZES[:2] if bench.dry else SIZES:
            for case in cases(bench.device, dtype, *size):
                entry = f"{case.op} {label} {case.name}"
                probe = [torch.zeros(1, 1, dtype=dtype, device=bench.device)]
                if case.ids:
                    probe.insert(0, torch.zeros(1, dtype=torch.int64, device=bench.device))
                reason = backend(name).why_not(case.op, *probe)
                if reason:
                    found[entry] = {"not run": reason}
                    continue
                with use_backend(name):
                    got, again = case.run(), case.run()
                error = relative_error(got, case.wanted)
                same = bool(torch.equal(got, again))
                found[entry] = {
                    "error": error,
                    "allowed": case.floor,
                    "repeats": same,
                    "ok": same and error <= case.floor,
                }
    return found


def time_operations(bench: Bench, name: str, checked: dict[str, dict]) -> dict[str, dict]:
    """Quantiles and shares of the operations whose checks all passed."""
    found = {}
    for label in ("bf16", "fp32"):
        for size in [(512, 64, 96, 64)] if bench.dry else TIMED:
            for case in timed_cases(bench, DTYPES[label], *size):
                entry = f"{case.op} {label} {case.name}"
                failed = [
                    k for k, v in checked.items() if k.startswith(f"{case.op} {label} ") and not v.get("ok")
                ]
                if failed or bench.late():
                    found[entry] = {
                        "not timed": f"check failed or not run: {failed[0]}" if failed else "out of time"
                    }
                    continue
                with use_backend(name):
                    case.run()
                    times = bench.time(case.run)
                if case.bytes:
                    times["share of copy bandwidth"] = case.bytes / (1e-3 * times["p50"]) / bench.copy_rate
                if case.flops:
                    times["share of bf16 matrix rate"] = case.flops / (1e-3 * times["p50"]) / bench.gemm_rate
                found[entry] = times
    return found


def timed_cases(bench: Bench, dtype: torch.dtype, rows: int, width: int, out_width: int, dim: int):
    """Operations at working size, without the reference's results, which would take minutes."""
    from gpu_checks import Case, split

    from gvendi_fast.plan import make_table
    from gvendi_fast.signs import sign_key

    a, e = (torch.randn(rows, w, device=bench.device).to(dtype) for w in (width, out_width))
    segments, name = split(rows, max(8, rows // 512)), f"{rows}x({width},{out_width}) K={dim}"
    columns, table = make_table(0, "in", width, dim), make_table(0, "out", out_width, dim)
    out, size, none = torch.zeros(len(segments), dim, device=bench.device), a.element_size(), torch.empty(0)
    yield Case(
        "fold_hadamard", name, lambda: ops.fold_hadamard(e, table), none, 0, e.numel() * size + rows * dim * 4
    )
    yield Case(
        "linear_sketch",
        name,
        lambda: ops.linear_sketch(a, columns, [(e, table)], segments, out),
        none,
        0,
        (a.numel() + e.numel()) * size,
    )
    yield Case(
        "vector_sketch",
        name,
        lambda: ops.vector_sketch(a, a, segments, columns, out, "rms", 1e-6),
        none,
        0,
        2 * a.numel() * size,
    )
    few = split(min(rows, 8192), 16)
    key, flops = sign_key(0, "w"), 2 * len(few) * width * out_width * dim
    dense_out = torch.zeros(len(few), dim, device=bench.device)
    yield Case(
        "dense_sketch",
        f"{name} 16 samples",
        lambda: ops.dense_sketch(a[:8192], e[:8192], few, key, dense_out),
        none,
        0,
        0,
        flops,
    )


def end_to_end(bench: Bench) -> dict[str, object]:
    """Tokens a second of sketching and of forward + full backward for the 0.5 B shape, peak memory at 64 k tokens."""
    import transformers

    shape = (
        {**SHAPES["qwen2-15m"].config, "num_hidden_layers": 1, "vocab_size": 512} if bench.dry else QWEN_05B
    )
    length, batch = (16, 2) if bench.dry else (512, 128)
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen2Config(**shape, tie_word_embeddings=True), dtype=torch.bfloat16
        )
    ids = torch.randint(0, shape["vocab_size"], (batch, length))
    sketcher = GradientSketcher(model.eval(), SketchSpec())
    on_device = ids.to(bench.device)

    def train(part):
        model.requires_grad_(True)
        model(input_ids=part, labels=part, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def bare(part):
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(part).requires_grad_()
        hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        hidden.backward(torch.ones_like(hidden))

    sketcher(ids, ids)
    # The plain step holds all logits in float32, so it gets the batch in pieces that fit.
    pieces = on_device.split(2 if bench.dry else 16)
    sketch_ms = bench.time(lambda: sketcher(ids, ids), 7)
    train_ms = bench.time(lambda: [train(p) for p in pieces], 5)
    bare_ms = bench.time(lambda: bare(on_device), 7)
    result = {
        "tokens": ids.numel(),
        "sketch ms": sketch_ms,
        "forward + full backward ms": train_ms,
        "forward + input gradients below the head ms": bare_ms,
        "sketch tokens per second": ids.numel() / (1e-3 * sketch_ms["p50"]),
        "training tokens per second": ids.numel() / (1e-3 * train_ms["p50"]),
        "speed over training": train_ms["p50"] / sketch_ms["p50"],
    }
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        sketcher(ids, ids)
        result["peak memory bytes"] = torch.cuda.max_memory_allocated()
        result["of that weights bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    return result


def spectral(bench: Bench) -> dict[str, object]:
    """Entropy of one K x K matrix and of many small groups."""
    dim, groups = (64, 20) if bench.dry else (1024, 10_000)
    rows = torch.randn(4 * dim, dim, device=bench.device)

    def one():
        state = VendiState(dim, device=bench.device).update(rows)
        return state.entropy()

    many = torch.randn(groups * 64, dim if not bench.dry else 64, device=bench.device)
    boundaries = torch.arange(0, groups * 64 + 1, 64)
    return {
        f"update of {4 * dim} rows and entropy, K = {dim}, ms": bench.time(one, 7),
        f"{groups} groups of 64 rows ms": bench.time(lambda: ops.entropy(many, boundaries), 5),
    }


def devices_agree(bench: Bench) -> dict[str, float]:
    """Smallest cosine between the sketches of one model on the CPU and on this device, float32."""
    from shapes import build

    model, ids = build("qwen2-15m", torch.float32)
    ids = ids[:2, :32] if bench.dry else ids
    with contextlib.ExitStack() as stack:
        if torch.backends.cuda.matmul.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = False
            stack.callback(setattr, torch.backends.cuda.matmul, "allow_tf32", True)
        on_cpu = GradientSketcher(model, SketchSpec())(ids, ids)
        there = GradientSketcher(model.to(bench.device), SketchSpec())(ids, ids).cpu()
    return {"smallest cosine": float(torch.cosine_similarity(on_cpu.double(), there.double()).min())}


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="results file [default: benchmarks/results/<name of the GPU>.json]"
    )
    parser.add_argument(
        "--seconds", type=float, default=480, help="leave out what would start after this time"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on any device, nothing written")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        sys.exit("torch sees no GPU; --dry-run goes through the script without one")
    bench = Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.dry_run, args.seconds)
    label = torch.cuda.get_device_name(0) if bench.device.type == "cuda" else "cpu"
    out = (
        args.out
        or ROOT / "benchmarks" / "results" / f"{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}.json"
    )
    result: dict[str, object] = {"gpu": label, "machine": describe_machine(), "limits": bench.limits()}
    sections: dict[str, Callable[[], object]] = {}
    for name in NAMES:
        sections[f"checks {name}"] = lambda name=name: check(bench, name)
        sections[f"times {name}"] = lambda name=name: time_operations(bench, name, result[f"checks {name}"])
    sections |= {
        "end to end": lambda: end_to_end(bench),
        "spectral": lambda: spectral(bench),
        "cpu and gpu": lambda: devices_agree(bench),
    }
    for title, run in sections.items():
        if bench.late():
            result[title] = {"not measured": "out of time"}
            continue
        result[title] = run()
        print(f"{title}: {json.dumps(result[title])[:2000]}", flush=True)
        if not args.dry_run:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
    failed = [
        k for t, s in result.items() if t.startswith("checks") for k, v in s.items() if v.get("ok") is False
    ]
    print(f"{len(failed)} checks failed{': ' + '; '.join(failed) if failed else ''}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
