"""Sketches as float16 and int8: what is read is what was written up to the store's rounding, whatever their sizes."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from damage import flip

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.parts import DamagedPartError, read_part
from gvendi_fast.data.run_directory import Part, RunDirectory, recorded_store, sketch_spec
from gvendi_fast.data.stored_sketches import SCALE, STORES, coded, decoded

CODED = ("float16", "int8")
# Of a row's largest element: half a step, with the float32 rounding of scale and product.
FINEST = {"float32": 0.0, "float16": 2**-11, "int8": (1 + 1e-5) / 254}
LARGEST, LEAST = np.finfo(np.float32).max, np.float32(2**-149)


def spec(store: str, dim: int) -> dict:
    chosen = {} if store == "float32" else {"store": store}
    return {**chosen, "sketch": {"kind": "hadamard", "dim": dim, "seed": 0}}


def made(sketches: np.ndarray, groups: np.ndarray | None = None, unit: int = 0) -> Part:
    n = len(sketches)
    draw = np.random.default_rng(unit)
    return Part(
        unit,
        ids=[f"{unit}-{i}" for i in range(n)],
        groups=[""] * n,
        rows=np.arange(n),
        sketches=sketches,
        tokens=np.arange(n),
        length=np.arange(n),
        loss=draw.random(n),
        gradient_norm=draw.random(n).astype(np.float32),
        group_sketches=groups,
    )


def normal(n: int, width: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, width)) * scale).astype(np.float32)


def row(**elements: float) -> np.ndarray:
    z = np.zeros((1, 20), np.float32)
    for place, value in elements.items():
        z[0, int(place[1:])] = value
    return z


SIZES = {
    "plain": normal(130, 20),
    "tiny": normal(70, 20, 1e-30),
    "huge": normal(70, 20, 1e30),
    "norms far apart": normal(5, 20) * np.float32([[1e-30], [1e-3], [1], [1e3], [1e30]]),
    "one huge element": normal(3, 20) + row(_3=1e9),
    "all equal": np.full((2, 20), -0.3, np.float32),
    "the largest": row(_0=LARGEST, _1=-LARGEST, _2=LARGEST / 3),
    "the least": row(_0=LEAST, _1=-100 * LEAST),
    "below the least normal number": normal(9, 20, 1e-39),
    "zero": row(),
}


@pytest.mark.parametrize("store", CODED)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.filterwarnings("error")
def test_what_is_read_is_what_was_written_up_to_rounding(size, store):
    z = SIZES[size]
    numbers, scales = coded(z, store)
    found = decoded(numbers, scales)
    assert (numbers.dtype, scales.dtype, found.dtype) == (np.dtype(store), np.float32, np.float32)
    peak = np.abs(z.astype(np.float64)).max(axis=1, keepdims=True)
    assert (np.abs(found.astype(np.float64) - z) <= FINEST[store] * peak + LEAST / 2).all()
    # No row that had a direction has lost it.
    assert ((found != 0).any(axis=1) == (z != 0).any(axis=1)).all()


def test_float16_keeps_small_elements_beside_a_huge_one():
    z = row(_0=1e6, _1=1.7, _2=-3.3e-3)
    found = decoded(*coded(z, "float16"))
    np.testing.assert_allclose(found[0, 1:3], z[0, 1:3], rtol=2**-11, atol=0)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dim", [16, 64, 100])
def test_a_part_of_every_store(tmp_path, store, dim):
    run = RunDirectory.open(tmp_path, spec(store, dim))
    z, groups = normal(7, dim), normal(7, 3 * dim, seed=1)
    groups[:, :dim] *= 1e-6
    whole = made(z, groups)
    run.write_part(whole)
    assert run.verify(0) == 7
    (found,) = run.iterate([*"id group row sketch tokens loss gradient_norm group_sketches".split()])
    assert found.ids == whole.ids
    for name in ("loss", "gradient_norm", "tokens"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name).astype("f4"))
    for name, wanted in (("sketches", z), ("group_sketches", groups)):
        got = getattr(found, name)
        assert (got.dtype, got.shape) == (np.float32, wanted.shape)
        # Each group has a scale of its own.
        by_scale = wanted.reshape(-1, dim)
        peak = np.abs(by_scale).max(axis=1, keepdims=True)
        assert (np.abs(got.reshape(-1, dim) - by_scale) <= FINEST[store] * peak).all()
    # One alone, and the scales of the other are not read.
    (alone,) = run.iterate(["group_sketches"])
    np.testing.assert_array_equal(alone.group_sketches, found.group_sketches)
    assert alone.sketches is None
    table = pq.read_table(run.part_path(0))
    assert (("sketch" + SCALE) in table.column_names) == (store in CODED)
    if store in CODED:
        assert table.schema.field("sketch").type.byte_width == dim * np.dtype(store).itemsize


@pytest.mark.parametrize("store", STORES)
def test_the_order_of_rows_and_blocks_leaves_the_bytes_alone(tmp_path, store):
    contents = set()
    for name, order in (("one", np.arange(150)), ("other", np.random.default_rng(1).permutation(150))):
        run = RunDirectory.open(tmp_path / name, spec(store, 24))
        part = made(normal(150, 24))
        part.ids = [part.ids[i] for i in order]
        for column in ("rows", "sketches", "tokens", "length", "loss", "gradient_norm"):
            setattr(part, column, getattr(part, column)[order])
        run.write_part(part)
        contents.add(run.part_path(0).read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("store", CODED)
def test_a_part_without_accepted_rows(tmp_path, store):
    run = RunDirectory.open(tmp_path, spec(store, 24))
    run.write_part(made(np.empty((0, 24), np.float32), np.empty((0, 48), np.float32)))
    run.write_part(made(normal(2, 24), normal(2, 48), unit=1))
    sizes = [(p.sketches.shape, p.group_sketches.shape) for p in run.iterate(["sketch", "group_sketches"])]
    assert sizes == [((0, 24), (0, 48)), ((2, 24), (2, 48))]
    assert run.broken() == []


def test_flipped_bits_of_an_int8_part_are_noticed(tmp_path):
    run = RunDirectory.open(tmp_path, spec("int8", 4))
    run.write_part(made(normal(2, 4), normal(2, 8)))
    path = run.part_path(0)
    whole, same = path.read_bytes(), 0
    columns = ["id", "sketch", "group_sketches"]
    wanted, _ = read_part(path, 0, columns)
    places = range(0, len(whole), 7)
    for place in places:
        flip(path, place, place % 8)
        try:
            found, _ = read_part(path, 0, columns)
        except DamagedPartError:
            pass
        else:
            same += 1
            for name in ("ids", "sketches", "group_sketches"):
                np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
        flip(path, place, place % 8)
    # The magic word at the beginning, and the columns that were not read.
    assert 1 <= same < len(places) / 2


def test_a_store_that_this_version_does_not_know(tmp_path):
    run = RunDirectory.open(tmp_path, {**spec("int8", 4), "store": "int4"})
    with pytest.raises(GvendiError, match="store is 'int4'; wanted one of float32, float16, int8"):
        run.write_part(made(normal(2, 4)))


def test_sketches_of_groups_that_are_not_finite(tmp_path):
    run = RunDirectory.open(tmp_path, spec("int8", 4))
    groups = normal(2, 8)
    groups[1, 5] = np.nan
    with pytest.raises(GvendiError, match="the sketch of '0-1' is not finite"):
        run.write_part(made(normal(2, 4), groups))


def test_the_store_is_of_the_directory_and_not_of_the_sketches(tmp_path):
    assert recorded_store(tmp_path / "new") == "float32"
    RunDirectory.open(tmp_path / "run", spec("int8", 4))
    assert recorded_store(tmp_path / "run") == "int8"
    assert sketch_spec(spec("int8", 4)) == sketch_spec(spec("float32", 4))
    with pytest.raises(GvendiError, match='store: "int8" in the directory, "float16" now'):
        RunDirectory.open(tmp_path / "run", spec("float16", 4))
