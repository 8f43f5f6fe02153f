"""Checks of the GPU benchmark: every operation on a device against the float64 reference on the CPU.

The rule and the formulas in plain PyTorch are those of the tests, tests/tolerance.py and tests/plain.py. Inputs are
rounded to their dtype first, so only the arithmetic is judged. Entropies of groups are within 1e-4 absolutely, gains
within 1e-5 of the largest.

Three sections: "smoke", one small size in bfloat16, says of each kernel whether it runs at all; "checks" goes through
the default K in every dtype; "other checks" takes other K and odd shapes, each of which is compiled anew.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from benchmarks.environment import ROOT
from benchmarks.gpu.timing import Bench, Figure, NotMeasuredError
from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import backend, operations, use_backend
from gvendi_fast.kernels.signs import sign_key
from gvendi_fast.kernels.sketch_matrix import (
    SketchSpec,
    expert_column_tables,
    expert_row_tables,
    make_table,
)

# A kernel is judged by the same rule, and beside the same formulas, as in the tests.
sys.path.append(str(ROOT / "tests"))

from plain import (
    cosines32,
    covariance32,
    dense32,
    expert32,
    fold32,
    fold_hadamard32,
    linear32,
    softmax32,
    token32,
    vector32,
)
from tolerance import allowed, relative_error

# What is checked and timed on a kind of device.
BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
ENTROPY_TOLERANCE, GAIN_TOLERANCE = 1e-4, 1e-5
# Rows, input width, output width, K.
SMOKE_SIZE = (40, 160, 96, 1024)
SIZES = [(1000, 896, 4864, 1024), (257, 1025, 128, 1024)]
OTHER_SIZES = [(1, 64, 64, 64), (63, 50, 300, 256), (65, 96, 96, 8192)]
# Dense signs are made in NumPy for the reference: above this many coordinates that takes minutes.
MOST_COORDINATES = 1 << 18
# A covariance of 8192 columns is half a gigabyte.
MOST_COLUMNS = 1024
GROUPS = (1, 7, 16, 17, 33, 64, 65, 200, 256)
CENTROIDS, GAIN_ROWS = 40, 8
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """An operation on one set of inputs, and the references of its outputs, made when they are first asked for."""

    op: str
    dtype: str
    name: str
    run: Callable[[], Tensors]
    plain: Callable[[], Tensors]
    reference: Callable[[], Tensors]
    # What a backend is asked about before it runs.
    probe: Tensors
    # The error allowed for what is wanted, in place of that by `plain`.
    tolerance: Callable[[Tensors], float] | None = None
    _known: list = field(default_factory=list)

    @property
    def wanted(self) -> Tensors:
        """What the definition gives, per output."""
        return self._expected()[0]

    @property
    def allowed(self) -> tuple[float, ...]:
        """The error allowed, per output."""
        return self._expected()[1]

    def _expected(self) -> tuple[Tensors, tuple[float, ...]]:
        if not self._known:
            wanted = self.reference()
            if self.tolerance is not None:
                most = (self.tolerance(wanted),) * len(wanted)
            else:
                most = tuple(allowed(p, w) for p, w in zip(self.plain(), wanted, strict=True))
            self._known.append((wanted, most))
        return self._known[0]

    def why_not(self, name: str) -> str | None:
        """The reason for which a backend cannot run it, or None."""
        return backend(name).why_not(self.op, *self.probe)

    def judge(self) -> dict[str, object]:
        """{"errors", "allowed", "repeats", "ok"}; two runs must give the same bits."""
        got, again = self.run(), self.run()
        errors = [relative_error(x, y) for x, y in zip(got, self.wanted, strict=True)]
        repeats = all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
        # NaN is not within anything.
        within = all(error <= most for error, most in zip(errors, self.allowed, strict=True))
        return {
            # JSON has no NaN.
            "errors": [error if math.isfinite(error) else str(error) for error in errors],
            "allowed": list(self.allowed),
            "repeats": repeats,
            "ok": within and repeats,
        }


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
    """The cases of all operations for inputs of one dtype and size; kept, with their references, for all backends."""
    return tuple(_cases(device, label, rows, width, out_width, dim))


def _cases(device, label, rows, width, out_width, dim) -> Iterator[Case]:
    dtype, shape = DTYPES[label], f"{rows}x({width},{out_width}) K={dim}"
    a, e, x = draw(rows, width, dtype, 2), draw(rows, out_width, dtype, 3), draw(rows, width, dtype, 4)
    ids = torch.randint(0, out_width, (rows,), generator=torch.Generator().manual_seed(5))
    columns, table = make_table(0, "in", width, dim), make_table(0, "out", out_width, dim)
    segments = split(rows, 8)
    da, de, dx, dids = (tensor.to(device) for tensor in (a, e, x, ids))
    once = functools.cache

    def case(op, name, run, plain, wanted, probe=None, tolerance=None) -> Case:
        return Case(op, label, f"{shape}{name}", run, plain, wanted, probe or (da,), tolerance)

    def sketch(op, name, arguments, plain, wanted) -> Case:
        """A case of an operation that adds to a sketch [B, K] its last but keyword argument."""

        def run() -> Tensors:
            given = arguments() if callable(arguments) else arguments
            return (getattr(ops, op)(*given, out=torch.zeros(len(segments), dim, device=device)),)

        inputs = (da, de) if callable(arguments) else arguments
        probe = [x for x in inputs if isinstance(x, torch.Tensor) and x is not segments]
        probe += [e for x in inputs if isinstance(x, list) for e, _ in x]
        return case(op, name, run, lambda: (plain(),), lambda: (wanted(),), tuple(probe))

    def total(product: torch.Tensor) -> torch.Tensor:
        return reference.sum_segments(product, segments) / math.sqrt(dim)

    transformed, folded = (
        once(lambda: reference.fold_hadamard(a, columns)),
        once(lambda: reference.fold(e, table)),
    )
    transformed32, folded32 = once(lambda: fold_hadamard32(a, columns)), once(lambda: fold32(e, table))
    # Inputs that are transformed or folded already come in float32.
    transformed_there, folded_there = (
        once(lambda: transformed32().to(device)),
        once(lambda: folded32().to(device)),
    )
    yield case(
        "fold_hadamard",
        "",
        lambda: (ops.fold_hadamard(de, table),),
        lambda: (fold_hadamard32(e, table),),
        lambda: (reference.hadamard(folded()),),
        (de,),
    )
    yield sketch(
        "linear_sketch",
        "",
        (da, columns, [(de, table)], segments),
        lambda: linear32(a, columns, [(e, table)], segments),
        lambda: reference.linear_sketch(a, e, segments, columns, table),
    )
    yield sketch(
        "linear_sketch",
        " two layers",
        (da, columns, [(de, table), (dx, columns)], segments),
        lambda: linear32(a, columns, [(e, table), (x, columns)], segments),
        lambda: total(transformed() * reference.hadamard(folded() + reference.fold(x, columns))),
    )
    yield sketch(
        "linear_sketch",
        " transformed input",
        lambda: (transformed_there(), None, [(de, table)], segments),
        lambda: linear32(transformed32(), None, [(e, table)], segments),
        lambda: total(transformed32().double() * reference.hadamard(folded())),
    )
    yield sketch(
        "linear_sketch",
        " folded gradient",
        lambda: (da, columns, [(folded_there(), None)], segments),
        lambda: linear32(a, columns, [(folded32(), None)], segments),
        lambda: total(transformed() * reference.hadamard(folded32())),
    )
    # Rows in any order, an expert without one, and the bias of each.
    routed = tuple(
        torch.randint(0, below, (rows,), generator=torch.Generator().manual_seed(6)) for below in (4, 7)
    )
    spec = SketchSpec(dim)
    stacked = (
        expert_column_tables(spec, "experts", 5, width),
        expert_row_tables(spec, "experts", 5, out_width),
    )
    droute = tuple(x.to(device) for x in routed)
    for name, given, there, kept in (
        ("", (a, e), (da, de), stacked),
        (" biases", (None, e), (None, de), (None, stacked[1])),
    ):
        where = *given, *routed, len(segments), *kept
        yield sketch(
            "expert_sketch",
            name,
            (*there, *droute, *kept),
            lambda where=where: expert32(*where),
            lambda where=where: reference.expert_sketch(*where),
        )
    yield sketch(
        "token_sketch",
        "",
        (dids, da, segments, table, columns),
        lambda: token32(ids, a, segments, table, columns),
        lambda: reference.token_sketch(ids, a, segments, table, columns),
    )
    for norm in (None, "rms", "layer"):
        vector = (None if norm is None else dx, da, segments, columns)

        def plain(norm=norm) -> Tensors:
            return (vector32(x, a, segments, columns, norm, 1e-6),)

        def wanted(norm=norm) -> Tensors:
            v = reference.vector_gradient(None if norm is None else x, a, segments, norm, 1e-6)
            return (reference.fold_hadamard(v, columns) / math.sqrt(dim),)

        def run(vector=vector, norm=norm) -> Tensors:
            out = torch.zeros(len(segments), dim, device=device)
            return (ops.vector_sketch(*vector, out, norm, 1e-6),)

        yield case("vector_sketch", f" {norm or 'bias'}", run, plain, wanted)
    logits = draw(rows, out_width, dtype, 6) * 4
    dlogits = logits.to(device)
    for softcap, scale in ((None, 1.0), (30.0, 0.5)):

        def softmax(softcap=softcap, scale=scale) -> Tensors:
            gradient = dlogits.clone()
            loss, fold = ops.softmax_fold(gradient, dids, table, softcap, scale)
            return loss, gradient, fold

        yield case(
            "softmax_fold",
            " capped" if softcap else "",
            softmax,
            lambda c=softcap, s=scale: softmax32(logits, ids, table, c, s),
            lambda c=softcap, s=scale: reference.softmax_fold(logits, ids, table, c, s),
        )
    key = sign_key(0, "layer.weight")
    if width * out_width <= MOST_COORDINATES:
        yield sketch(
            "dense_sketch",
            "",
            (da, de, segments, key),
            lambda: dense32(a, e, segments, key, dim),
            lambda: reference.dense_sketch(a, e, segments, key, dim),
        )
        some = segments.clamp(max=64)
        yield case(
            "dense_sketch",
            " of token ids",
            lambda: (
                ops.dense_sketch(
                    dids[:64], da[:64], some, key, torch.zeros(len(segments), dim, device=device)
                ),
            ),
            lambda: (dense32(ids[:64], a[:64], some, key, dim),),
            lambda: (reference.dense_sketch(ids[:64], a[:64], some, key, dim),),
            (dids, da),
        )
    if dim <= MOST_COLUMNS:
        yield from _spectral(device, label, case, dim, rows)


def _spectral(device, label, case, dim, rows) -> Iterator[Case]:
    z = draw(rows, dim, DTYPES[label], 7)
    dz = z.to(device)

    yield case(
        "covariance",
        "",
        lambda: (ops.covariance(dz, torch.zeros(dim, dim, dtype=torch.float64, device=device)),),
        lambda: (covariance32(z),),
        lambda: (reference.covariance(z)[0],),
        (dz,),
    )
    yield from _assignments(device, case, z, dz)
    boundaries = torch.tensor([0, *GROUPS]).cumsum(0)
    # Columns of falling size, as sketches of real text have: the eigenvalues are apart.
    falling = torch.arange(1, dim + 1) ** -0.5
    group = (draw(int(boundaries[-1]), dim, torch.float32, 8) * falling).to(DTYPES[label])
    dgroup = group.to(device)
    for q in (1.0, 2.0, math.inf):
        wanted = functools.cache(lambda q=q: (reference.group_entropies(group, boundaries, q),))
        entropy = case(
            "entropy",
            f" q={q:g}",
            lambda q=q: (ops.entropy(dgroup, boundaries, q),),
            wanted,
            wanted,
            (dgroup,),
        )
        # Absolute: the entropy itself is what is shown.
        yield replace(entropy, tolerance=lambda wanted: ENTROPY_TOLERANCE / float(wanted[0].max()))
    if label == "fp32":
        yield from _gains(device, case, group[: 4 * GAIN_ROWS])


def _assignments(device, case, z, dz) -> Iterator[Case]:
    """The cosines that are given, and those of the centroids that are named: of near ties either may come first."""
    centroids = torch.nn.functional.normalize(draw(CENTROIDS, z.shape[1], torch.float32, 9), dim=1)
    there = centroids.to(device)

    @functools.cache
    def cosines() -> torch.Tensor:
        return reference.normalise(z) @ centroids.double().T

    def named(first, cosine, second, second_cosine) -> Tensors:
        at = torch.stack([first, second], dim=1).cpu()
        return cosine, second_cosine, cosines().gather(1, at).to(cosine.dtype)

    def plain() -> Tensors:
        values, order = cosines32(z, centroids).topk(2, dim=1)
        return named(order[:, 0], values[:, 0], order[:, 1], values[:, 1])

    yield case(
        "assign",
        "",
        lambda: named(*ops.assign(dz, there)),
        plain,
        lambda: named(*reference.assign(z, centroids)),
        (dz, there),
    )


def _gains(device, case, rows) -> Iterator[Case]:
    """Rows that join a state, and rows of it that leave."""
    unit = torch.nn.functional.normalize(rows.double(), dim=1).float()
    matrix = unit.double().T @ unit.double()
    basis = functools.cache(lambda: tuple(x.to(device) for x in torch.linalg.eigh(matrix)))
    some = unit[:GAIN_ROWS]
    for sign in (1, -1):
        wanted = functools.cache(lambda sign=sign: (reference.gain(matrix, some, sign),))
        yield case(
            "gain",
            " joins" if sign > 0 else " leaves",
            lambda sign=sign: (ops.gain(some.to(device), basis()[0].clamp(min=0), basis()[1], sign)[0],),
            wanted,
            wanted,
            (some.to(device),),
            lambda wanted: GAIN_TOLERANCE,
        )


def figures(section: str, bench: Bench) -> Iterator[Figure]:
    """One figure for each backend, operation and dtype."""
    sizes, others = (OTHER_SIZES[1:2], OTHER_SIZES[:1]) if bench.dry else (SIZES, OTHER_SIZES)
    sizes = {"smoke": [SMOKE_SIZE], "checks": sizes, "other checks": others}[section]
    if bench.dry and section == "smoke":
        sizes = [(20, 50, 64, 64)]
    for label in DTYPES:
        for name in BACKENDS[bench.device.type]:
            for op in operations():
                # What a backend leaves to others is no figure of its own.
                if label in dtypes_of(op, section) and hasattr(backend(name), op):
                    yield Figure(
                        f"{name} {op} {label}",
                        lambda n=name, o=op, d=label: check(bench.device, n, o, d, sizes),
                    )


def dtypes_of(op: str, section: str) -> tuple[str, ...]:
    """The dtypes in which an operation is checked; gains are taken of float32 rows."""
    if op == "gain":
        return ("fp32",)
    return ("bf16",) if section == "smoke" else tuple(DTYPES)


def check(
    device: torch.device, name: str, op: str, label: str, sizes: list[tuple[int, ...]]
) -> dict[str, object]:
    """Counts of an operation's cases and of those that passed, the largest error, what failed, and the verdict."""
    found = {"cases": 0, "passed": 0, "largest error": 0.0, "failed": {}}
    not_run: dict[str, int] = {}
    for case in [case for size in sizes for case in cases(device, label, *size) if case.op == op]:
        if reason := case.why_not(name):
            not_run[reason] = not_run.get(reason, 0) + 1
            continue
        found["cases"] += 1
        try:
            with use_backend(name):
                judged = case.judge()
        # One kernel's error is its own, unless the device goes with it: whoever calls looks.
        except Exception as error:
            judged = {"error": f"{type(error).__name__}: {error}"[:300], "ok": False}
            found["failed"][case.name] = judged
            if device.type == "cuda":
                torch.cuda.synchronize()
            continue
        found["passed"] += judged["ok"]
        known = [error for error in judged["errors"] if not isinstance(error, str)]
        found["largest error"] = max(found["largest error"], *known)
        if not judged["ok"]:
            found["failed"][case.name] = judged
    if not found["cases"]:
        raise NotMeasuredError(next(iter(not_run), "no case of this operation in this dtype"))
    failed = next(iter(found["failed"]), None)
    found |= {"not run": not_run} if not_run else {}
    return {**found, "check": "passed" if failed is None else f"failed: {failed}"}
