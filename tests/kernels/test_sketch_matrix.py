"""The tables: pinned by a golden file, permutations inside a block, independent of everything but their key."""

import hashlib
import json

import numpy as np
import pytest
from places import GOLDEN

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.sketch_matrix import (
    RUN,
    SketchSpec,
    column_table,
    expert_column_tables,
    expert_row_tables,
    is_two_level,
    make_table,
    parent_path,
    row_table,
)

RECORD = GOLDEN / "tables.json"
CASES = [
    (0, "model.layers.0.self_attn.q_proj.weight", 896, 1024),
    (0, "model.layers.0.self_attn/", 896, 1024),
    (0, "model.layers.0.self_attn.k_proj.bias", 128, 1024),
    (0, "model.embed_tokens.weight", 32000, 1024),
    (7, "lm_head.weight", 512, 64),
    (-3, "transformer.h.0.mlp.c_fc.weight", 4864, 8192),
    (0, "model.norm.weight", 255, 1024),
    (0, "model.norm.weight", 256, 1024),
    (0, "a", 1, 64),
]


def describe(seed: int, key: str, width: int, dim: int) -> dict:
    table = make_table(seed, key, width, dim)
    return {
        "seed": seed,
        "key": key,
        "width": width,
        "dim": dim,
        "bucket": table.bucket[:20].tolist(),
        "sign": table.sign[:20].tolist(),
        "sha256": hashlib.sha256(
            table.bucket.astype("<i2").tobytes() + table.sign.astype("i1").tobytes()
        ).hexdigest(),
    }


def test_tables_are_the_golden_ones():
    assert [describe(*case) for case in CASES] == json.loads(RECORD.read_text())


@pytest.mark.parametrize("width", [1, 15, 16, 255, 256, 300, 1024, 1025, 1279, 1280, 4864])
def test_no_collision_inside_a_block(width):
    table = make_table(0, "k", width, 1024)
    assert table.width == width
    assert set(np.unique(table.sign)) <= {-1, 1}
    for start in range(0, width, 1024):
        block = table.bucket[start : start + 1024]
        assert len(set(block.tolist())) == len(block)
        assert 0 <= block.min() <= block.max() < 1024


def test_wide_blocks_move_in_runs_of_16_and_narrow_ones_do_not():
    wide, narrow = make_table(0, "k", 256, 1024), make_table(0, "k", 255, 1024)
    assert is_two_level(256, 1024)
    assert not is_two_level(255, 1024)
    runs = wide.bucket.reshape(-1, RUN) // RUN
    assert (runs == runs[:, :1]).all()
    assert len(set(runs[:, 0].tolist())) == len(runs)
    assert (np.diff(narrow.bucket[:240].reshape(-1, RUN) // RUN, axis=1) != 0).any()


def test_tables_differ_by_seed_key_width_and_dim():
    base = make_table(0, "k", 512, 1024)
    for other in (make_table(1, "k", 512, 1024), make_table(0, "l", 512, 1024), make_table(0, "k", 512, 512)):
        assert not np.array_equal(base.bucket, other.bucket)
    assert not np.array_equal(base.bucket, make_table(0, "k", 513, 1024).bucket[:512])


def test_signs_are_balanced():
    sign = make_table(0, "k", 32000, 1024).sign.astype(np.int64)
    # Four standard deviations of a fair coin.
    assert abs(sign.sum()) < 4 * np.sqrt(len(sign))


def test_layers_with_one_parent_share_their_input_table():
    spec = SketchSpec()
    q, k = "m.0.attn.q_proj.weight", "m.0.attn.k_proj.weight"
    assert column_table(spec, q, 64) is column_table(spec, k, 64)
    assert column_table(spec, q, 64) is not column_table(spec, "m.1.attn.q_proj.weight", 64)
    assert row_table(spec, q, 64) is not row_table(spec, k, 64)
    assert parent_path("lm_head.weight") == ""


def test_an_expert_is_a_parameter_of_its_own():
    spec, name = SketchSpec(64, seed=3), "m.0.mlp.experts.gate_up_proj"
    rows, columns = expert_row_tables(spec, name, 5, 40), expert_column_tables(spec, name, 5, 70)
    assert (rows.experts, rows.width, columns.experts, columns.width) == (5, 40, 5, 70)
    for expert in range(5):
        for found, wanted in [
            (rows.table(expert), row_table(spec, f"{name}[{expert}]", 40)),
            (columns.table(expert), make_table(3, f"m.0.mlp/[{expert}]", 70, 64)),
        ]:
            assert np.array_equal(found.bucket, wanted.bucket)
            assert np.array_equal(found.sign, wanted.sign)
            assert found.dim == wanted.dim == 64
    assert expert_row_tables(spec, name, 5, 40) is rows
    # Stacked weights of one module that read inputs of one width share their tables, as q, k and v do.
    assert expert_column_tables(spec, "m.0.mlp.experts.up_proj", 5, 70) is columns
    with pytest.raises(ValueError, match="read-only"):
        rows.bucket[0, 0] = 1
    with pytest.raises(GvendiError, match="experts must be at least 1, got 0"):
        expert_row_tables(spec, name, 0, 40)


def test_tables_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        make_table(0, "k", 64, 64).bucket[0] = 1


@pytest.mark.parametrize("dim", [0, 32, 100, 1000, 16384, 1024.0, True])
def test_bad_dim_is_refused(dim):
    with pytest.raises(GvendiError, match="dim must be a power of two from 64 to 8192"):
        SketchSpec(dim=dim)


def test_bad_kind_and_seed_are_refused():
    with pytest.raises(GvendiError, match="kind must be one of hadamard, rademacher, got 'dense'"):
        SketchSpec(kind="dense")
    with pytest.raises(GvendiError, match="seed must be an integer"):
        SketchSpec(seed=1.5)


def write_golden() -> None:
    """Run by hand, with a new TABLE_VERSION, when the tables are meant to change."""
    RECORD.write_text(json.dumps([describe(*case) for case in CASES], indent=1) + "\n")
