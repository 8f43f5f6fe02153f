"""The Vendi score under the names of `vendi-score`: that package's own examples, and scipy where it is wrong."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import torch

from gvendi_fast import vendi
from gvendi_fast.base.errors import GvendiError

SAMPLES = [0, 0, 10, 10, 20, 20]


def closeness(a, b):
    return math.exp(-abs(a - b))


def features(n=40, d=12, rank=None, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, rank or d)) @ rng.standard_normal((rank or d, d))


def by_scipy(K, q, p=None):
    """Any order from scipy's eigenvalues, those that may be rounding left out."""
    weights = np.full(len(K), 1 / len(K)) if p is None else np.asarray(p)
    w = scipy.linalg.eigvalsh(K * np.sqrt(np.outer(weights, weights)))
    w = w[w > 1e-13]
    if q == 1:
        return math.exp(-(w * np.log(w)).sum())
    return 1 / w.max() if q in ("inf", math.inf) else (w**q).sum() ** (1 / (1 - q))


def cosines(X):
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("q", [1, 2, 0.5, "inf"])
def test_the_peers_own_examples_give_its_numbers(q):
    peer = pytest.importorskip("vendi_score.vendi")
    K = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    X = features(30, 8)
    p = np.random.default_rng(1).dirichlet(np.ones(3))
    assert vendi.score(SAMPLES, closeness, q=q) == pytest.approx(
        peer.score(SAMPLES, closeness, q=q), rel=1e-6
    )
    assert vendi.score_K(K, q=q) == pytest.approx(peer.score_K(K, q=q), rel=1e-6)
    assert vendi.score_K(K, q=q, p=p) == pytest.approx(peer.score_K(K, q=q, p=p), rel=1e-6)
    assert vendi.score_K(3 * K, q=q, normalize=True) == pytest.approx(
        peer.score_K(3 * K, q=q, normalize=True), rel=1e-6
    )
    assert vendi.score_dual(X, q=q) == pytest.approx(peer.score_dual(X, q=q), rel=1e-6)


def test_three_kinds_of_samples_score_three():
    assert vendi.score(SAMPLES, closeness) == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("q", [0.1, 0.5, 1, 1.001, 2, 5, "inf"])
@pytest.mark.parametrize(("n", "d", "rank"), [(40, 12, None), (12, 40, None), (30, 20, 4)])
def test_any_order_in_every_function_as_scipy_has_it(n, d, rank, q):
    X = features(n, d, rank)
    p = np.random.default_rng(2).dirichlet(np.ones(n))
    for weights in (None, p):
        wanted = by_scipy(cosines(X), q, weights)
        assert vendi.score_X(X, q=q, p=weights) == pytest.approx(wanted, rel=1e-6)
        assert vendi.score_dual(X, q=q, p=weights) == pytest.approx(wanted, rel=1e-6)
        assert vendi.score_K(cosines(X), q=q, p=weights) == pytest.approx(wanted, rel=1e-6)


def test_order_0_is_the_rank():
    assert vendi.score_X(features(30, 20, rank=4), q=0) == pytest.approx(4)


def test_the_peer_ignores_the_order_in_score_X_and_this_does_not():  # noqa: N802
    peer = pytest.importorskip("vendi_score.vendi")
    X = features()
    assert peer.score_X(X, q=2) == pytest.approx(vendi.score_X(X, q=1))
    assert vendi.score_X(X, q=2) == pytest.approx(by_scipy(cosines(X), 2), rel=1e-6)


def test_torch_lists_and_sparse_matrices_are_read():
    K = cosines(features(6, 5))
    wanted = vendi.score_K(K)
    for given in (torch.from_numpy(K), K.tolist(), scipy.sparse.csr_matrix(K)):
        assert vendi.score_K(given) == pytest.approx(wanted, rel=1e-12)


def test_what_is_no_similarity_is_said():
    with pytest.warns(UserWarning, match="diagonal of K is not 1"):
        assert vendi.score_K(2 * np.eye(3), q=2) == pytest.approx(1 / (3 * (2 / 3) ** 2))
    with pytest.warns(UserWarning, match="not positive semi-definite"):
        vendi.score_K(np.array([[1.0, 2.0], [2.0, 1.0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vendi.score_K(np.ones((2, 3))), r"K has shape \(2, 3\); wanted a square"),
        (lambda: vendi.score_K([[1.0, 0.5], [0.1, 1.0]]), "K is not symmetric"),
        (lambda: vendi.score_K([[1.0, math.nan], [math.nan, 1.0]]), "K holds a number that is not finite"),
        (lambda: vendi.score_K([[0.0, 0.0], [0.0, 1.0]], normalize=True), r"K\[0, 0\] is 0.0"),
        (lambda: vendi.score_X([[0.0, 0.0], [1.0, 0.0]]), r"X\[0\] is zero"),
        (lambda: vendi.score_X(np.eye(2), p=[0.5, 0.6]), "wanted 2 weights"),
        (lambda: vendi.score([], closeness), "at least one row"),
        (lambda: vendi.score_X(np.eye(2), q=-1), "wanted an order above 0"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(GvendiError, match=message):
        call()
