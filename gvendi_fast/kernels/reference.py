"""The definitions, in fp64, slow and obvious. Where a kernel and this file disagree, the kernel is wrong.

Letters: B samples, T tokens (rows of a batch), O output width, I input width, V vocabulary, K sketch dimension.
`a` [T, I] is the input of a linear layer, `e` [T, O] the gradient of the loss with respect to its output, and
`segments` int64 [B, 2] holds each sample's (begin, end) rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.signs import sign_key, signs
from gvendi_fast.kernels.sketch_matrix import (
    ExpertTables,
    SketchSpec,
    Table,
    column_table,
    expert_column_tables,
    expert_name,
    row_table,
)

# Coordinates whose gradient and signs are in memory at once.
DENSE_BLOCK = 4096

# Eigenvalues of a trace-one Gram matrix of float32 rows below this may be rounding.
SPECTRUM_NOISE = 2.0**-22


def fold(x: torch.Tensor, table: Table) -> torch.Tensor:
    """S x for every row: x [T, d] -> [T, K], (S x)[bucket[j]] += sign[j] * x[j]."""
    bucket, sign = table_tensors(table, x.device)
    out = torch.zeros(x.shape[0], table.dim, dtype=torch.float64, device=x.device)
    return out.index_add_(1, bucket, x.double() * sign)


def table_tensors(table: Table, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A table's bucket as int64 [width] and sign as float64 [width] on a device."""
    bucket = torch.as_tensor(table.bucket.astype(np.int64), device=device)
    return bucket, torch.as_tensor(table.sign.astype(np.float64), device=device)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """H x for every row of x [T, K]: the unnormalised Walsh-Hadamard transform in Sylvester order.

    H[f, c] = (-1)^popcount(f & c), so H is symmetric and H H = K I.
    """
    y, width = x.double().clone(), x.shape[-1]
    step = 1
    while step < width:
        pairs = y.view(*y.shape[:-1], width // (2 * step), 2, step)
        low, high = pairs[..., 0, :].clone(), pairs[..., 1, :].clone()
        pairs[..., 0, :], pairs[..., 1, :] = low + high, low - high
        step *= 2
    return y


def fold_hadamard(x: torch.Tensor, table: Table) -> torch.Tensor:
    """H S x for every row: x [T, d] -> [T, K]."""
    return hadamard(fold(x, table))


def linear_sketch(
    a: torch.Tensor, e: torch.Tensor, segments: torch.Tensor, a_table: Table, e_table: Table
) -> torch.Tensor:
    """z_b = K^(-1/2) sum_t (H S_o e_t) * (H S_i a_t) over a sample's rows -> [B, K]."""
    product = fold_hadamard(a, a_table) * fold_hadamard(e, e_table)
    return sum_segments(product, segments) / math.sqrt(a_table.dim)


def expert_sketch(
    a: torch.Tensor | None,
    e: torch.Tensor,
    experts: torch.Tensor,
    samples: torch.Tensor,
    count: int,
    a_tables: ExpertTables | None,
    e_tables: ExpertTables,
) -> torch.Tensor:
    """z_b = K^(-1/2) sum_r (H S_o^x e_r) * (H S_i^x a_r) over the rows r of sample b, x the expert of row r -> [B, K].

    a [R, I] and e [R, O]: a row is a token at one of the experts that it was sent to. experts and samples int64 [R] in
    any order; count is B. a None: a stacked bias, without the second factor.
    """
    out = torch.zeros(count, e_tables.dim, dtype=torch.float64, device=e.device)
    for expert in range(e_tables.experts):
        rows = experts == expert
        product = fold_hadamard(e[rows], e_tables.table(expert))
        if a is not None:
            product *= fold_hadamard(a[rows], a_tables.table(expert))
        out.index_add_(0, samples[rows], product)
    return out / math.sqrt(e_tables.dim)


def token_sketch(
    ids: torch.Tensor, e: torch.Tensor, segments: torch.Tensor, id_table: Table, e_table: Table
) -> torch.Tensor:
    """The sketch of an embedding's gradient, sum_t onehot(id_t) e_t^T: ids [T], e [T, d] -> [B, K].

    id_table is the table of the vocabulary axis (the rows of the weight), e_table that of the width.
    """
    onehot = torch.nn.functional.one_hot(ids.long(), id_table.width)
    return linear_sketch(e, onehot, segments, e_table, id_table)


def project(gradient: torch.Tensor, key: tuple[int, int], dim: int, begin: int = 0) -> torch.Tensor:
    """K^(-1/2) Pi^T g for every row g of gradient [B, n], its coordinates begin..begin+n-1 -> [B, K]."""
    out = torch.zeros(len(gradient), dim, dtype=torch.float64, device=gradient.device)
    for first in range(0, gradient.shape[1], DENSE_BLOCK):
        part = gradient[:, first : first + DENSE_BLOCK].double()
        pi = signs(key, begin + first, begin + first + part.shape[1], dim)
        out += part @ torch.from_numpy(pi).to(part)
    return out / math.sqrt(dim)


def dense_sketch(
    a: torch.Tensor, e: torch.Tensor, segments: torch.Tensor, key: tuple[int, int], dim: int
) -> torch.Tensor:
    """z_b = K^(-1/2) Pi^T vec(g_b), g_b = sum_t e_t a_t^T over a sample's rows: a [T, I], e [T, O] -> [B, K].

    With ids int64 [T] in place of a it is the embedding's gradient, g_b = sum_t onehot(id_t) e_t^T [V, d].
    """
    out = torch.zeros(len(segments), dim, dtype=torch.float64, device=e.device)
    if not a.is_floating_point():
        for token in a.unique().tolist():
            gradient = sum_segments(e.double() * (a == token)[:, None], segments)
            out += project(gradient, key, dim, token * e.shape[1])
        return out
    width = a.shape[1]
    step = max(1, DENSE_BLOCK // width)
    for row in range(0, e.shape[1], step):
        left = e[:, row : row + step].double()
        gradient = [(left[begin:end].T @ a[begin:end].double()).flatten() for begin, end in segments.tolist()]
        if gradient:
            out += project(torch.stack(gradient), key, dim, row * width)
    return out


def vector_gradient(
    x: torch.Tensor | None, e: torch.Tensor, segments: torch.Tensor, norm: str | None = None, eps: float = 0.0
) -> torch.Tensor:
    """Per-sample gradient of a vector parameter: sum_t e_t (bias) or sum_t e_t * x_hat_t (norm) -> [B, d].

    norm: None for a bias; "rms" for x_hat = x / sqrt(mean(x^2) + eps); "layer" for the centred
    x_hat = (x - mean) / sqrt(var + eps).
    """
    e = e.double()
    if norm is None:
        return sum_segments(e, segments)
    x = x.double()
    if norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x_hat = x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return sum_segments(e * x_hat, segments)


def softmax_fold(
    logits: torch.Tensor,
    labels: torch.Tensor,
    table: Table | None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss, its gradient and the folded gradient for rows of raw logits [T, V] and labels [T].

    The model's logits are l = scale * x, then softcap * tanh(l / softcap) if softcap is given, x being the
    raw product of hidden state and head weight. Returns loss [T] = logsumexp(l) - l[label], the gradient
    e [T, V] with respect to x, and S_V e [T, K] (None without a table).
    """
    x = logits.double() * scale
    slope = torch.full_like(x, scale)
    if softcap is not None:
        capped = torch.tanh(x / softcap)
        x, slope = softcap * capped, slope * (1 - capped.square())
    log_p = torch.log_softmax(x, dim=-1)
    loss = -log_p.gather(1, labels.long()[:, None])[:, 0]
    e = log_p.exp()
    e.scatter_add_(1, labels.long()[:, None], torch.full_like(e[:, :1], -1.0))
    e = e * slope
    return loss, e, None if table is None else fold(e, table)


def head_sketch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    segments: torch.Tensor,
    hidden_table: Table,
    vocab_table: Table,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The LM head: hidden [T, d], weight [V, d], labels [T] -> loss [T], dh [T, d] and sketch [B, K]."""
    logits = hidden.double() @ weight.double().T
    loss, e, folded = softmax_fold(logits, labels, vocab_table, softcap, scale)
    product = hadamard(folded) * fold_hadamard(hidden, hidden_table)
    return loss, e @ weight.double(), sum_segments(product, segments) / math.sqrt(vocab_table.dim)


def sum_segments(rows: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Sum of each sample's rows: [T, n] -> [B, n]."""
    spans = segments.tolist()
    out = torch.zeros(len(spans), rows.shape[1], dtype=rows.dtype, device=rows.device)
    for sample, (begin, end) in enumerate(spans):
        out[sample] = rows[begin:end].sum(dim=0)
    return out


def sketch_of_gradient(
    gradients: Mapping[str, torch.Tensor],
    spec: SketchSpec,
    transposed: frozenset[str] = frozenset(),
    stacked: frozenset[str] = frozenset(),
) -> torch.Tensor:
    """Sketch one sample's materialised gradient {parameter name: tensor} -> float64 [K].

    A matrix [O, I] gives K^(-1/2) sum_o (H S_o e_o) * (H S_i g_o), or K^(-1/2) Pi^T vec(g) for the kind
    "rademacher"; a vector is a matrix with I = 1, a scalar a vector of one, and a tensor [d0, d1, d2, ...] (a
    convolution) the matrix [d0, d1 d2 ...]. A weight stored as [I, O] (GPT-2's Conv1D) is named in `transposed`.
    Experts in one tensor [E, O, I], or [E, I, O] if also in `transposed`, and their biases [E, O] are named in
    `stacked`: each expert is a parameter of its own (`expert_name`), and their sketches add up.
    This is what the fast path must return.
    """
    z = torch.zeros(spec.dim, dtype=torch.float64)
    for name, gradient in gradients.items():
        g = gradient.detach().double().cpu()
        turned = name in transposed
        if name not in stacked:
            g = _as_matrix(name, g, turned)
            columns = column_table(spec, name, g.shape[1]) if g.dim() == 2 else None
            z += _sketch_of_matrix(name, g, spec, columns)
            continue
        if g.dim() not in (2, 3) or (turned and g.dim() != 3):
            raise GvendiError(
                f"gradient {name!r} of stacked experts has shape {tuple(g.shape)}; wanted [experts, outputs, inputs], "
                "or [experts, outputs] of a bias, which is not transposed"
            )
        tables = None
        if g.dim() == 3:
            tables = expert_column_tables(spec, name, len(g), g.shape[1 if turned else 2])
        for expert, own in enumerate(g):
            columns = None if tables is None else tables.table(expert)
            z += _sketch_of_matrix(expert_name(name, expert), own.T if turned else own, spec, columns)
    return z / math.sqrt(spec.dim)


def _as_matrix(name: str, g: torch.Tensor, turned: bool) -> torch.Tensor:
    if turned and g.dim() != 2:
        raise GvendiError(
            f"gradient {name!r} is transposed and has shape {tuple(g.shape)}; wanted a matrix [inputs, outputs]"
        )
    if g.dim() < 2:
        return g.reshape(-1)
    return g.T if turned else g.flatten(1)


def _sketch_of_matrix(name: str, g: torch.Tensor, spec: SketchSpec, columns: Table | None) -> torch.Tensor:
    """sqrt(K) times the sketch of a parameter's gradient [O, I] with the table of its inputs, or [O] without -> [K]."""
    if spec.kind == "rademacher":
        return project(g.reshape(1, -1), sign_key(spec.seed, name), spec.dim)[0] * math.sqrt(spec.dim)
    rows = row_table(spec, name, len(g))
    if g.dim() == 1:
        return fold_hadamard(g[None], rows)[0]
    # H S_o G S_i^T H is K x K; the sketch is the diagonal, and folding first keeps the work small.
    folded = fold(fold(g, columns).T.contiguous(), rows).T.contiguous()
    return torch.diagonal(hadamard(hadamard(folded).T.contiguous()))


def normalise(rows: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Rows scaled to unit length: [N, K] -> float64 [N, K]."""
    x = torch.as_tensor(rows).double()
    return x / x.norm(dim=1, keepdim=True)


def covariance(rows: torch.Tensor | np.ndarray) -> tuple[torch.Tensor, int]:
    """A = sum_i z_i z_i^T of the normalised rows, float64 [K, K], and n."""
    z = normalise(rows)
    return z.T @ z, len(z)


def assign(
    rows: torch.Tensor | np.ndarray, centroids: torch.Tensor | np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The most similar centroid of every row and the next: rows [N, K], unit centroids [C, K].

    Returns label int64 [N], cosine float64 [N], and both of the second; cosine <x, c> / ||x||. Of equal cosines the
    lower label comes first. With one centroid the second is -1 and its cosine NaN.
    """
    z, centroids = normalise(rows), torch.as_tensor(centroids).double()
    # One centroid at a time, so that equal centroids have equal cosines.
    cosines = torch.stack([(z * centroid).sum(dim=1) for centroid in centroids], dim=1)
    values, order = cosines.sort(dim=1, descending=True, stable=True)
    if len(centroids) == 1:
        return order[:, 0], values[:, 0], torch.full_like(order[:, 0], -1), torch.full_like(z[:, 0], math.nan)
    return order[:, 0], values[:, 0], order[:, 1], values[:, 1]


def entropy(eigenvalues: torch.Tensor | np.ndarray, q: float = 1.0) -> float:
    """Renyi entropy of order q > 0 (nats) of eigenvalues that sum to 1; q = 1 is the von Neumann entropy."""
    x = torch.as_tensor(eigenvalues).double()
    x = x[x > 0]
    if q == 1:
        return float(-(x * x.log()).sum())
    if math.isinf(q):
        return float(-x.max().log())
    return float((x**q).sum().log() / (1 - q))


def group_entropies(
    rows: torch.Tensor | np.ndarray, boundaries: torch.Tensor, q: float = 1.0
) -> torch.Tensor:
    """Entropy of order q of each group of rows [N, K], boundaries[g] .. boundaries[g + 1] -> float64 [G].

    Eigenvalues of the Gram matrix of the group's unit rows, over their sum. At q < 1, where the entropy is
    infinitely steep at 0, eigenvalues below SPECTRUM_NOISE do not count: in float32 rows they may be rounding.
    """
    z, spans = normalise(rows), boundaries.tolist()
    out = torch.empty(len(spans) - 1, dtype=torch.float64)
    for group, (begin, end) in enumerate(itertools.pairwise(spans)):
        eigenvalues = torch.linalg.eigvalsh(z[begin:end] @ z[begin:end].T)
        eigenvalues = eigenvalues / eigenvalues.sum()
        if q < 1:
            eigenvalues = eigenvalues[eigenvalues >= SPECTRUM_NOISE]
        out[group] = entropy(eigenvalues / eigenvalues.sum(), q)
    return out


def group_gains(rows: torch.Tensor | np.ndarray, boundaries: torch.Tensor) -> torch.Tensor:
    """H_1 of a row's group less that of the group without it -> float64 [N], NaN outside all groups.

    Group g is rows boundaries[g] .. boundaries[g + 1] of [N, K]. Of nothing the entropy is 0.
    """
    spans = boundaries.tolist()
    out = torch.full((len(rows),), math.nan, dtype=torch.float64)
    for begin, end in itertools.pairwise(spans):
        own = torch.as_tensor(rows[begin:end])
        whole = group_entropies(own, torch.tensor([0, len(own)]))
        for i in range(len(own)):
            left = torch.cat([own[:i], own[i + 1 :]])
            out[begin + i] = whole - (group_entropies(left, torch.tensor([0, len(left)])) if len(left) else 0)
    return out


def centred(rows: torch.Tensor | np.ndarray, mean: torch.Tensor) -> torch.Tensor:
    """c = (z - m) / |z - m| of each normalised row z of rows [N, K], m = mean [K] -> float64 [N, K]; 0 where z = m."""
    left = normalise(rows) - torch.as_tensor(mean).double()
    norm = left.norm(dim=1, keepdim=True)
    return left / torch.where(norm > 0, norm, 1)


def entropy_after_removal(a: torch.Tensor, n: int, x: torch.Tensor, q: float = 1.0) -> float:
    """Entropy of the n - 1 rows that stay when the unit row x [K] leaves A [K, K], by eigenvalues."""
    x = torch.as_tensor(x).double()
    left = torch.as_tensor(a).double() - torch.outer(x, x)
    return entropy(torch.linalg.eigvalsh(left / (n - 1)), q)


def trace_log(a: torch.Tensor) -> torch.Tensor:
    """S(A) = tr(A ln A) of symmetric matrices [..., K, K], eigenvalues not negative up to rounding -> [...]."""
    eigenvalues = torch.linalg.eigvalsh(torch.as_tensor(a).double()).clamp_min(0)
    return torch.special.xlogy(eigenvalues, eigenvalues).sum(dim=-1)


def gain(a: torch.Tensor, rows: torch.Tensor | np.ndarray, sign: int) -> torch.Tensor:
    """Delta S = S(A + sign x x^T) - S(A) of each normalised row x of rows [N, K] alone -> float64 [N]."""
    a = torch.as_tensor(a).double()
    changed = [trace_log(a + sign * torch.outer(x, x)) for x in normalise(rows)]
    return torch.stack(changed) - trace_log(a) if changed else a.new_empty(0)


def block_gain(a: torch.Tensor, rows: torch.Tensor | np.ndarray, boundaries: torch.Tensor) -> torch.Tensor:
    """S(A + X^T X) - S(A), X the normalised rows boundaries[g] .. boundaries[g + 1] of [N, K] -> float64 [G]."""
    a, z = torch.as_tensor(a).double(), normalise(rows)
    spans = itertools.pairwise(boundaries.tolist())
    changed = [trace_log(a + z[begin:end].T @ z[begin:end]) for begin, end in spans]
    return torch.stack(changed) - trace_log(a) if changed else a.new_empty(0)


def plain_greedy(
    rows: torch.Tensor | np.ndarray,
    size: int,
    value: Callable[[torch.Tensor], float],
    ids: Sequence[str],
    given: torch.Tensor | None = None,
    allowed: Callable[[list[int]], bool] = lambda chosen: True,
) -> list[int]:
    """Rows picked one by one: always the row that raises `value` of the given and chosen unit rows [m, K] most.

    Of rows whose values are within 1e-9 of the best, the smallest id wins. `allowed` says whether chosen rows keep the
    quotas.
    """
    z = normalise(rows)
    start = z[:0] if given is None else normalise(given)
    chosen: list[int] = []
    for _ in range(size):
        open_rows = [i for i in range(len(z)) if i not in chosen and allowed([*chosen, i])]
        values = {i: value(torch.cat([start, z[[*chosen, i]]])) for i in open_rows}
        best = max(values.values())
        chosen.append(min((i for i in open_rows if values[i] >= best - 1e-9), key=lambda i: ids[i]))
    return chosen


def entropy_of_set(rows: torch.Tensor) -> float:
    """F = -tr(A ln A), A = sum z z^T of the unit rows [m, K], by the eigenvalues of the Gram matrix."""
    eigenvalues = torch.linalg.eigvalsh(rows @ rows.T)
    eigenvalues = eigenvalues[eigenvalues > 0]
    return -float((eigenvalues * eigenvalues.log()).sum())
