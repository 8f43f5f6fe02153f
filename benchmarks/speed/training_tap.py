"""A training step with a tap beside the same step without, in turns, in one process.

    OMP_NUM_THREADS=2 python -m benchmarks.speed.training_tap [--rounds 5] [--memory] [--out FILE]

A step is a forward and a backward pass over all parameters, without the optimiser, whose time would make ratios
smaller. A round times, one after the other, the step alone, with a tap on all layers, with one on the last four (where
the model has more), and the step followed by a sketcher's own pass over the batch; ratios are of one round. For the
smaller model in float32 ten steps of which one is tapped, attaching and detaching among them, are timed beside ten
plain ones. The tap's sketches are first compared with the sketcher's own of the same samples. Memory: bytes that
autograd keeps from the forward to the backward pass, and the largest resident size of a process of its own for each.
Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.environment import ROOT, describe_machine
from benchmarks.shapes import SHAPES, build
from benchmarks.speed.experts import quantiles
from gvendi_fast import GradientSketcher, SketchSpec
from gvendi_fast.sketching.gradients.training_tap import TrainingTap

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP, EVERY, LAST = 1, 10, 4
# Of a tap's sketch to the sketcher's own, whose head is folded in float32.
LEAST_COSINE = {"fp32": 1 - 1e-5, "bf16": 0.999}
PLAIN, FULL, LATE, OWN = "plain", "tap", f"tap on the last {LAST} layers", "pass of its own"


def step(model: nn.Module, ids: torch.Tensor) -> None:
    """Forward and backward over all parameters."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def tapped_step(tap: TrainingTap, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The step under a tap that is attached for it."""
    with tap:
        step(model, ids)
        return tap.take().z


def several(model: nn.Module, ids: torch.Tensor, tap: TrainingTap | None) -> None:
    """Ten steps, the first one under the tap if there is one."""
    for number in range(EVERY):
        if tap is not None and number == 0:
            tapped_step(tap, model, ids)
        else:
            step(model, ids)


def kept_bytes(forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps from a forward to its backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    del out
    return sum(kept.values())


def measure(shape: str, dtype: str, rounds: int) -> dict[str, Any]:
    """Ratios and memory of one shape in one number format."""
    model, ids = build(shape, DTYPES[dtype])
    sketcher = GradientSketcher(model, SketchSpec())
    tap = sketcher.tap(model)
    cosine = float(torch.cosine_similarity(tapped_step(tap, model, ids), sketcher(ids, ids)).min())
    if not cosine >= LEAST_COSINE[dtype]:
        raise SystemExit(f"{shape} in {dtype}: a tap's sketch has the cosine {cosine}; it is not timed")
    calls: dict[str, Callable[[], object]] = {
        PLAIN: lambda: step(model, ids),
        FULL: lambda: tapped_step(tap, model, ids),
    }
    if model.config.num_hidden_layers > LAST:
        late = GradientSketcher(model, SketchSpec(), layers=f"last-{LAST}").tap(model)
        calls[LATE] = lambda: tapped_step(late, model, ids)
        # Ten steps of the larger model, or of bfloat16 on a CPU, would take minutes.
        if dtype == "fp32":
            calls[f"{EVERY} plain steps"] = lambda: several(model, ids, None)
            calls[f"{EVERY} steps, one tapped"] = lambda: several(model, ids, tap)
    calls[OWN] = lambda: (step(model, ids), sketcher(ids, ids))
    taken: dict[str, list[float]] = {call: [] for call in calls}
    for turn in range(WARM_UP + rounds):
        for call, function in calls.items():
            began = time.perf_counter()
            function()
            if turn >= WARM_UP:
                taken[call].append(time.perf_counter() - began)
    ratios = {
        call: quantiles([a / b for a, b in zip(times, taken[PLAIN], strict=True)])
        for call, times in taken.items()
        if call in (FULL, LATE, OWN)
    }
    if f"{EVERY} plain steps" in taken:
        plain, one = (taken[call] for call in (f"{EVERY} plain steps", f"{EVERY} steps, one tapped"))
        ratios[f"tap every {EVERY} steps"] = quantiles([a / b for a, b in zip(one, plain, strict=True)])
    with tap:
        with_tap = kept_bytes(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    return {
        "least cosine to the sketcher's own": cosine,
        "ratio to a plain step": ratios,
        "seconds": {call: quantiles(times) for call, times in taken.items()},
        "bytes kept for the backward pass": {
            PLAIN: kept_bytes(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss),
            FULL: with_tap,
        },
        "largest resident bytes": _resident_sizes(shape, dtype),
    }


def _resident_sizes(shape: str, dtype: str) -> dict[str, int]:
    return {which: _resident(shape, dtype, which) for which in (PLAIN, FULL)}


def _resident(shape: str, dtype: str, which: str) -> int:
    """The largest resident size of a process that runs three such steps."""
    command = [sys.executable, "-m", "benchmarks.speed.training_tap", "--resident", shape, dtype, which]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def _print_resident(shape: str, dtype: str, which: str) -> None:
    model, ids = build(shape, DTYPES[dtype])
    tap = GradientSketcher(model, SketchSpec()).tap(model) if which == FULL else None
    for _ in range(3):
        step(model, ids) if tap is None else tapped_step(tap, model, ids)
    # Not getrusage's, which a process has from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024)


def main() -> None:
    """Measure every shape in both formats and write one JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.training_tap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "training_tap.json")
    parser.add_argument(
        "--memory", action="store_true", help="resident sizes alone, into a file that is there"
    )
    parser.add_argument("--resident", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resident:
        _print_resident(*args.resident)
        return
    if args.memory:
        results: dict[str, Any] = json.loads(args.out.read_text())
        for name in [name for name in results if name.partition(" ")[0] in SHAPES]:
            results[name]["largest resident bytes"] = _resident_sizes(*name.split(" "))
            print(name, results[name]["largest resident bytes"], flush=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
        return
    results = {"machine": describe_machine(), "settings": {"rounds": args.rounds, "seed": 0}}
    for shape in SHAPES:
        for dtype in DTYPES:
            results[f"{shape} {dtype}"] = measure(shape, dtype, args.rounds)
            print(shape, dtype, json.dumps(results[f"{shape} {dtype}"]), flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
