"""Every argument of every verb, given as a tensor of an odd kind: the same numbers, or one error that names it."""

import warnings

import numpy as np
import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.clusters import SphericalKMeans
from gvendi_fast.kernels import ops
from gvendi_fast.kernels.signs import COORDINATES, philox4x32_10, signs
from gvendi_fast.kernels.sketch_matrix import SketchSpec, expert_row_tables, make_table
from gvendi_fast.selection import select
from gvendi_fast.vendi import VendiState

K, T, D = 64, 6, 32
RANDOM = torch.Generator().manual_seed(0)
TABLE = make_table(0, "a", D, K)
EXPERTS = expert_row_tables(SketchSpec(K), "w", T, D)
X, E, LOGITS = (torch.randn(T, D, generator=RANDOM) for _ in range(3))
IDS, SEGMENTS, BOUNDARIES = torch.arange(T), torch.tensor([[0, 3], [3, 6]]), torch.tensor([0, 3, 6])
ROWS, CENTROIDS = (torch.nn.functional.normalize(torch.randn(n, K, generator=RANDOM)) for n in (T, 3))
A = (ROWS.T @ ROWS).double()
EIGENVALUES, VECTORS = torch.linalg.eigh(A)
EIGENVALUES = EIGENVALUES.clamp_min(0)


def out():
    return torch.zeros(2, K)


# {verb and argument: (its name in an error, the argument, the verb of it)}
ARGUMENTS = {
    "fold_hadamard x": ("x", X, lambda x: ops.fold_hadamard(x, TABLE)),
    "linear_sketch a": ("a", X, lambda x: ops.linear_sketch(x, TABLE, [(E, TABLE)], SEGMENTS, out())),
    "linear_sketch e": ("parts[0]", E, lambda x: ops.linear_sketch(X, TABLE, [(x, TABLE)], SEGMENTS, out())),
    "linear_sketch segments": (
        "segments",
        SEGMENTS,
        lambda x: ops.linear_sketch(X, TABLE, [(E, TABLE)], x, out()),
    ),
    "linear_sketch out": ("out", out(), lambda x: ops.linear_sketch(X, TABLE, [(E, TABLE)], SEGMENTS, x)),
    "expert_sketch a": ("a", X, lambda x: ops.expert_sketch(x, E, IDS, IDS % 2, EXPERTS, EXPERTS, out())),
    "expert_sketch e": ("e", E, lambda x: ops.expert_sketch(X, x, IDS, IDS % 2, EXPERTS, EXPERTS, out())),
    "expert_sketch experts": (
        "experts",
        IDS,
        lambda x: ops.expert_sketch(X, E, x, IDS % 2, EXPERTS, EXPERTS, out()),
    ),
    "expert_sketch samples": (
        "samples",
        IDS % 2,
        lambda x: ops.expert_sketch(X, E, IDS, x, EXPERTS, EXPERTS, out()),
    ),
    "expert_sketch out": (
        "out",
        out(),
        lambda x: ops.expert_sketch(X, E, IDS, IDS % 2, EXPERTS, EXPERTS, x),
    ),
    "token_sketch ids": ("ids", IDS, lambda x: ops.token_sketch(x, E, SEGMENTS, TABLE, TABLE, out())),
    "token_sketch e": ("e", E, lambda x: ops.token_sketch(IDS, x, SEGMENTS, TABLE, TABLE, out())),
    "vector_sketch x": ("x", X, lambda x: ops.vector_sketch(x, E, SEGMENTS, TABLE, out(), "rms", 1e-6)),
    "vector_sketch e": ("e", E, lambda x: ops.vector_sketch(None, x, SEGMENTS, TABLE, out())),
    "dense_sketch a": ("a", X, lambda x: ops.dense_sketch(x, E, SEGMENTS, (1, 2), out())),
    "dense_sketch e": ("e", E, lambda x: ops.dense_sketch(X, x, SEGMENTS, (1, 2), out())),
    "softmax_fold logits": ("logits", LOGITS, lambda x: ops.softmax_fold(x, IDS, TABLE)),
    "softmax_fold labels": ("labels", IDS, lambda x: ops.softmax_fold(LOGITS.clone(), x, TABLE)),
    "covariance rows": ("rows", ROWS, lambda x: ops.covariance(x, torch.zeros(K, K, dtype=torch.float64))),
    "covariance out": ("out", torch.zeros(K, K, dtype=torch.float64), lambda x: ops.covariance(ROWS, x)),
    "entropy rows": ("rows", ROWS, lambda x: ops.entropy(x, BOUNDARIES)),
    "entropy boundaries": ("boundaries", BOUNDARIES, lambda x: ops.entropy(ROWS, x)),
    "gain rows": ("rows", ROWS, lambda x: ops.gain(x, EIGENVALUES, VECTORS, 1)),
    "gain eigenvalues": ("eigenvalues", EIGENVALUES, lambda x: ops.gain(ROWS, x, VECTORS, 1)),
    "gain vectors": ("vectors", VECTORS, lambda x: ops.gain(ROWS, EIGENVALUES, x, 1)),
    "assign rows": ("rows", ROWS, lambda x: ops.assign(x, CENTROIDS)),
    "assign centroids": ("centroids", CENTROIDS, lambda x: ops.assign(ROWS, x)),
}
NEVER = {
    "negative view": torch._neg_view,
    "conjugate view": lambda x: torch.complex(x, x).conj(),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
    "array": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "nothing": lambda x: 5,
    "one number": lambda x: x.flatten()[0],
}
SAME = {
    "one row many times": lambda x: x[:1].expand(*x.shape),
    "one column many times": lambda x: x[..., :1].expand(*x.shape),
    "columns first": lambda x: x.T.contiguous().T,
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "no rows": lambda x: x[:0],
    "part of a matrix": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
}


