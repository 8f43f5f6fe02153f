"""Cases for the GPU benchmark: every operation on a device against the float64 reference on the CPU.

Tolerance: err(kernel) <= 2 * err(the same formula in float32 PyTorch) + floor, errors relative to the largest entry
of the reference; the floor is 4 units of the last place of the result's dtype. Inputs are rounded to their dtype
first, so only the arithmetic is judged. Entropies of groups are within 1e-4 absolutely.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from plain import dense32, fold32, hadamard32, softmax32

from gvendi_fast import ops, reference
from gvendi_fast.backends import backend, use_backend
from gvendi_fast.plan import make_table
from gvendi_fast.signs import sign_key
from gvendi_fast.sketches import normalised

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOOR = {torch.float32: 4 * 2.0**-24, torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}
ENTROPY_TOLERANCE = 1e-4
# Rows, input width, output width, K. The default K is what is timed; the others come after everything else, for each K
# is compiled anew.
SIZES = [(1000, 896, 4864, 1024), (257, 1025, 128, 1024)]
OTHER_SIZES = [(1, 64, 64, 64), (63, 50, 300, 256), (65, 96, 96, 8192)]
# Dense signs are made in NumPy for the reference: above this many coordinates that takes minutes.
MOST_COORDINATES = 1 << 18
# A covariance of 8192 columns is half a gigabyte.
MOST_COLUMNS = 1024
GROUPS = (1, 7, 16, 17, 33, 64, 65, 200, 256)


@dataclass(frozen=True)
class Case:
    """An operation on one set of inputs: what it gives, what is wanted, and the error allowed, per output."""

    op: str
    dtype: str
    name: str
    run: Callable[[], tuple[torch.Tensor, ...]]
    wanted: tuple[torch.Tensor, ...]
    allowed: tuple[float, ...]
    # What a backend is asked about before it runs.
    probe: tuple[torch.Tensor, ...]

    def judge(self) -> dict[str, object]:
        """{"errors", "allowed", "repeats", "ok"}; two runs must give the same bits."""
        got, again = self.run(), self.run()
        errors = [relative_error(x, y) for x, y in zip(got, self.wanted, strict=True)]
        repeats = all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
        # NaN is not within anything.
        within = all(error <= most for error, most in zip(errors, self.allowed, strict=True))
        return {
            "errors": errors,
            "allowed": list(self.allowed),
            "repeats": repeats,
            "ok": within and repeats,
        }


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest entry wanted."""
    return float((got.double().cpu() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def draw(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Gaussian numbers rounded to dtype, on the CPU."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def split(rows: int, samples: int) -> torch.Tensor:
    """Segments of uneven samples, the last of them empty: int64 [samples, 2]."""
    generator = torch.Generator().manual_seed(1)
    cuts = torch.randint(0, rows + 1, (samples - 2,), generator=generator).sort().values
    ends = torch.cat([cuts, torch.tensor([rows, rows])])
    return torch.stack([torch.cat([torch.tensor([0]), ends[:-1]]), ends], dim=1).contiguous()


@functools.cache
def cases(
    device: torch.device, label: str, rows: int, width: int, out_width: int, dim: int
) -> tuple[Case, ...]:
    """The cases of all operations for inputs of one dtype and size, with their references; kept for all backends."""
    return tuple(_cases(device, label, rows, width, out_width, dim))


def _cases(device, label, rows, width, out_width, dim) -> Iterator[Case]:
    dtype, shape = DTYPES[label], f"{rows}x({width},{out_width}) K={dim}"
    a, e, x = draw(rows, width, dtype, 2), draw(rows, out_width, dtype, 3), draw(rows, width, dtype, 4)
    ids = torch.randint(0, out_width, (rows,), generator=torch.Generator().manual_seed(5))
    columns, table = make_table(0, "in", width, dim), make_table(0, "out", out_width, dim)
    segments = split(rows, 8)
    da, de, dx, dids = (tensor.to(device) for tensor in (a, e, x, ids))

    def case(op, name, run, plain, wanted, probe=None) -> Case:
        allowed = tuple(
            2 * relative_error(p, w) + FLOOR.get(p.dtype, FLOOR[torch.float32])
            for p, w in zip(plain, wanted, strict=True)
        )
        return Case(op, label, f"{shape}{name}", run, wanted, allowed, probe or (da,))

    def sketch(op, name, arguments, plain, wanted) -> Case:
        """A case of an operation that adds to a sketch [B, K] its last but keyword argument."""
        verb = getattr(ops, op)

        def run() -> tuple[torch.Tensor]:
            return (verb(*arguments, out=torch.zeros(len(segments), dim, device=device)),)

        inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x is not segments]
        parts = [e for x in arguments if isinstance(x, list) for e, _ in x]
        return case(op, name, run, (plain,), (wanted,), (*inputs, *parts))

    def total(product: torch.Tensor) -> torch.Tensor:
        return reference.sum_segments(product, segments) / math.sqrt(dim)

    transformed, folded = reference.fold_hadamard(a, columns), reference.fold(e, table)
    transformed32, folded32 = hadamard32(fold32(a, columns)), fold32(e, table)
    yield case(
        "fold_hadamard",
        "",
        lambda: (ops.fold_hadamard(de, table),),
        (hadamard32(folded32),),
        (reference.hadamard(folded),),
        (de,),
    )
    yield sketch(
        "linear_sketch",
        "",
        (da, columns, [(de, table)], segments),
        total(transformed32 * hadamard32(folded32)),
        reference.linear_sketch(a, e, segments, columns, table),
    )
    yield sketch(
        "linear_sketch",
        " two layers",
        (da, columns, [(de, table), (dx, columns)], segments),
        total(transformed32 * hadamard32(folded32 + fold32(x, columns))),
        total(transformed * reference.hadamard(folded + reference.fold(x, columns))),
    )
    # Inputs that are transformed or folded already come in float32.
    yield sketch(
        "linear_sketch",
        " transformed input",
        (transformed32.to(device), None, [(de, table)], segments),
        total(transformed32 * hadamard32(folded32)),
        total(transformed32.double() * reference.hadamard(folded)),
    )
    yield sketch(
        "linear_sketch",
        " folded gradient",
        (da, columns, [(folded32.to(device), None)], segments),
        total(transformed32 * hadamard32(folded32)),
        total(transformed * reference.hadamard(folded32)),
    )
    onehot = torch.nn.functional.one_hot(ids, out_width)
    yield sketch(
        "token_sketch",
        "",
        (dids, da, segments, table, columns),
        total(transformed32 * hadamard32(fold32(onehot, table))),
        reference.token_sketch(ids, a, segments, table, columns),
    )
    for norm in (None, "rms", "layer"):
        gradient = a.float() if norm is None else a.float() * normalised(x, norm, 1e-6)
        v = reference.vector_gradient(None if norm is None else x, a, segments, norm, 1e-6)
        vector = (None if norm is None else dx, da, segments, columns)
        yield case(
            "vector_sketch",
            f" {norm or 'bias'}",
            lambda vector=vector, norm=norm: (
                ops.vector_sketch(*vector, torch.zeros(len(segments), dim, device=device), norm, 1e-6),
            ),
            (hadamard32(fold32(reference.sum_segments(gradient, segments), columns)) / math.sqrt(dim),),
            (reference.fold_hadamard(v, columns) / math.sqrt(dim),),
        )
    logits = draw(rows, out_width, dtype, 6) * 4
    dlogits = logits.to(device)
    for softcap, scale in ((None, 1.0), (30.0, 0.5)):

        def softmax(softcap=softcap, scale=scale) -> tuple[torch.Tensor, ...]:
            gradient = dlogits.clone()
            loss, fold = ops.softmax_fold(gradient, dids, table, softcap, scale)
            return loss, gradient, fold

        yield case(
            "softmax_fold",
            " capped" if softcap else "",
            softmax,
            softmax32(logits, ids, table, softcap, scale),
            reference.softmax_fold(logits, ids, table, softcap, scale),
        )
    key = sign_key(0, "layer.weight")
    if width * out_width <= MOST_COORDINATES:
        yield sketch(
            "dense_sketch",
            "",
            (da, de, segments, key),
            dense32(a, e, segments, key, dim),
            reference.dense_sketch(a, e, segments, key, dim),
        )
        few = reference.dense_sketch(ids[:64], a[:64], segments.clamp(max=64), key, dim)
        yield case(
            "dense_sketch",
            " of token ids",
            lambda: (
                ops.dense_sketch(
                    dids[:64],
                    da[:64],
                    segments.clamp(max=64),
                    key,
                    torch.zeros(len(segments), dim, device=device),
                ),
            ),
            (dense32(onehot[:64], a[:64], segments.clamp(max=64), key, dim),),
            (few,),
            (dids, da),
        )
    if dim <= MOST_COLUMNS:
        yield from _spectral(device, label, case, dim, rows)


def _spectral(device, label, case, dim, rows) -> Iterator[Case]:
    z = draw(rows, dim, DTYPES[label], 7)
    unit = torch.nn.functional.normalize(z.float(), dim=1)
    dz = z.to(device)
    yield case(
        "covariance",
        "",
        lambda: (ops.covariance(dz, torch.zeros(dim, dim, dtype=torch.float64, device=device)),),
        (unit.T @ unit,),
        (reference.covariance(z)[0],),
        (dz,),
    )
    boundaries = torch.tensor([0, *GROUPS]).cumsum(0)
    # Columns of falling size, as sketches of real text have: the eigenvalues are apart.
    group = (draw(int(boundaries[-1]), dim, torch.float32, 8) * torch.arange(1, dim + 1) ** -0.5).to(
        DTYPES[label]
    )
    dgroup = group.to(device)
    for q in (1.0, 2.0, math.inf):
        wanted = reference.group_entropies(group, boundaries, q)
        entropy = case(
            "entropy",
            f" q={q:g}",
            lambda q=q: (ops.entropy(dgroup, boundaries, q),),
            (wanted,),
            (wanted,),
            (dgroup,),
        )
        yield replace(entropy, allowed=(ENTROPY_TOLERANCE / float(wanted.max()),))


def check(
    device: torch.device, backend_name: str, sizes: list[tuple[int, ...]], late: Callable[[], bool]
) -> dict[str, object]:
    """{"complete", "operations": {"operation dtype": summary}} of one backend's cases.

    A summary counts cases and those that passed, holds the largest error and what failed, and counts what the backend
    cannot run by its reasons.
    """
    chosen, found, complete = backend(backend_name), {}, True
    for label in DTYPES:
        for size in sizes:
            if late():
                complete = False
                continue
            for case in cases(device, label, *size):
                entry = found.setdefault(
                    f"{case.op} {label}", {"cases": 0, "passed": 0, "largest error": 0.0, "failed": {}}
                )
                lacks = None if hasattr(chosen, case.op) else "PyTorch's own is the implementation"
                if reason := lacks or chosen.why_not(case.op, *case.probe):
                    reasons = entry.setdefault("not run", {})
                    reasons[reason] = reasons.get(reason, 0) + 1
                    continue
                with use_backend(backend_name):
                    judged = case.judge()
                entry["cases"] += 1
                entry["passed"] += judged["ok"]
                entry["largest error"] = max(entry["largest error"], *judged["errors"])
                if not judged["ok"]:
                    entry["failed"][case.name] = judged
    return {"complete": complete, "operations": found}


def verdict(checked: dict[str, dict], op: str, label: str) -> str | None:
    """Why an operation may not be timed: None if it was checked in this dtype and every case passed."""
    entry = checked["operations"].get(f"{op} {label}", {"cases": 0})
    if not entry["cases"]:
        return next(iter(entry.get("not run", ())), "not checked")
    return f"check failed: {next(iter(entry['failed']))}" if entry["failed"] else None
