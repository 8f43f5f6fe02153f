"""Every operation at working size on one backend: times, and shares of the copy bandwidth or of a matrix rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu.checks import BACKENDS, DTYPES
from benchmarks.gpu.timing import Bench, Figure, NotMeasuredError, over
from benchmarks.shapes import DENSE_SAMPLES, TIMED_DIM, TIMED_LENGTH, TIMED_ROWS, TIMED_WIDTHS
from gvendi_fast.kernels import ops
from gvendi_fast.kernels.backends import backend, use_backend
from gvendi_fast.kernels.signs import sign_key
from gvendi_fast.kernels.sketch_matrix import (
    SketchSpec,
    expert_column_tables,
    expert_row_tables,
    make_table,
)
from gvendi_fast.sketching.gradients.head_chunks import head_chunk_rows

# As `head_sketch` calls it for this vocabulary.
VOCABULARY = 151936
EXPERTS = 8


@dataclass(frozen=True)
class Work:
    """One call, the bytes it must at least move, or the floating-point operations that its formula has."""

    shape: str
    run: Callable[[], object]
    bytes: int = 0
    flops: int = 0
    rate: str = ""


def figures(section: str, bench: Bench) -> Iterator[Figure]:
    """One figure for each backend, operation, dtype and shape."""
    widths = [(64, 96), (64, 64)] if bench.dry else TIMED_WIDTHS
    for label in ("bf16", "fp32"):
        for name in BACKENDS[bench.device.type]:
            for works in (layer_works, other_works):
                for width, out_width in widths if works is layer_works else widths[-1:]:
                    for op, make in works(bench, label, width, out_width).items():
                        if hasattr(backend(name), op):
                            yield Figure(
                                f"{name} {op} {label} {width}x{out_width}",
                                lambda n=name, o=op, d=label, m=make: time_operation(bench, n, o, d, m),
                            )


def time_operation(
    bench: Bench, name: str, op: str, label: str, make: Callable[[], Work]
) -> dict[str, object]:
    """Times of one operation, and its share of the limit that it meets first."""
    probe = torch.empty(1, 64, dtype=DTYPES[label], device=bench.device)
    if reason := backend(name).why_not(op, probe):
        raise NotMeasuredError(reason)
    limits, work = bench.limits(), make()
    found: dict[str, object] = {"backend": name, "op": op, "dtype": label, "shape": work.shape}
    with use_backend(name):
        found |= bench.time(work.run)
    found["kernels"] = {op: name}
    if work.bytes:
        rate = limits["copy bytes per second"]["p50"]
        found["share of copy bandwidth"] = over(work.bytes / rate, found["milliseconds"])
    if work.flops:
        rate = limits[work.rate]["p50"]
        found[f"share of {work.rate}"] = over(work.flops / rate, found["milliseconds"])
    return found


def sizes(bench: Bench) -> tuple[int, int, int]:
    """Rows, their samples' length, and K."""
    return (128, 32, 64) if bench.dry else (TIMED_ROWS, TIMED_LENGTH, TIMED_DIM)