def made(make, x):
    # torch warns of prototypes.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(x.clone())


@pytest.mark.parametrize("where", ARGUMENTS)
def test_what_is_no_ordinary_tensor_is_refused_by_name(where):
    name, x, verb = ARGUMENTS[where]
    for kind, make in NEVER.items():
        if kind == "conjugate view" and not x.is_floating_point():
            continue
        if kind == "sparse rows" and x.dim() != 2:
            continue
        with pytest.raises(GvendiError) as caught:
            verb(made(make, x))
        assert str(caught.value).startswith(name), (kind, str(caught.value))


@pytest.mark.parametrize("where", ARGUMENTS)
def test_other_strides_of_the_same_numbers_give_the_same_or_are_refused(where):
    _, x, verb = ARGUMENTS[where]
    for kind, make in SAME.items():
        given = made(make, x) if not (kind == "columns first" and x.dim() != 2) else x.clone()
        plain = given.clone(memory_format=torch.contiguous_format)
        try:
            found = verb(given)
        except GvendiError:
            continue
        wanted = verb(plain)
        for one, other in zip(*(y if isinstance(y, tuple) else (y,) for y in (found, wanted)), strict=True):
            assert torch.equal(one, other), kind


def test_logits_whose_rows_share_memory_are_not_overwritten():
    shared = LOGITS[:1].clone().expand(T, D)
    with pytest.raises(GvendiError, match="rows of logits share memory"):
        ops.softmax_fold(shared, IDS, TABLE)
    assert torch.equal(shared[0], LOGITS[0])


@pytest.mark.parametrize("kind", [*NEVER, *SAME])
def test_entry_points_take_the_same_numbers_or_refuse_by_name(kind):
    rows = torch.randn(40, K, generator=torch.Generator().manual_seed(2))
    given = made({**NEVER, **SAME}[kind], rows)
    state = VendiState(K).update(rows)
    calls = {
        "select": lambda x: select(x, 5).rows.tolist(),
        "must_include": lambda x: select(rows, 5, must_include=x).rows.tolist(),
        "fit": lambda x: SphericalKMeans(3).fit(x).counts.tolist(),
        "assign": lambda x: SphericalKMeans(3).fit(rows).assign(x).label.tolist(),
        "partial_fit": lambda x: SphericalKMeans(3).partial_fit(x).counts.tolist(),
        "gain": lambda x: state.gain(x).tolist(),
    }
    for name, call in calls.items():
        try:
            found = call(given)
        except GvendiError:
            continue
        assert kind not in ("conjugate view", "meta", "nested", "nothing", "list", "one number"), name
        plain = given.resolve_neg().clone() if isinstance(given, torch.Tensor) else torch.as_tensor(given)
        assert found == call(plain.contiguous()), name


def test_signs_of_no_coordinates_are_empty_and_of_impossible_ones_refused():
    whole = signs((1, 2), 0, 3 * COORDINATES, 8)
    for begin, end in [(0, 0), (5, 5), (COORDINATES, COORDINATES), (5, 6), (127, 129), (128, 256)]:
        part = signs((1, 2), begin, end, 8)
        assert part.shape == (end - begin, 8)
        assert part.dtype == np.int8
        assert np.array_equal(part, whole[begin:end])
    assert signs((1, 2), 0, 5, 0).shape == (5, 0)
    assert philox4x32_10(np.empty((0, 4), np.uint64), (1, 2)).shape == (0, 4)
    for begin, end, dim in [(5, 2, 8), (-5, 2, 8), (0, 1 << 64, 8), (0, 5, -1)]:
        with pytest.raises(GvendiError, match="signs: rows"):
            signs((1, 2), begin, end, dim)
    with pytest.raises(GvendiError, match="counter must have shape"):
        philox4x32_10(np.empty(3, np.uint64), (1, 2))
    with pytest.raises(GvendiError, match="width must be at least 1"):
        make_table(0, "a", 0, 64)
