"""Every operation at working size on one backend: times, and shares of the copy bandwidth or of a matrix rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gpu_checks import DTYPES, verdict
from gpu_timing import Bench, over
from shapes import DENSE_SAMPLES, TIMED_DIM, TIMED_LENGTH, TIMED_ROWS, TIMED_WIDTHS

from gvendi_fast import ops
from gvendi_fast.backends import backend, use_backend
from gvendi_fast.plan import make_table
from gvendi_fast.signs import sign_key

# As `head_sketch` calls it for this vocabulary.
VOCABULARY = 151936


@dataclass(frozen=True)
class Work:
    """One call, the bytes it must at least move, or the floating-point operations that its formula has."""

    op: str
    shape: str
    run: Callable[[], object]
    bytes: int = 0
    flops: int = 0
    rate: str = ""


def time_operations(bench: Bench, name: str, checked: dict[str, dict]) -> dict[str, object]:
    """{"limits", "complete", "operations": [one entry for each operation, dtype and shape]} of a backend.

    An operation whose checks did not all pass, or that the time did not suffice for, has the reason in place of times.
    """
    found = []
    for label in ("bf16", "fp32"):
        for work in works(bench, label):
            entry: dict[str, object] = {"op": work.op, "dtype": label, "shape": work.shape}
            found.append(entry)
            lacks = None if hasattr(backend(name), work.op) else "PyTorch's own is the implementation"
            reason = lacks or verdict(checked, work.op, label) or ("out of time" if bench.late() else None)
            if reason:
                entry["not timed"] = reason
                continue
            with use_backend(name):
                entry |= bench.time(work.run)
            entry["largest error in checks"] = checked["operations"][f"{work.op} {label}"]["largest error"]
            if work.bytes:
                rate = bench.limits()["copy bytes per second"]["p50"]
                entry["share of copy bandwidth"] = over(work.bytes / rate, entry["milliseconds"])
            if work.flops:
                rate = bench.limits()[work.rate]["p50"]
                entry[f"share of {work.rate}"] = over(work.flops / rate, entry["milliseconds"])
    complete = all(entry.get("not timed") != "out of time" for entry in found)
    return {"limits": bench.limits(), "complete": complete, "operations": found}


def works(bench: Bench, label: str) -> Iterator[Work]:
    """The operations of a batch of samples of one length, at the widths of a 0.5 B model."""
    dtype, device = DTYPES[label], bench.device
    rows, length, dim = (128, 32, 64) if bench.dry else (TIMED_ROWS, TIMED_LENGTH, TIMED_DIM)
    starts = torch.arange(0, rows, length)
    segments = torch.stack([starts, starts + length], dim=1)
    for width, out_width in [(64, 96), (64, 64)] if bench.dry else TIMED_WIDTHS:
        yield from layer_works(dtype, device, segments, width, out_width, dim)
        if width == out_width:
            vocabulary = 500 if bench.dry else VOCABULARY
            yield from other_works(dtype, device, segments, width, vocabulary, dim)


def layer_works(
    dtype: torch.dtype, device: torch.device, segments: torch.Tensor, width: int, out_width: int, dim: int
) -> Iterator[Work]:
    """What a linear layer needs."""
    rows, out = int(segments[-1, 1]), torch.zeros(len(segments), dim, device=device)
    a, e = (normal(rows, w, dtype, device) for w in (width, out_width))
    columns, table = make_table(0, "in", width, dim), make_table(0, "out", out_width, dim)
    shape, size = f"{rows} x ({width}, {out_width})", a.element_size()
    yield Work(
        "linear_sketch",
        shape,
        lambda: ops.linear_sketch(a, columns, [(e, table)], segments, out),
        (a.numel() + e.numel()) * size,
    )
    yield Work(
        "fold_hadamard",
        f"{rows} x {out_width}",
        lambda: ops.fold_hadamard(e, table),
        e.numel() * size + 4 * rows * dim,
    )
    few = segments[:DENSE_SAMPLES].contiguous()
    used, key = int(few[-1, 1]), sign_key(0, "layer.weight")
    yield Work(
        "dense_sketch",
        f"{used} x ({width}, {out_width})",
        lambda: ops.dense_sketch(a[:used], e[:used], few, key, out[: len(few)]),
        flops=2 * width * out_width * (used + len(few) * dim),
        rate="bf16 FLOP per second",
    )


def other_works(
    dtype: torch.dtype, device: torch.device, segments: torch.Tensor, width: int, vocabulary: int, dim: int
) -> Iterator[Work]:
    """What norms, embeddings, the head and the score need."""
    rows, out = int(segments[-1, 1]), torch.zeros(len(segments), dim, device=device)
    x, e = (normal(rows, width, dtype, device) for _ in range(2))
    size, shape = e.element_size(), f"{rows} x {width}"
    columns, tokens = make_table(0, "in", width, dim), make_table(0, "vocabulary", vocabulary, dim)
    yield Work(
        "vector_sketch",
        shape,
        lambda: ops.vector_sketch(x, e, segments, columns, out, "rms", 1e-6),
        2 * e.numel() * size,
    )
    ids = torch.randint(0, vocabulary, (rows,), device=device)
    yield Work(
        "token_sketch",
        shape,
        lambda: ops.token_sketch(ids, e, segments, tokens, columns, out),
        e.numel() * size + 8 * rows,
    )
    chunk = min(rows, ops.head_chunk_rows(vocabulary, size, device.type))
    logits = normal(chunk, vocabulary, dtype, device)
    yield Work(
        "softmax_fold",
        f"{chunk} x {vocabulary}",
        lambda: ops.softmax_fold(logits, ids[:chunk], tokens),
        2 * logits.numel() * size + 4 * chunk * dim,
    )
    if dtype == torch.float32:
        z, master = (
            normal(rows, dim, dtype, device),
            torch.zeros(dim, dim, dtype=torch.float64, device=device),
        )
        yield Work(
            "covariance",
            f"{rows} x {dim}",
            lambda: ops.covariance(z, master),
            flops=2 * rows * dim * dim,
            rate="fp32 FLOP per second",
        )


def normal(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Gaussian numbers made on the device."""
    return torch.empty(rows, width, dtype=dtype, device=device).normal_()