def batch(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    """The segments of a batch of samples of one length, and a sketch to add to."""
    rows, length, dim = sizes(bench)
    starts = torch.arange(0, rows, length)
    segments = torch.stack([starts, starts + length], dim=1)
    return segments, torch.zeros(len(segments), dim, device=bench.device)


def layer_works(bench: Bench, label: str, width: int, out_width: int) -> dict[str, Callable[[], Work]]:
    """What a linear layer needs."""
    rows, _, dim = sizes(bench)
    columns, table = make_table(0, "in", width, dim), make_table(0, "out", out_width, dim)
    shape = f"{rows} x ({width}, {out_width})"

    def inputs(count: int) -> list[torch.Tensor]:
        return [normal(count, w, DTYPES[label], bench.device) for w in (width, out_width)]

    def linear() -> Work:
        (a, e), (segments, out) = inputs(rows), batch(bench)
        return Work(
            shape,
            lambda: ops.linear_sketch(a, columns, [(e, table)], segments, out),
            (a.numel() + e.numel()) * a.element_size(),
        )

    def experts() -> Work:
        """As many rows as `linear`, of EXPERTS experts, sorted by expert; what it takes longer is the experts' cost."""
        (a, e), (segments, out) = inputs(rows), batch(bench)
        spec, device = SketchSpec(dim), bench.device
        kept = (
            expert_column_tables(spec, "experts", EXPERTS, width),
            expert_row_tables(spec, "experts", EXPERTS, out_width),
        )
        expert = torch.arange(rows, device=device) * EXPERTS // rows
        sample = torch.arange(rows, device=device) % (rows // EXPERTS) * len(segments) // (rows // EXPERTS)
        return Work(
            shape,
            # Copies, since a call with the rows of the last one finds them in order.
            lambda: ops.expert_sketch(a, e, expert.clone(), sample.clone(), *kept, out),
            (a.numel() + e.numel()) * a.element_size() + 16 * rows,
        )

    def fold() -> Work:
        e = normal(rows, out_width, DTYPES[label], bench.device)
        size = e.numel() * e.element_size() + 4 * rows * dim
        return Work(f"{rows} x {out_width}", lambda: ops.fold_hadamard(e, table), size)

    def dense() -> Work:
        segments, out = (x[:DENSE_SAMPLES].contiguous() for x in batch(bench))
        used, key = int(segments[-1, 1]), sign_key(0, "layer.weight")
        a, e = inputs(used)
        return Work(
            f"{used} x ({width}, {out_width})",
            lambda: ops.dense_sketch(a, e, segments, key, out),
            flops=2 * width * out_width * (used + len(segments) * dim),
            rate="bf16 FLOP per second",
        )

    return {"linear_sketch": linear, "expert_sketch": experts, "fold_hadamard": fold, "dense_sketch": dense}


def other_works(bench: Bench, label: str, width: int, out_width: int) -> dict[str, Callable[[], Work]]:
    """What norms, embeddings, the head and the score need."""
    rows, _, dim = sizes(bench)
    vocabulary = 500 if bench.dry else VOCABULARY
    columns, tokens = make_table(0, "in", width, dim), make_table(0, "vocabulary", vocabulary, dim)
    shape, dtype, device = f"{rows} x {width}", DTYPES[label], bench.device

    def vector() -> Work:
        (segments, out), (x, e) = batch(bench), (normal(rows, width, dtype, device) for _ in range(2))
        return Work(
            shape,
            lambda: ops.vector_sketch(x, e, segments, columns, out, "rms", 1e-6),
            2 * e.numel() * e.element_size(),
        )

    def token() -> Work:
        (segments, out), e = batch(bench), normal(rows, width, dtype, device)
        ids = torch.randint(0, vocabulary, (rows,), device=device)
        return Work(
            shape,
            lambda: ops.token_sketch(ids, e, segments, tokens, columns, out),
            e.numel() * e.element_size() + 8 * rows,
        )

    def softmax() -> Work:
        chunk = min(rows, head_chunk_rows(vocabulary, dtype.itemsize, device.type))
        logits = normal(chunk, vocabulary, dtype, device)
        ids = torch.randint(0, vocabulary, (chunk,), device=device)
        return Work(
            f"{chunk} x {vocabulary}",
            lambda: ops.softmax_fold(logits, ids, tokens),
            2 * logits.numel() * logits.element_size() + 4 * chunk * dim,
        )

    def covariance() -> Work:
        z = normal(rows, dim, dtype, device)
        master = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        return Work(
            f"{rows} x {dim}",
            lambda: ops.covariance(z, master),
            flops=2 * rows * dim * dim,
            rate="fp32 FLOP per second",
        )

    # Sketches are float32.
    scores = {"covariance": covariance} if label == "fp32" else {}
    return {"vector_sketch": vector, "token_sketch": token, "softmax_fold": softmax, **scores}


def normal(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Gaussian numbers made on the device."""
    return torch.empty(rows, width, dtype=dtype, device=device).normal_()
