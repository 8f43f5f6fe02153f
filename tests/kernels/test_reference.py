"""The definitions against cases worked by hand and against plain dense algebra."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import reference
from gvendi_fast.kernels.sketch_matrix import SketchSpec, Table, column_table, row_table


def table(dim: int, bucket: list[int], sign: list[int]) -> Table:
    return Table(dim, np.array(bucket, dtype=np.int16), np.array(sign, dtype=np.int8))


def dense(t: Table) -> torch.Tensor:
    s = torch.zeros(t.dim, t.width, dtype=torch.float64)
    s[torch.as_tensor(t.bucket.astype(np.int64)), torch.arange(t.width)] = torch.as_tensor(
        t.sign.astype(np.float64)
    )
    return s


def test_worked_by_hand():
    # K = 4, one token. S_i a = (0, 3, -2, 0), S_o e = (5, 0, 0, 0).
    # H S_i a = (1, -5, 5, -1) with H rows (1 1 1 1), (1 -1 1 -1), (1 1 -1 -1), (1 -1 -1 1).
    a, e = torch.tensor([[2.0, 3.0]]), torch.tensor([[-5.0]])
    a_table, e_table = table(4, [2, 1], [-1, 1]), table(4, [0], [-1])
    assert reference.fold(a, a_table).tolist() == [[0, 3, -2, 0]]
    assert reference.fold_hadamard(a, a_table).tolist() == [[1, -5, 5, -1]]
    z = reference.linear_sketch(a, e, torch.tensor([[0, 1], [1, 1]]), a_table, e_table)
    assert z.tolist() == [[2.5, -12.5, 12.5, -2.5], [0, 0, 0, 0]]


@pytest.mark.parametrize("dim", [1, 2, 64, 1024])
def test_hadamard_is_the_sylvester_matrix(dim):
    h = torch.as_tensor(scipy.linalg.hadamard(dim)).double()
    x = torch.randn(3, dim, dtype=torch.float64)
    torch.testing.assert_close(reference.hadamard(x), x @ h)


def test_linear_sketch_equals_dense_algebra():
    spec = SketchSpec(64, seed=2)
    a, e = torch.randn(9, 70, dtype=torch.float64), torch.randn(9, 30, dtype=torch.float64)
    rows, columns = row_table(spec, "m.l.weight", 30), column_table(spec, "m.l.weight", 70)
    h = torch.as_tensor(scipy.linalg.hadamard(64)).double()
    gradient = e.T @ a
    wanted = torch.diagonal(h @ dense(rows) @ gradient @ dense(columns).T @ h) / 8
    got = reference.linear_sketch(a, e, torch.tensor([[0, 9]]), columns, rows)[0]
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(reference.sketch_of_gradient({"m.l.weight": gradient}, spec), wanted)
    by_conv1d = reference.sketch_of_gradient({"m.l.weight": gradient.T}, spec, frozenset(["m.l.weight"]))
    torch.testing.assert_close(by_conv1d, wanted)


def test_token_sketch_is_the_sketch_of_the_embedding_gradient():
    spec = SketchSpec(64)
    ids, e = torch.tensor([3, 3, 0, 99]), torch.randn(4, 20, dtype=torch.float64)
    gradient = torch.zeros(100, 20, dtype=torch.float64).index_add_(0, ids, e)
    rows, columns = row_table(spec, "m.e.weight", 100), column_table(spec, "m.e.weight", 20)
    got = reference.token_sketch(ids, e, torch.tensor([[0, 4]]), rows, columns)[0]
    torch.testing.assert_close(got, reference.sketch_of_gradient({"m.e.weight": gradient}, spec))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_vector_gradient_is_the_gradient_of_a_norm_weight(norm):
    x, e = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    module = {"rms": torch.nn.RMSNorm, "layer": torch.nn.LayerNorm}[norm](12, eps=1e-3).double()
    module(x).backward(e)
    got = reference.vector_gradient(x, e, torch.tensor([[0, 5]]), norm, 1e-3)[0]
    torch.testing.assert_close(got, module.weight.grad)
    if norm == "layer":
        torch.testing.assert_close(
            reference.vector_gradient(None, e, torch.tensor([[0, 5]]))[0], module.bias.grad
        )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_head_sketch_is_autograd(softcap, scale):
    spec = SketchSpec(64)
    hidden = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(150, 10, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 149, 7, 7, 3, 80])
    logits = hidden @ weight.T * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted_loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    wanted_loss.sum().backward()
    rows, columns = row_table(spec, "h.weight", 150), column_table(spec, "h.weight", 10)
    loss, grad_hidden, z = reference.head_sketch(
        hidden.detach(), weight.detach(), labels, torch.tensor([[0, 6]]), columns, rows, softcap, scale
    )
    torch.testing.assert_close(loss, wanted_loss.detach())
    torch.testing.assert_close(grad_hidden, hidden.grad)
    torch.testing.assert_close(z[0], reference.sketch_of_gradient({"h.weight": weight.grad}, spec))


def test_sketch_preserves_inner_products_on_average():
    generator = torch.Generator().manual_seed(0)
    g, other = (torch.randn(40, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    g, other = g / g.norm(), (g / g.norm() + other / other.norm()) / math.sqrt(2)
    products = []
    for seed in range(300):
        spec = SketchSpec(64, seed=seed)
        products.append(
            float(
                reference.sketch_of_gradient({"m.l.weight": g}, spec)
                @ reference.sketch_of_gradient({"m.l.weight": other}, spec)
            )
        )
    # Four standard errors of the mean.
    assert abs(np.mean(products) - float((g * other).sum())) < 4 * np.std(products) / math.sqrt(len(products))
    # Dense signs have K * variance = 1 + cos^2 at most 2; a full-rank layer comes close to it.
    assert 64 * np.var(products) < 3


def test_a_scalar_is_a_vector_and_a_convolution_a_matrix():
    spec, generator = SketchSpec(64), torch.Generator().manual_seed(0)
    scalar, kernel = torch.tensor(2.5), torch.randn(6, 3, 4, generator=generator)
    for kind in ("hadamard", "rademacher"):
        own = SketchSpec(64, kind)
        for odd, plain in [(scalar, scalar[None]), (kernel, kernel.reshape(6, 12))]:
            found, wanted = (reference.sketch_of_gradient({"m.c.weight": g}, own) for g in (odd, plain))
            assert torch.equal(found, wanted)
            assert float(found.norm()) > 0
    h = torch.as_tensor(scipy.linalg.hadamard(64)).double()
    wanted = 2.5 / 8 * (h @ dense(row_table(spec, "m.c.weight", 1)))[:, 0]
    torch.testing.assert_close(reference.sketch_of_gradient({"m.c.weight": scalar}, spec), wanted)


@pytest.mark.parametrize(
    ("shape", "named", "message"),
    [
        ((3, 4, 5), "transposed", r"'w' is transposed and has shape \(3, 4, 5\); wanted a matrix"),
        ((4,), "transposed", r"'w' is transposed and has shape \(4,\); wanted a matrix"),
        ((4,), "stacked", r"'w' of stacked experts has shape \(4,\); wanted \[experts"),
        ((2, 3, 4, 5), "stacked", r"'w' of stacked experts has shape \(2, 3, 4, 5\)"),
        ((4, 5), "both", r"'w' of stacked experts has shape \(4, 5\).*not transposed"),
    ],
)
def test_gradients_of_impossible_shapes_are_refused(shape, named, message):
    name = frozenset(["w"])
    names = {"transposed": [name], "stacked": [frozenset(), name], "both": [name, name]}[named]
    with pytest.raises(GvendiError, match=message):
        reference.sketch_of_gradient({"w": torch.zeros(shape)}, SketchSpec(64), *names)


def test_entropy_by_hand():
    assert reference.entropy(np.array([0.5, 0.5, 0.0])) == pytest.approx(math.log(2))
    assert reference.entropy(np.array([0.75, 0.25]), 2) == pytest.approx(-math.log(0.625))
    assert reference.entropy(np.array([0.75, 0.25]), math.inf) == pytest.approx(-math.log(0.75))
    a, n = reference.covariance(np.eye(3)[[0, 1, 2, 2]])
    assert n == 4
    assert reference.entropy_after_removal(a, n, np.eye(3)[2]) == pytest.approx(math.log(3))


def test_group_gains_by_hand():
    # Without a: (a, b), so ln 2. Without b: (a, a), so 0. With all: shares of 2/3 and 1/3. A row alone has no others.
    rows = torch.tensor([[2.0, 0.0], [0.1, 0.0], [0.0, -3.0], [1.0, 1.0], [5.0, 5.0]])
    whole = -2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3)
    got = reference.group_gains(rows, torch.tensor([0, 3, 4])).tolist()
    assert got[:4] == pytest.approx([whole - math.log(2), whole - math.log(2), whole, 0])
    assert math.isnan(got[4])


def test_plain_greedy_by_hand():
    """e1, e1, e2 and their diagonal: after a tie of all, e2 is orthogonal; then any row doubles an eigenvalue."""
    rows = torch.tensor([[1.0, 0], [2, 0], [0, 3], [1, 1]])
    assert reference.entropy_of_set(reference.normalise(rows[:3])) == pytest.approx(-2 * math.log(2))
    assert reference.plain_greedy(rows, 3, reference.entropy_of_set, ["b", "a", "c", "d"]) == [1, 2, 0]
    assert reference.plain_greedy(rows, 3, reference.entropy_of_set, ["d", "b", "c", "a"]) == [3, 1, 2]
    # Given e2, e1 comes first; with one row of e1 allowed the diagonal follows.
    found = reference.plain_greedy(
        rows[[0, 1, 3]],
        2,
        reference.entropy_of_set,
        "abc",
        rows[2:3],
        lambda chosen: not {0, 1} <= set(chosen),
    )
    assert found == [0, 2]


def test_centred_rows_by_hand():
    """Three orthogonal rows less their mean lie in a plane, at 120 degrees: 2 directions, equally used."""
    z = torch.eye(3, dtype=torch.float64)
    c = reference.centred(5 * z, z.mean(0))
    wanted = torch.tensor([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2]], dtype=torch.float64) / math.sqrt(6)
    assert torch.allclose(c, wanted, rtol=0, atol=1e-15)
    # (1/3) sum c c^T = (1/18) [[6, -3, -3], ...] has the eigenvalues 1/2, 1/2 and 0.
    spectrum = torch.linalg.eigvalsh(c.T @ c / 3)
    assert torch.allclose(spectrum, torch.tensor([0, 0.5, 0.5], dtype=torch.float64), atol=1e-15)
    # Against another reference: a row that equals it has no direction left.
    c = reference.centred(z[:2], z[0])
    assert c[0].tolist() == [0.0, 0.0, 0.0]
    assert c[1].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5), 0.0], abs=1e-15)
