"""Every Triton kernel with every tile size it ships, so that tests and instruction counts compile them without a GPU.

A file with kernels has a function here, which lists what its wrapper compiles for a kind of call.
test_triton_launches.py holds the list to the launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import triton

from gvendi_fast.kernels.backends.triton.hadamard import TILES, linear_tile, tile
from gvendi_fast.kernels.backends.triton.runtime import CHUNK_ROWS
from gvendi_fast.kernels.sketch_matrix import Table, make_table

DEFAULT_DIM = 1024
DTYPES = ("bf16", "fp16", "fp32")
# A common vocabulary; the fold takes it in parts, whose number is a constant of the kernel.
VOCABULARY = 151936
# A spectrum's table has as many columns where n is in the thousands, and up to twice as many beyond.
GAIN_COLUMNS = 32


@dataclass(frozen=True)
class Build:
    """One kernel with the types and constants of one call: what a launch compiles.

    types: {argument: Triton type such as "*bf16" or "i32"}; constants: {argument: value} of all other arguments,
    None for a tensor that is not given. warps: num_warps of the launch. name: for test ids. multiples: which of the
    integers that the kernel specialises on are multiples of 16; None for all of them.
    """

    name: str
    kernel: Any
    warps: int
    types: dict[str, str]
    constants: dict[str, Any]
    multiples: tuple[str, ...] | None = None


def _file(kernel: str) -> ModuleType:
    """The file of a kernel, whose name in its package is that of its wrapper."""
    return import_module(f"gvendi_fast.kernels.backends.triton.{kernel}")


def builds() -> dict[str, Build]:
    """{name: Build} of each kernel and tile size in bfloat16, and of other kinds of call at the default K."""
    found: dict[str, Build] = {}
    for build in _listed():
        # Tile sizes share some kernels.
        assert found.setdefault(build.name, build) == build, f"two builds are called {build.name}"
    return found


def _listed() -> Iterator[Build]:
    yield from reduce_chunks()
    yield from routing()
    for dtype in DTYPES:
        for norm in (None, "rms", "layer"):
            yield from vector_sketch(dtype, norm)
        yield from fold_hadamard(DEFAULT_DIM, dtype)
        yield from token_sketch(DEFAULT_DIM, dtype)
        yield from expert_sketch(DEFAULT_DIM, dtype)
        for parts in range(1, _file("linear_sketch").PARTS + 1):
            for a_done in (False, True):
                yield from linear_sketch(DEFAULT_DIM, dtype, parts, a_done)
        # The head's fold comes from its softmax.
        yield from linear_sketch(DEFAULT_DIM, dtype, parts=0, e_done=True)
    for K in TILES:
        yield from fold_hadamard(K, "bf16")
        yield from token_sketch(K, "bf16")
        yield from linear_sketch(K, "bf16")
        yield from expert_sketch(K, "bf16")
    for capped in (False, True):
        yield from softmax_fold("bf16", None, capped)
        for K in (64, DEFAULT_DIM):
            yield from softmax_fold("bf16", make_table(0, "vocabulary", VOCABULARY, K), capped)
    yield from softmax_fold("fp32", make_table(0, "vocabulary", VOCABULARY, DEFAULT_DIM), False)
    for K in (256, DEFAULT_DIM):
        yield from covariance("bf16", K)
    for sign in (1, -1):
        yield from gain("fp32", GAIN_COLUMNS, sign)
    yield from gain("fp32", 2 * GAIN_COLUMNS, 1)
    yield from gain("fp64", GAIN_COLUMNS, 1)
    for block in _file("dense_sketch").BLOCKS:
        yield from dense_sketch("bf16", block)
    for dtype in ("fp32", "fp16"):
        yield from dense_sketch(dtype, _file("dense_sketch").BLOCKS[-1])
    for size in _file("entropy").SIZES:
        yield from entropy(size)
    yield from assign()


def reduce_chunks() -> list[Build]:
    """What `reduce_chunks` compiles."""
    own = _file("reduce_chunks")
    types = {"partial": "*fp32", "first": "*i64", "out": "*fp32", "width": "i32", "scale": "fp32"}
    sizes = {"GROUP": own.GROUP, "BLOCK_W": own.BLOCK_W}
    return [
        Build(f"reduce_chunks-{name}", own.reduce_chunks_kernel, own.WARPS, types, {"ADD": add, **sizes})
        for name, add in (("set", False), ("add", True))
    ]


def fold_hadamard(K: int, dtype: str) -> list[Build]:
    """What `fold_hadamard` compiles for inputs of a dtype ("fp32", "bf16", "fp16"), and to add transforms of sums."""
    own = _file("fold_hadamard")
    shape = tile(K)
    types = {"x": f"*{dtype}", "stride": "i32", "table": "*i32", "blocks": "i32"}
    types |= {"out": "*fp32", "count": "i32", "scale": "fp32"}
    vectors = types | {"x": "*fp32"}
    sums = {name: kind for name, kind in vectors.items() if name != "table"}
    sizes = {"BLOCK_T": shape.rows, "K": K}
    kernel, warps = own.fold_hadamard_kernel, shape.warps
    return [
        Build(f"fold_hadamard-{dtype}-{K}", kernel, warps, types, {"ADD": False, **sizes}),
        Build(f"fold_hadamard-vectors-{K}", kernel, warps, vectors, {"ADD": True, **sizes}),
        Build(f"fold_hadamard-sums-{K}", kernel, warps, sums, {"table": None, "ADD": True, **sizes}),
    ]


def linear_sketch(
    K: int, dtype: str, parts: int = 1, a_done: bool = False, e_done: bool = False
) -> list[Build]:
    """What a launch compiles: `parts` parts, `a_done` for a as H S a, `e_done` for one more part that is S e."""
    own = _file("linear_sketch")
    sides = [("fp32", None) if a_done else (dtype, "*i32")] + [(dtype, "*i32")] * parts
    sides += [("fp32", None)] * e_done
    types, constants = {}, {}
    for position, label in enumerate(("_a", *range(own.PARTS))):
        kind, table = sides[position] if position < len(sides) else (None, None)
        types |= {f"stride{label}": "i32", f"blocks{label}": "i32"}
        pointers = {"a" if label == "_a" else f"e{label}": kind and f"*{kind}", f"table{label}": table}
        types |= {name: pointer for name, pointer in pointers.items() if pointer}
        constants |= {name: None for name, pointer in pointers.items() if not pointer}
    shape = linear_tile(K)
    types |= {"spans": "*i64", "partial": "*fp32"}
    constants |= {"BLOCK_T": shape.rows, "K": K}
    name = f"linear_sketch-{dtype}-{K}-parts{parts}{'-HSa' * a_done}{'-Se' * e_done}"
    return [Build(name, own.linear_sketch_kernel, shape.warps, types, constants)]


def expert_sketch(K: int, dtype: str) -> list[Build]:
    """What `expert_sketch` compiles for weights and for biases, beside the sum over chunks and the transform."""
    own = _file("expert_sketch")
    shape = linear_tile(K)
    types = {"stride_a": "i32", "blocks_a": "i32", "e": f"*{dtype}", "stride_e": "i32", "table_e": "*i32"}
    types |= {"blocks_e": "i32", "order": "*i64", "spans": "*i64", "partial": "*fp32", "experts": "i32"}
    sides = {
        "weights": (types | {"a": f"*{dtype}", "table_a": "*i32"}, {}),
        "biases": (types, {"a": None, "table_a": None}),
    }
    sizes = {"BLOCK_T": shape.rows, "K": K}
    return [
        Build(
            f"expert_sketch-{dtype}-{K}-{name}", own.expert_sketch_kernel, shape.warps, kinds, given | sizes
        )
        for name, (kinds, given) in sides.items()
    ]


def routing() -> list[Build]:
    """What puts the rows of stacked experts in order."""
    own = _file("routing")
    pair = {"expert_of": "*i64", "sample_of": "*i64", "pairs": "*i32", "rows": "i32"}
    pair |= {"experts": "i32", "samples": "i32"}
    begin = {"pairs": "*i32", "rows": "i32", "begin": "*i64", "chunks": "*i64", "count": "i32"}
    span = {
        "begin": "*i64",
        "first": "*i64",
        "pairs": "i32",
        "experts": "i32",
        "spans": "*i64",
        "count": "i32",
    }
    block, both = {"BLOCK": own.BLOCK}, {"BLOCK": own.BLOCK, "CHUNK_ROWS": CHUNK_ROWS}
    return [
        Build("route_pairs", own.pair_kernel, own.WARPS, pair, block),
        Build("route_begins", own.begin_kernel, own.WARPS, begin, both),
        Build("route_spans", own.span_kernel, own.WARPS, span, both),
    ]


def token_sketch(K: int, dtype: str) -> list[Build]:
    """What `token_sketch` compiles beside the sum over chunks and the transform."""
    own = _file("token_sketch")
    types = {"ids": "*i64", "id_table": "*i16", "vocabulary": "i32", "e": f"*{dtype}", "stride": "i32"}
    types |= {"table": "*i32", "blocks": "i32", "spans": "*i64", "partial": "*fp32"}
    return [Build(f"token_sketch-{dtype}-{K}", own.token_sketch_kernel, tile(K).warps, types, {"K": K})]


def vector_sketch(dtype: str, norm: str | None) -> list[Build]:
    """What `vector_sketch` compiles beside the sum over chunks and the transform."""
    own = _file("vector_sketch")
    types = {"stride_x": "i32", "e": f"*{dtype}", "stride_e": "i32", "spans": "*i64", "partial": "*fp32"}
    types |= {"width": "i32", "eps": "fp32"}
    constants = {"NORM": norm, "ROWS": CHUNK_ROWS, "BLOCK_D": own.BLOCK_D}
    (constants if norm is None else types)["x"] = None if norm is None else f"*{dtype}"
    name = f"vector_sketch-{dtype}-{norm or 'bias'}"
    return [Build(name, own.vector_sketch_kernel, own.WARPS, types, constants)]


def softmax_fold(dtype: str, table: Table | None, capped: bool) -> list[Build]:
    """What `softmax_fold` compiles for logits of a dtype ("fp32", "bf16", "fp16") and a vocabulary."""
    own = _file("softmax_fold")
    K, width, warps = own.tile_of(table)
    V = width if table is None else table.width
    name = f"{dtype}-{'plain' if table is None else f'{V}-{K}'}{'-capped' if capped else ''}"
    types = {"x": f"*{dtype}", "stride": "i32", "labels": "*i64", "V": "i32", "parts": "i32"}
    types |= {"bases": "*fp32", "sums": "*fp32", "label_logits": "*fp32", "ratio": "fp32", "c": "fp32"}
    fold_types = {**types, "loss": "*fp32", "full": "i32", "tiles": "i32", "blocks": "i32", "scale": "fp32"}
    fold = {"K": K, "PARTS": own._power_of_parts(V), "TILE": width}
    if table is None:
        fold |= {"table": None, "folded": None}
    else:
        fold_types |= {"table": "*i32", "folded": "*fp32"}
    sums, found = own._sums(4 if dtype == "fp32" else 2), []
    for unit, kind in ((own.ALIGNED, ""), (1, "-unaligned")):
        same = {"CAP": capped, "UNIT": unit}
        for stem, kernel, threads, kinds, constants in (
            ("softmax_sum", own.sum_kernel, own.SUM_THREADS, types, sums),
            ("softmax_fold", own.fold_kernel, warps * own.WARP, fold_types, fold),
        ):
            found.append(Build(f"{stem}-{name}{kind}", kernel, threads // own.WARP, kinds, same | constants))
    return found


def dense_sketch(dtype: str, block: int) -> list[Build]:
    """What `dense_sketch` compiles for inputs of a dtype ("fp32", "bf16", "fp16") and a block of columns."""
    own = _file("dense_sketch")
    key = {"key_low": "i32", "key_high": "i32"}
    sums = {"spans": "*i64", "partial": "*fp32", "K": "i32", "strips": "i32"}
    tile = {"BLOCK_B": own.BLOCK_B, "BLOCK_T": own.BLOCK_T, "BLOCK_K": block}
    rows = {"a": f"*{dtype}", "stride_a": "i32", "e": f"*{dtype}", "stride_e": "i32"}
    sizes = {"samples": "i32", "height": "i32", "width": "i32", "row_step": "i32"}
    found = []
    for unit, kind in ((1, ""), (own.ALIGNED, "-aligned")):
        types, constants = rows | sizes | sums | key, tile | {"BLOCK_O": own.BLOCK_O, "UNIT": unit}
        name = f"dense_linear-{dtype}-{block}{kind}"
        found.append(Build(name, own.dense_linear_kernel, own.WARPS, types, constants))
    if block in own.TOKEN_BLOCKS:
        types = {"ids": "*i64", "e": f"*{dtype}", "stride_e": "i32", "d": "i32"} | sums | key
        found.append(Build(f"dense_token-{dtype}-{block}", own.dense_token_kernel, own.WARPS, types, tile))
    return found


def covariance(dtype: str, K: int) -> list[Build]:
    """What `covariance` compiles for rows of a dtype ("fp32", "bf16", "fp16") and K columns."""
    own = _file("covariance")
    unit = {"x": f"*{dtype}", "stride": "i32", "z": "*fp32", "N": "i32", "K": "i32"}
    unit_tile = {"BLOCK_N": own.UNIT_ROWS, "BLOCK_K": own.UNIT_COLUMNS}
    sums = {"z": "*fp32", "out": "*fp64", "N": "i32", "K": "i32"}
    sum_tile = {"SUM_ROWS": own.SUM_ROWS, "BLOCK_N": own.BLOCK_N, "BLOCK_K": own.tile(K)}
    return [
        Build(f"unit_rows-{dtype}", own.unit_rows_kernel, own.UNIT_WARPS, unit, unit_tile),
        Build(f"covariance-{own.tile(K)}", own.covariance_kernel, own.WARPS, sums, sum_tile),
    ]


def entropy(M: int) -> list[Build]:
    """What `entropy` compiles for groups padded to M rows, beside the unit rows."""
    own = _file("entropy")
    gram = {"z": "*fp32", "spans": "*i64", "gram": "*fp32", "K": "i32"}
    gram_tile = {"M": M, "BLOCK_M": min(M, own.GRAM_ROWS), "BLOCK_K": own.GRAM_COLUMNS}
    found = [Build(f"gram-{M}", own.gram_kernel, own.GRAM_WARPS, gram, gram_tile)]
    if M in own.JACOBI:
        power, warps = own.JACOBI[M]
        types = {
            "gram": "*fp32",
            "spectra": "*fp32",
            "residuals": "*fp32",
            "SWEEPS": "i32",
            "tolerance": "fp32",
        }
        found.append(
            Build(f"jacobi-{M}", own.jacobi_kernel, warps, types, {"M": M, "T": power}, multiples=())
        )
    return found


def gain(dtype: str, columns: int, sign: int) -> list[Build]:
    """What `gain` compiles for coordinates of a dtype ("fp32", "fp64") and a table of so many columns."""
    own = _file("gain")
    types = {"c": f"*{dtype}", "table": "*fp64", "t": "*fp64", "weight": "*fp64", "out": "*fp64"}
    types |= {"stride": "i32", "N": "i32", "K": "i32", "J": "i32"}
    constants = {"SIGN": sign, "C": columns, "BLOCK_C": triton.next_power_of_2(columns)}
    constants |= {"BLOCK_N": own.BLOCK_N, "UNROLL": own.UNROLL}
    name = f"gain-{dtype}-{columns}-{'joins' if sign > 0 else 'leaves'}"
    return [Build(name, own.gain_kernel, own.WARPS, types, constants)]


def assign() -> list[Build]:
    """What `assign` compiles beside `unit_rows`; rows of every dtype arrive as unit float32 rows."""
    own = _file("assign")
    pointers = {"z": "*fp32", "centroids": "*fp32", "label": "*i64", "cosine": "*fp32"}
    pointers |= {"second": "*i64", "second_cosine": "*fp32"}
    sizes = {"N": "i32", "K": "i32", "C": "i32"}
    tile = {"BLOCK_N": own.BLOCK_N, "BLOCK_C": own.BLOCK_C, "BLOCK_K": own.BLOCK_K, "CHAIN_K": own.CHAIN_K}
    return [Build("assign", own.assign_kernel, own.WARPS, pointers | sizes, tile)]
