"""The sketch matrix as data: which coordinate of which parameter goes to which bin, with which sign.

A table is a CountSketch map of one axis of one parameter, (S x)[bucket[j]] += sign[j] * x[j]. It depends on
(seed, key, width, dim) alone, is made once on the host, and is handed to every backend, so that all of them
use one matrix by construction.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import numpy as np

from gvendi_fast.base.draws import order, stream
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.signs import SIGN_VERSION

# One AVX-512 register of floats, one 32-byte sector of bf16: what a wide block moves in one piece.
RUN = 16
KINDS = ("hadamard", "rademacher")
MIN_DIM, MAX_DIM = 64, 8192
# Changes whenever the tables of a given (seed, key, width, dim) change; stored with every sketch.
TABLE_VERSION = 1


@dataclass(frozen=True)
class SketchSpec:
    """What the sketch is: dimension, kind and seed. Sketches mix only if their specs are equal.

    dim: number of sketch coordinates K; G-Vendi cannot exceed it. A power of two from 64 to 8192, or for
        "rademacher" any multiple of 64 in that range.
    kind: "hadamard", the Hadamard TensorSketch; or "rademacher", a dense matrix of random signs (`signs.py`),
        which costs K additions per parameter and sample and serves to verify the former.
    seed: any integer; the same seed gives the same matrix on every device and version.
    Raises GvendiError for a value outside these.
    """

    dim: int = 1024
    kind: str = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GvendiError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        is_dense = self.kind == "rademacher"
        in_range = type(self.dim) is int and MIN_DIM <= self.dim <= MAX_DIM
        if not in_range or (self.dim % MIN_DIM if is_dense else self.dim & (self.dim - 1)):
            wanted = f"a multiple of {MIN_DIM}" if is_dense else "a power of two"
            raise GvendiError(
                f"dim must be {wanted} from {MIN_DIM} to {MAX_DIM}, got {self.dim!r}; 1024 is the default"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise GvendiError(f"seed must be an integer, got {self.seed!r}")

    def as_dict(self) -> dict:
        """The spec as stored beside sketches, with the version of the tables or of the signs."""
        version = {"signs": SIGN_VERSION} if self.kind == "rademacher" else {"tables": TABLE_VERSION}
        return {**asdict(self), **version}


@dataclass(frozen=True, eq=False)
class Table:
    """CountSketch map of one axis: bucket int16 [width] in 0..dim-1 and sign int8 [width] of +1 and -1."""

    dim: int
    bucket: np.ndarray
    sign: np.ndarray

    @property
    def width(self) -> int:
        """Length of the axis."""
        return len(self.bucket)


@dataclass(frozen=True, eq=False)
class ExpertTables:
    """A `Table` of one axis for each of E stacked matrices: bucket int16 [E, width] and sign int8 [E, width].

    Or some coordinates of each, of a product that uses a part of a parameter; kernels take any, and are fastest where
    `width` begins with a block of the whole table and ends with one or with the table.
    """

    dim: int
    bucket: np.ndarray
    sign: np.ndarray

    @property
    def experts(self) -> int:
        """Number of experts E."""
        return self.bucket.shape[0]

    @property
    def width(self) -> int:
        """Length of the axis."""
        return self.bucket.shape[1]

    def table(self, expert: int) -> Table:
        """The map of one expert."""
        return Table(self.dim, self.bucket[expert], self.sign[expert])


def parent_path(parameter: str) -> str:
    """Path of the module that holds the module of a parameter: "a.b.q_proj.weight" -> "a.b"."""
    return ".".join(parameter.split(".")[:-2])


def row_table(spec: SketchSpec, parameter: str, width: int) -> Table:
    """Table of a parameter's output axis (or only axis); its key is the parameter's name."""
    return make_table(spec.seed, parameter, width, spec.dim)


def column_table(spec: SketchSpec, parameter: str, width: int) -> Table:
    """Table of a parameter's input axis; shared by all parameters of one parent module and width.

    q/k/v, and gate/up, read one input: with one table its sketch is computed once.
    """
    return make_table(spec.seed, f"{parent_path(parameter)}/", width, spec.dim)


def expert_name(parameter: str, expert: int) -> str:
    """Expert e of a stacked parameter [E, ...] is a parameter of its own: "mlp.experts.down_proj[3]"."""
    return f"{parameter}[{expert}]"


def expert_row_tables(spec: SketchSpec, parameter: str, experts: int, width: int) -> ExpertTables:
    """Tables of the output axis (or only axis) of a stacked parameter; expert e has `row_table` of its own name."""
    return _stack(spec.seed, parameter, experts, width, spec.dim)


def expert_column_tables(spec: SketchSpec, parameter: str, experts: int, width: int) -> ExpertTables:
    """Tables of the input axis of a stacked parameter; shared by all stacked parameters of one parent module and width.

    The key of expert e ends in [e], so that two experts have different ones: the sum over them mixes no coordinates.
    """
    return _stack(spec.seed, f"{parent_path(parameter)}/", experts, width, spec.dim)


# All layers of a large model stay: 128 experts of 48 layers take 120 MB.
@functools.lru_cache(maxsize=4096)
def _stack(seed: int, key: str, experts: int, width: int, dim: int) -> ExpertTables:
    if experts < 1:
        raise GvendiError(f"experts must be at least 1, got {experts} for key {key!r}")
    # Not by way of make_table, whose cache they would fill.
    tables = [_draw_table(seed, expert_name(key, expert), width, dim) for expert in range(experts)]
    bucket, sign = (np.stack([getattr(table, side) for table in tables]) for side in ("bucket", "sign"))
    bucket.flags.writeable = sign.flags.writeable = False
    return ExpertTables(dim, bucket, sign)


@functools.lru_cache(maxsize=4096)
def make_table(seed: int, key: str, width: int, dim: int) -> Table:
    """The table of (seed, key, width, dim); mathematics in docs/sketch.md.

    Blocks of `dim` coordinates are permuted, so that coordinates of one block never collide. A block with at
    least dim/4 coordinates is permuted on two levels (runs of 16, then lanes within each run), which
    vectorises; a narrower one gets a plain permutation.
    """
    return _draw_table(seed, key, width, dim)


def _draw_table(seed: int, key: str, width: int, dim: int) -> Table:
    if width < 1:
        raise GvendiError(f"width must be at least 1, got {width} for key {key!r}")
    draws = stream(seed, key, width, dim)
    bucket = np.empty(width, dtype=np.int16)
    for start in range(0, width, dim):
        count = min(dim, width - start)
        bucket[start : start + count] = _permuted_block(draws, count, dim)
    words = np.asarray(draws.random_raw(-(-width // 64)), dtype="<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:width]
    sign = (1 - 2 * bits.astype(np.int8)).astype(np.int8)
    bucket.flags.writeable = sign.flags.writeable = False
    return Table(dim, bucket, sign)


def is_two_level(count: int, dim: int) -> bool:
    """Whether a block of `count` coordinates moves in runs of 16."""
    return 4 * count >= dim


def _permuted_block(draws: np.random.Philox, count: int, dim: int) -> np.ndarray:
    if not is_two_level(count, dim):
        return order(draws, dim)[:count].astype(np.int16)
    runs = -(-count // RUN)
    places = order(draws, dim // RUN)[:runs]
    lanes = np.argsort(draws.random_raw(runs * RUN).reshape(runs, RUN), axis=1, kind="stable")
    return (places[:, None] * RUN + lanes).reshape(-1)[:count].astype(np.int16)
