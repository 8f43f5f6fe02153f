"""Centred G-Vendi and means of rows: by hand, against the definition, in blocks, saved, and where nothing is left."""

import json
import math

import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import reference
from gvendi_fast.vendi import VendiState, gvendi, jackknife
from gvendi_fast.vendi.centered import (
    EQUAL,
    RowMean,
    centered,
    centered_blocks,
    entropy_without_mean,
    equal_mean,
)

# As in test_vendi: A is summed in float32 products.
CLOSE = 1e-5


def rows_of(n: int, dim: int, shared: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Gaussian rows float64 [n, dim] of falling scale, plus a direction that all share."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.5
    rows = torch.randn(n, dim, generator=generator, dtype=torch.float64) * scale
    return rows + shared * torch.randn(dim, generator=generator, dtype=torch.float64) * scale


def mean_of(*blocks, spec=None) -> RowMean:
    mean = RowMean(blocks[0].shape[1], spec)
    for block in blocks:
        mean.update(block)
    return mean


def brute(rows, mean: torch.Tensor) -> float:
    """Centred G-Vendi by the definition: eigenvalues of the Gram matrix of the centred rows, float64.

    They are the squares of the rows' singular values.
    """
    c = reference.centred(rows, mean)
    c = c[c.norm(dim=1) > 0]
    return math.exp(reference.entropy(torch.linalg.svdvals(c).square() / len(c)))


def test_orthogonal_rows_lose_one_direction():
    """Worked by hand: K orthogonal rows of any length less their mean span K - 1 directions equally."""
    for n in (2, 3, 7):
        rows = torch.eye(8, dtype=torch.float64)[:n] * torch.arange(1, n + 1)[:, None]
        mean = mean_of(rows)
        assert mean.vector()[:n].tolist() == pytest.approx([1 / n] * n, abs=1e-11)
        assert mean.squared_norm == pytest.approx(1 / n)
        found = centered(rows, mean)
        assert found.value == pytest.approx(n - 1, rel=CLOSE)
        assert (found.n, found.left_out, found.why_not, found.note) == (n, 0, None, None)
        # Here all rows are equally far from the mean, so the one-pass value is the same.
        assert entropy_without_mean(VendiState(8).update(rows), mean) == pytest.approx(
            math.log(n - 1), abs=1e-6
        )


def test_two_rows_by_hand():
    """z = e1, e2; against the mean e1 the first is left out and the second is one row: G-Vendi 1."""
    rows = torch.eye(2)
    found = centered(rows, mean_of(rows[:1]))
    assert (found.value, found.n, found.left_out) == (pytest.approx(1.0), 1, 1)
    assert found.note == "1 row equals the mean and counts only in the plain value"
    # Antipodal rows have the mean 0, so nothing changes: one direction.
    rows = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    found = centered(rows, mean_of(rows))
    assert (found.value, found.n, found.left_out) == (pytest.approx(1.0), 2, 0)
    # One of each sign of two directions: mean 0, and the plain value.
    rows = torch.cat([torch.eye(2), -torch.eye(2)])
    assert centered(rows, mean_of(rows)).value == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["one row", "one row many times", "one direction", "no rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_every_row_is_the_mean_there_is_no_value_and_a_reason(kind, dtype):
    row = torch.full((1, 8192), 0.3, dtype=dtype)
    rows = {
        "one row": row,
        "one row many times": row.repeat(7, 1),
        # Lengths that round differently.
        "one direction": row * torch.tensor([1, 3, 0.7, 1e-3, 17, 1e4, 0.1], dtype=dtype)[:, None],
        "no rows": row[:0],
    }[kind]
    mean = mean_of(row.repeat(3, 1))
    found = centered(rows, mean)
    assert found.value is None
    assert (found.n, found.left_out) == (0, len(rows))
    assert found.why_not in (
        "there are no rows",
        "the only row equals the mean, so nothing is left of it without that",
        f"all {len(rows)} rows equal the mean, so nothing is left of them without it",
    )
    assert found.note == found.why_not
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["value"] is None


def test_nothing_left_in_one_pass():
    for n in (1, 5):
        rows = torch.full((n, 64), 0.3)
        assert entropy_without_mean(VendiState(64).update(rows), mean_of(rows)) is None


@pytest.mark.parametrize(("n", "dim"), [(5, 16), (40, 16), (300, 24), (2500, 12)])
@pytest.mark.parametrize("shared", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_follows_the_definition(n, dim, shared, dtype):
    rows = rows_of(n, dim, shared).to(dtype)
    m = reference.normalise(rows).mean(0)
    found = centered(rows, mean_of(rows))
    assert found.value == pytest.approx(brute(rows, m), rel=CLOSE)
    other = rows_of(50, dim, shared, seed=3)
    reference_mean = reference.normalise(other).mean(0)
    assert centered(rows, mean_of(other)).value == pytest.approx(brute(rows, reference_mean), rel=CLOSE)


@pytest.mark.parametrize("shared", [0.0, 0.5, 5.0])
def test_one_pass_gives_the_covariance_with_rows_weighted_by_their_squared_distance(shared):
    """Sigma - s m^T - m s^T + m m^T over its trace, against rows z - m that keep their lengths."""
    rows, other = rows_of(200, 16, shared), rows_of(60, 16, shared, seed=5)
    state, own = VendiState(16).update(rows), mean_of(rows)
    z = reference.normalise(rows)
    for mean in (None, own, mean_of(other)):
        left = z - (own if mean is None else mean).vector()
        sigma = left.T @ left
        wanted = reference.entropy(torch.linalg.eigvalsh(sigma / sigma.trace()))
        assert entropy_without_mean(state, own, mean) == pytest.approx(wanted, abs=1e-6)


def test_sign_counts_once_rows_are_centred():
    rows = rows_of(30, 16, 3.0)
    flipped = rows * torch.tensor([1.0, -1.0])[torch.arange(30) % 2][:, None]
    assert gvendi(rows) == pytest.approx(gvendi(flipped), rel=1e-9)
    assert centered(rows, mean_of(rows)).value > 1.05 * centered(flipped, mean_of(flipped)).value


def test_blocks_order_and_merging_change_nothing():
    rows = rows_of(3000, 16).float()
    whole = mean_of(rows)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    shuffled = mean_of(*rows[order].split(97))
    merged = mean_of(rows[:5]).merge(mean_of(rows[5:1700])).merge(mean_of(rows[1700:].numpy()))
    for mean in (shuffled, merged):
        assert torch.equal(mean.vector(), whole.vector())
        assert (mean.n, mean.mark) == (3000, whole.mark)
    assert torch.allclose(whole.vector(), reference.normalise(rows).mean(0), rtol=0, atol=1e-11)
    in_memory, streamed = centered(rows, whole), centered(rows.split(130), whole)
    assert streamed.value == pytest.approx(in_memory.value, rel=1e-6)
    assert (streamed.n, streamed.state.spec) == (in_memory.n, in_memory.state.spec)
    backwards = centered(rows[order].numpy(), shuffled)
    assert backwards.value == pytest.approx(in_memory.value, rel=1e-6)


def test_the_jackknife_takes_the_centred_state_and_blocks():
    rows = rows_of(200, 8, 3.0).float()
    mean = mean_of(rows)
    found = centered(rows, mean)
    interval = jackknife(found.state, centered_blocks(rows.split(64), mean))
    assert interval.value == found.value
    assert interval.low < interval.value < interval.high
    exact = centered_blocks(rows.double(), mean)
    assert torch.cat(list(exact)) == pytest.approx(reference.centred(rows.double(), mean.vector()), abs=1e-9)


def test_the_mean_of_sets_weighs_each_set_the_same():
    many, few = rows_of(900, 16, seed=1), rows_of(10, 16, seed=2)
    together = equal_mean([mean_of(many), mean_of(few)])
    wanted = (reference.normalise(many).mean(0) + reference.normalise(few).mean(0)) / 2
    assert torch.allclose(together.vector(), wanted, rtol=0, atol=1e-11)
    assert together.n == 910
    assert torch.equal(equal_mean([mean_of(many)]).vector(), mean_of(many).vector())


def test_a_saved_mean_is_read_as_it_was(tmp_path):
    spec = {"proxy": "p", "sketch": {"dim": 16, "shape": (1, 2)}}
    mean = mean_of(rows_of(40, 16), spec=spec)
    mean.save(tmp_path / "mean.safetensors")
    read = RowMean.load(tmp_path / "mean.safetensors")
    assert torch.equal(read.vector(), mean.vector())
    assert (read.n, read.spec, read.dim, read.mark) == (40, mean.spec, 16, mean.mark)
    # It goes on where it was.
    assert torch.equal(read.update(rows_of(7, 16)).vector(), mean.update(rows_of(7, 16)).vector())
    VendiState(16).save(tmp_path / "state.safetensors")
    with pytest.raises(GvendiError, match="vendi_state version 1; wanted a file written by RowMean"):
        RowMean.load(tmp_path / "state.safetensors")
    (tmp_path / "text").write_text("mean")
    with pytest.raises(GvendiError, match="is not a safetensors file"):
        RowMean.load(tmp_path / "text")
    with pytest.raises(GvendiError, match="does not exist; wanted a file written by"):
        RowMean.load(tmp_path / "nowhere")


def test_means_and_states_of_other_specs_do_not_mix():
    rows, this, that = rows_of(9, 16), {"proxy": "this"}, {"proxy": "that"}
    with pytest.raises(GvendiError, match=r"(?s)another spec.*the mean has this, the rows have that"):
        centered(rows, mean_of(rows, spec=this), that)
    for join in (lambda a, b: a.merge(b), lambda a, b: equal_mean([a, b])):
        with pytest.raises(GvendiError, match=r"(?s)different specs.*this: .*'this'.*other: .*'that'"):
            join(mean_of(rows, spec=this), mean_of(rows, spec=that))
        with pytest.raises(GvendiError, match="of dim 16 and 9"):
            join(mean_of(rows), mean_of(rows[:, :9]))
    # A centred state tells its mean, and joins neither plain rows nor rows centred by another.
    by_one, by_other = (centered(rows, mean_of(part, spec=this), this).state for part in (rows, rows[:5]))
    assert by_one.spec == {"proxy": "this", "centred": mean_of(rows).mark}
    for other in (by_other, VendiState(16, this).update(rows)):
        with pytest.raises(GvendiError, match="different specs"):
            VendiState(16).merge(by_one).merge(other)
    with pytest.raises(GvendiError, match="centred already"):
        centered(rows, mean_of(rows), by_one.spec)


def test_what_is_refused():
    rows, mean = rows_of(9, 16), mean_of(rows_of(9, 16))
    with pytest.raises(GvendiError, match="dim is 0"):
        RowMean(0)
    with pytest.raises(GvendiError, match=r"the mean holds no rows \(n = 0\)"):
        centered(rows, RowMean(16))
    with pytest.raises(GvendiError, match=r"rows has shape \(9, 8\); wanted \[N, 16\]"):
        centered(rows[:, :8], mean)
    with pytest.raises(GvendiError, match="means is empty"):
        equal_mean([])
    before, bad = mean.vector(), torch.cat([rows, torch.zeros(1, 16)])
    with pytest.raises(GvendiError, match="row 9 of rows has norm 0"):
        mean.update(bad)
    assert torch.equal(mean.vector(), before)
    with pytest.raises(GvendiError, match="row 12 of rows has norm nan"):
        centered([rows, rows[:3].numpy(), rows * math.nan], mean)
    with pytest.raises(GvendiError, match="the mean is of 9 rows of width 16, the state of 8"):
        entropy_without_mean(VendiState(16).update(rows[:8]), mean)
    with pytest.raises(GvendiError, match="not that of the state's rows"):
        entropy_without_mean(VendiState(16).update(rows), mean_of(torch.eye(16)[:1].repeat(9, 1)))


def test_rows_near_the_mean_count_from_the_limit_on():
    """A row at 0.9 and one at 1.1 times EQUAL from the mean; the second keeps its direction to a percent."""
    mean = mean_of(torch.eye(64, dtype=torch.float64)[:1])
    near = torch.zeros(2, 64, dtype=torch.float64)
    near[:, 0] = 1
    near[:, 1] = torch.tensor([0.9, 1.1]) * EQUAL
    found = centered(near, mean)
    assert (found.n, found.left_out) == (1, 1)
    (kept,) = centered_blocks(near.float(), mean)
    assert abs(float(kept[0, 1])) > 0.99
