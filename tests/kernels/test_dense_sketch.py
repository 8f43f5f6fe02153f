"""The dense mode: its signs as data, and every backend's sketch against the fp64 definition."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from places import GOLDEN
from plain import dense32
from tolerance import FLOOR, UNIT, check, relative_error

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import cpu, use_backend
from gvendi_fast.kernels.signs import philox4x32_10, sign_key, signs
from gvendi_fast.kernels.sketch_matrix import SketchSpec, make_table
from gvendi_fast.sketching.gradients import head_chunks

RECORD = GOLDEN / "signs.json"
CASES = [
    (0, "model.layers.0.self_attn.q_proj.weight", 0, 300, 64),
    (0, "lm_head.weight", 1000, 1001, 8192),
    (7, "lm_head.weight", 136134655, 136134657, 192),
    # Across 2^32 blocks of coordinates.
    (-3, "a", 2**39 - 130, 2**39 + 130, 128),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
compiled = pytest.mark.skipif(bool(cpu.why_not("dense_sketch")), reason=f"compiled kernels: {cpu.status()}")
# Rows, input width, output width, K: rows of one block, many rows in a block, blocks across rows, strips.
SHAPES = [
    (0, 16, 16, 64),
    (1, 1, 16, 64),
    (7, 16, 1, 64),
    (7, 1, 300, 128),
    (30, 50, 63, 192),
    (130, 127, 20, 64),
    (65, 128, 65, 128),
    (300, 129, 17, 64),
    (20, 256, 65, 64),
    (20, 260, 33, 1024),
    (9, 1024, 18, 64),
    (9, 1025, 17, 64),
    (9, 2100, 5, 192),
    (5, 33, 200, 8192),
]


def describe(seed: int, parameter: str, begin: int, end: int, dim: int) -> dict:
    key = sign_key(seed, parameter)
    pi = signs(key, begin, end, dim)
    return {
        "seed": seed,
        "parameter": parameter,
        "begin": begin,
        "end": end,
        "dim": dim,
        "key": list(key),
        "first": pi[0, :16].tolist(),
        "sha256": hashlib.sha256(pi.tobytes()).hexdigest(),
    }


def write_golden() -> None:
    """Run by hand, with a new SIGN_VERSION, when the signs are meant to change."""
    RECORD.write_text(json.dumps([describe(*case) for case in CASES], indent=1) + "\n")


def draw(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    # NaN beside the rows, so that a read past a row shows.
    x = torch.full((rows, width + 9), math.nan)
    x[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)[:, :width]


def spans(rows: int) -> torch.Tensor:
    """Five samples: two of uneven length, an empty one, one that leaves the last row out, and all rows."""
    cut = [0, rows // 3, rows // 3, max(rows - 1, rows // 3)]
    return torch.tensor([[0, cut[1]], [cut[1], cut[2]], [cut[1], cut[2]], [cut[2], cut[3]], [0, rows]])


# Random123's known answers: counter, key, output.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    numbers = [[int(word, 16) for word in text.split()] for text in (counter, key, words)]
    assert philox4x32_10(np.array(numbers[0], dtype=np.uint64), tuple(numbers[1])).tolist() == numbers[2]


def test_signs_are_the_golden_ones():
    assert [describe(*case) for case in CASES] == json.loads(RECORD.read_text())


def test_a_sign_depends_on_its_key_coordinate_and_column_alone():
    key = sign_key(0, "k")
    pi = signs(key, 0, 700, 256)
    assert pi.shape == (700, 256)
    assert np.array_equal(signs(key, 129, 513, 64), pi[129:513, :64])
    assert signs(key, 5, 5, 64).shape == (0, 64)
    for other in (sign_key(1, "k"), sign_key(0, "l"), (key[1], key[0])):
        assert 0.4 < (signs(other, 0, 700, 256) == pi).mean() < 0.6


def test_signs_are_balanced_and_uncorrelated():
    pi = signs(sign_key(0, "k"), 0, 4096, 256).astype(np.float64)
    assert set(np.unique(pi)) == {-1.0, 1.0}
    # Five standard deviations of the largest of so many fair coins' means.
    assert abs(pi.mean(0)).max() < 5 / math.sqrt(4096)
    assert abs(pi.mean(1)).max() < 5 / math.sqrt(256)
    gram = pi.T @ pi / 4096 - np.eye(256)
    assert abs(gram).max() < 6 / math.sqrt(4096)


def test_projection_worked_by_hand():
    key = sign_key(0, "w")
    pi = signs(key, 0, 6, 64).astype(np.float64)
    a, e = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0, 1.0], [1.0, -1.0, 0.0]])
    gradient = np.array([3, 7, 0, -1, 1, 2])
    got = reference.dense_sketch(a, e, torch.tensor([[0, 2]]), key, 64)
    assert np.allclose(got[0], gradient @ pi / 8, atol=1e-15)
    ids = torch.tensor([1, 1])
    embedding = np.zeros((2, 3))
    embedding[1] = [4, -1, 1]
    got = reference.dense_sketch(ids, e, torch.tensor([[0, 2]]), key, 64)
    assert np.allclose(got[0], embedding.reshape(-1) @ pi / 8, atol=1e-15)


def test_inner_products_are_kept_in_expectation():
    g = torch.randn(2, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = g / g.norm(dim=1, keepdim=True)
    z = torch.stack([reference.project(g, sign_key(seed, "w"), 64) for seed in range(300)])
    products = (z[:, 0] * z[:, 1]).sum(1)
    variance = (1 + float(g[0] @ g[1]) ** 2) / 64
    assert abs(float(products.mean() - g[0] @ g[1])) < 4 * math.sqrt(variance / 300)
    # K Var(|z|^2) is 2 for a matrix of independent signs, less a share that vanishes with the length of g.
    assert 1.5 < 64 * float(z[:, 0].square().sum(1).var()) < 2.5


@compiled
@DTYPES
@pytest.mark.parametrize(("rows", "width_in", "width_out", "dim"), SHAPES)
def test_dense_sketch(rows, width_in, width_out, dim, dtype):
    a, e, key = draw(rows, width_in, dtype, 1), draw(rows, width_out, dtype, 2), sign_key(0, "w")
    segments = spans(rows)
    want = reference.dense_sketch(a, e, segments, key, dim)
    before = torch.ones(len(segments), dim)
    with use_backend("cpu"):
        got = ops.dense_sketch(a, e, segments, key, before.clone())
    check(got, dense32(a, e, segments, key, dim) + before, want + 1)


@compiled
@DTYPES
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "dim"),
    [(0, 5, 16, 64), (9, 3, 1, 64), (100, 40, 50, 192), (70, 200, 128, 64), (30, 20, 1030, 128)],
)
def test_dense_sketch_of_an_embedding(rows, vocabulary, width, dim, dtype):
    e, key, segments = draw(rows, width, dtype, 3), sign_key(0, "embedding"), spans(rows)
    ids = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(4))
    want = reference.dense_sketch(ids, e, segments, key, dim)
    with use_backend("cpu"):
        got = ops.dense_sketch(ids, e, segments, key, torch.zeros(len(segments), dim))
    check(got, dense32(ids, e, segments, key, dim), want)


@compiled
def test_an_embedding_is_the_same_parameter_as_its_one_hot_matrix():
    ids, e, key = torch.arange(40) % 17, draw(40, 100, torch.float32, 5), sign_key(0, "tied")
    segments, onehot = torch.tensor([[0, 40]]), torch.nn.functional.one_hot(torch.arange(40) % 17, 17).float()
    got = ops.dense_sketch(ids, e, segments, key, torch.zeros(1, 64))
    want = ops.dense_sketch(e, onehot, segments, key, torch.zeros(1, 64))
    assert relative_error(got, want) <= FLOOR[torch.float32]


@pytest.fixture
def _isa():
    before = cpu.current_isa()
    yield
    cpu.set_isa(before)


@compiled
@pytest.mark.usefixtures("_isa")
def test_signs_of_the_kernels_are_the_definition_bit_for_bit():
    width, dim, key = 300, 192, sign_key(0, "w")
    places = torch.tensor([0, 1, 31, 32, 127, 128, 299, 300, 5000, 9 * 300 + 7, 20999])
    e, a = torch.zeros(len(places), 70), torch.zeros(len(places), width)
    e[torch.arange(len(places)), places // width] = 1
    a[torch.arange(len(places)), places % width] = 1
    each = torch.stack([torch.arange(len(places)), torch.arange(1, len(places) + 1)], 1)
    want = np.concatenate([signs(key, int(j), int(j) + 1, dim) for j in places])
    for isa in cpu.available_isas():
        cpu.set_isa(isa)
        got = ops.dense_sketch(a, e, each, key, torch.zeros(len(places), dim))
        assert np.array_equal(np.sign(got.numpy()), want), isa
        assert len(got.abs().unique()) == 1
        # A coordinate whose block needs more than 32 bits.
        far = ops.dense_sketch(
            torch.tensor([2**33]), torch.eye(1, 128), torch.tensor([[0, 1]]), key, torch.zeros(1, dim)
        )
        assert np.array_equal(np.sign(far.numpy()), signs(key, 2**40, 2**40 + 1, dim)), isa


def results(order=slice(None), dtype=torch.bfloat16):
    """Both kernels on one batch of five samples; `order` picks samples."""
    segments = torch.tensor([[0, 130], [130, 131], [131, 131], [131, 250], [250, 300]])[order]
    a, e, key = draw(300, 90, dtype, 6), draw(300, 700, dtype, 7), sign_key(0, "w")
    yield ops.dense_sketch(a, e, segments, key, torch.zeros(len(segments), 128))
    yield ops.dense_sketch(torch.arange(300) % 45, e, segments, key, torch.zeros(len(segments), 128))


@compiled
@DTYPES
@pytest.mark.usefixtures("_isa")
def test_bits_do_not_depend_on_threads_or_instruction_set(dtype):
    threads = torch.get_num_threads()
    wanted = list(results(dtype=dtype))
    try:
        for isa in cpu.available_isas():
            cpu.set_isa(isa)
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                same = [torch.equal(x, y) for x, y in zip(wanted, results(dtype=dtype), strict=True)]
                assert all(same), (isa, count, same)
    finally:
        torch.set_num_threads(threads)


@compiled
def test_a_sample_does_not_depend_on_its_batch():
    for together, alone in zip(results(), results(slice(3, 4)), strict=True):
        assert torch.equal(together[3:4], alone)
    # More samples than one call of the kernel takes.
    many = torch.tensor([[131, 250], *([[0, 2]] * 40), [131, 250]])
    a, e, key = draw(300, 90, torch.float32, 6), draw(300, 20, torch.float32, 7), sign_key(0, "w")
    for left in (a, torch.arange(300) % 45):
        got = ops.dense_sketch(left, e, many, key, torch.zeros(len(many), 64))
        assert torch.equal(got[0], got[-1])
        assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_softmax_without_a_table_gives_the_same_gradient(backend, softcap):
    if backend == "cpu" and cpu.why_not("softmax_fold"):
        pytest.skip(cpu.status())
    logits, labels = draw(9, 77, torch.float32, 8) * 3, torch.arange(9)
    with use_backend(backend):
        with_table, without = logits.clone(), logits.clone()
        loss, _ = ops.softmax_fold(with_table, labels, make_table(0, "v", 77, 64), softcap, 0.7)
        same_loss, nothing = ops.softmax_fold(without, labels, None, softcap, 0.7)
    assert nothing is None
    assert torch.equal(loss, same_loss)
    assert torch.equal(with_table, without)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dense_head_in_chunks_that_cut_samples(softcap, monkeypatch):
    monkeypatch.setattr(head_chunks, "HEAD_CHUNK_MIN_ROWS", 7)
    monkeypatch.setattr(head_chunks, "DENSE_HEAD_CHUNK_BYTES", 0)
    hidden, weight = draw(40, 32, torch.float32, 9), draw(50, 32, torch.float32, 10)
    labels, segments = torch.arange(40), torch.tensor([[0, 5], [5, 5], [5, 30], [30, 40]])
    key = sign_key(0, "lm_head.weight")
    loss, e, _ = reference.softmax_fold(hidden.double() @ weight.double().T, labels, None, softcap, 0.7)
    want = reference.dense_sketch(hidden, e, segments, key, 192)
    out = torch.zeros(4, 192)
    got_loss, got_gradient = head_chunks.dense_head_sketch(
        hidden, weight, labels, segments, key, out, softcap, 0.7
    )
    # Two or three products and sums of a few dozen float32 numbers.
    for got, right in ((got_loss, loss), (got_gradient, e @ weight.double()), (out, want)):
        assert relative_error(got, right) <= 32 * UNIT[torch.float32]


def test_spec_of_the_dense_mode():
    spec = SketchSpec(dim=192, kind="rademacher")
    assert spec.as_dict() == {"dim": 192, "kind": "rademacher", "seed": 0, "signs": 1}
    for dim in (0, 100, 8256, 64.0, True):
        with pytest.raises(GvendiError, match="dim must be a multiple of 64 from 64 to 8192"):
            SketchSpec(dim=dim, kind="rademacher")
    with pytest.raises(GvendiError, match="dim must be a power of two from 64 to 8192, got 192"):
        SketchSpec(dim=192)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": torch.zeros(4, 3)}, "a has 4 rows, e has 5"),
        ({"a": torch.tensor([0, 1, 2, 3, -1])}, "a must lie in 0.."),
        ({"out": torch.zeros(1, 100)}, "out must have a multiple of 64 columns, got 100"),
        ({"out": torch.zeros(2, 64)}, "out has 2 rows, segments has 1; wanted one of each per sample"),
        ({"key": (1, 1 << 32)}, "key must be two integers below 2^32"),
        ({"segments": torch.tensor([[0, 6]])}, "segments must satisfy"),
    ],
)
def test_refuses_by_name(changed, message):
    arguments = {
        "a": torch.zeros(5, 3),
        "e": torch.zeros(5, 2),
        "segments": torch.tensor([[0, 5]]),
        "key": (1, 2),
        "out": torch.zeros(1, 64),
    }
    with pytest.raises(GvendiError) as caught:
        ops.dense_sketch(**{**arguments, **changed})
    assert message in str(caught.value)
