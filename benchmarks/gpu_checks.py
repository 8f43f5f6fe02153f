"""Cases for the GPU benchmark: every sketch operation on a device against the float64 reference on the CPU.

Tolerance: err(kernel) <= 2 * err(the same formula in PyTorch at the inputs' precision) + floor, errors relative to the
largest entry of the reference. Inputs are rounded to their dtype first, so only the arithmetic is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gvendi_fast import ops, reference
from gvendi_fast.plan import make_table
from gvendi_fast.signs import sign_key

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Sums of a few thousand float32 products in another order.
FLOOR = 2e-6
# A gradient tile that passes through bf16 high and low parts on tensor cores keeps about 16 bits.
DENSE_FLOOR = 2e-4


@dataclass(frozen=True)
class Case:
    """run(device tensors) against wanted: `run` returns what the operation gives, `bytes` what it must move."""

    op: str
    name: str
    run: Callable[[], torch.Tensor]
    wanted: torch.Tensor
    floor: float
    bytes: int
    flops: int = 0
    # Whether the operation's first tensor holds ids, which a backend may not take.
    ids: bool = False


def draw(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Gaussian numbers rounded to dtype, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator).to(dtype)


def split(rows: int, samples: int) -> torch.Tensor:
    """Segments of uneven samples, one of them empty: int64 [samples, 2]."""
    generator = torch.Generator().manual_seed(1)
    cuts = torch.randint(0, rows + 1, (samples - 1,), generator=generator).sort().values
    ends = torch.cat([cuts, torch.tensor([rows])])
    begins = torch.cat([torch.tensor([0]), cuts])
    return torch.stack([begins, ends], dim=1).contiguous()


def cases(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, out_width: int, dim: int
) -> Iterator[Case]:
    """One case per operation for inputs of `rows` rows, with float64 results computed on the CPU."""
    name = f"{rows}x({width},{out_width}) K={dim}"
    a, e = draw(rows, width, dtype, 2), draw(rows, out_width, dtype, 3)
    segments = split(rows, 8)
    columns, table = make_table(0, "in", width, dim), make_table(0, "out", out_width, dim)
    on = lambda x: x.to(device)  # noqa: E731
    da, de = on(a), on(e)
    size = a.element_size()
    blank = lambda: torch.zeros(len(segments), dim, device=device)  # noqa: E731
    yield Case(
        "fold_hadamard",
        name,
        lambda: ops.fold_hadamard(de, table),
        reference.fold_hadamard(e, table),
        FLOOR,
        e.numel() * size + rows * dim * 4,
    )
    yield Case(
        "linear_sketch",
        name,
        lambda: ops.linear_sketch(da, columns, [(de, table)], segments, blank()),
        reference.linear_sketch(a, e, segments, columns, table),
        FLOOR,
        (a.numel() + e.numel()) * size,
    )
    ids = torch.randint(0, out_width, (rows,), generator=torch.Generator().manual_seed(4))
    dids = on(ids)
    yield Case(
        "token_sketch",
        name,
        lambda: ops.token_sketch(dids, da, segments, table, columns, blank()),
        token_reference(ids, a, segments, table, columns),
        FLOOR,
        a.numel() * size,
    )
    x = draw(rows, width, dtype, 5)
    dx = on(x)
    for norm in ("rms", "layer"):
        v = reference.vector_gradient(x, a, segments, norm, 1e-6)
        yield Case(
            "vector_sketch",
            f"{name} {norm}",
            lambda norm=norm: ops.vector_sketch(dx, da, segments, columns, blank(), norm, 1e-6),
            reference.fold_hadamard(v, columns) / dim**0.5,
            FLOOR,
            2 * a.numel() * size,
        )
    logits = draw(rows, out_width, dtype, 6) * 4
    wanted = reference.softmax_fold(logits, ids, table)
    dlogits = on(logits)
    yield Case(
        "softmax_fold",
        name,
        lambda: ops.softmax_fold(dlogits.clone(), dids, table)[1],
        wanted[2],
        FLOOR,
        2 * logits.numel() * size,
    )
    key = sign_key(0, "layer.weight")
    if width * out_width <= 1 << 20:
        gradients = torch.stack(
            [(e[b:s].double().T @ a[b:s].double()).reshape(-1) for b, s in segments.tolist()]
        )
        yield Case(
            "dense_sketch",
            name,
            lambda: ops.dense_sketch(da, de, segments, key, blank()),
            dense_reference(gradients, key, dim),
            DENSE_FLOOR if dtype != torch.float32 else FLOOR,
            0,
            2 * rows * width * out_width + 2 * len(segments) * width * out_width * dim,
        )
    # Few of many ids: the definition makes the signs of every id that occurs.
    tokens = torch.randint(0, 1 << 17, (24,), generator=torch.Generator().manual_seed(8))[ids % 24]
    dtokens = on(tokens)
    yield Case(
        "dense_sketch",
        f"{name} ids",
        lambda: ops.dense_sketch(dtokens, da, segments, key, blank()),
        reference.dense_sketch(tokens, a, segments, key, dim),
        FLOOR,
        0,
        ids=True,
    )
    sketches = draw(rows, dim, torch.float32, 7)
    dsketches = on(sketches)
    yield Case(
        "covariance",
        f"{rows} x {dim}",
        lambda: ops.covariance(dsketches, torch.zeros(dim, dim, dtype=torch.float64, device=device)),
        reference.covariance(sketches)[0],
        FLOOR,
        0,
        2 * rows * dim * dim,
    )


def token_reference(ids, e, segments, id_table, e_table) -> torch.Tensor:
    """reference.token_sketch by the gradient's rows that are touched, without a [T, V] one-hot matrix."""
    out = torch.zeros(len(segments), id_table.dim, dtype=torch.float64)
    from gvendi_fast.backends import backend

    backend("reference").token_sketch(ids, e, segments, id_table, e_table, out)
    return out


def dense_reference(gradients: torch.Tensor, key, dim: int) -> torch.Tensor:
    """K^(-1/2) Pi^T g in float64, the signs made block by block."""
    from gvendi_fast.signs import signs

    out = torch.zeros(len(gradients), dim, dtype=torch.float64)
    for begin in range(0, gradients.shape[1], 4096):
        part = gradients[:, begin : begin + 4096]
        out += part @ torch.as_tensor(signs(key, begin, begin + part.shape[1], dim)).double()
    return out / dim**0.5


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest entry wanted."""
    return float((got.double().cpu() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
