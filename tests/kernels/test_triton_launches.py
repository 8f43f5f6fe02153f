"""What is compiled ahead is what is launched: over a run of the verbs Triton's launcher asks for the listed builds.

The launcher runs in a process of its own, with a driver that names sm_90 and has no device: it sees the types, the
alignment and the values of the arguments as it would on a GPU, and is stopped where it would compile.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Not compared: the dense mode's list has one dtype and aligned tensors for most blocks of columns, for each of its
# builds takes seconds to compile.
ELSEWHERE = ("dense_linear_kernel", "dense_token_kernel")


def rows(width: int, dtype: torch.dtype, offset: int) -> torch.Tensor:
    """33 rows that begin at 16 bytes and are a multiple of them long, or neither."""
    return torch.zeros(33, width + 7 * (offset > 0), dtype=dtype)[:, offset : offset + width]


def sketches() -> None:
    """Every kind of call that `_listed` names, with aligned and unaligned rows, below, at and above K."""
    from gvendi_fast.kernels import ops
    from gvendi_fast.kernels.backends.triton.hadamard import TILES
    from gvendi_fast.kernels.sketch_matrix import SketchSpec, expert_row_tables, make_table

    segments = torch.tensor([[0, 20], [20, 33], [33, 33]])
    ids = torch.zeros(33, dtype=torch.int64)
    kinds = [(dim, torch.bfloat16) for dim in TILES] + [(1024, torch.float16), (1024, torch.float32)]
    for (dim, dtype), offset, width in itertools.product(kinds, (0, 3), (50, 1024, 1100)):
        a, table, out = rows(width, dtype, offset), make_table(0, "a", width, dim), torch.zeros(3, dim)
        done = ops.fold_hadamard(a, table)
        ops.token_sketch(ids, a, segments, table, table, out)
        ops.vector_sketch(None, a, segments, table, out)
        experts = expert_row_tables(SketchSpec(dim), "e", 2, width)
        ops.expert_sketch(a, a, ids, ids, experts, experts, out)
        ops.expert_sketch(None, a, ids, ids, None, experts, out)
        ops.linear_sketch(a, table, [(a, table)], segments, out)
        if dim != 1024:
            continue
        ops.vector_sketch(a, a, segments, table, out, "rms", 1e-6)
        ops.vector_sketch(a, a, segments, table, out, "layer", 1e-6)
        ops.linear_sketch(a, table, [(done, None)], segments, out)
        for parts in range(1, 6):
            ops.linear_sketch(a, table, [(a, table)] * parts, segments, out)
            ops.linear_sketch(done, None, [(a, table)] * parts, segments, out)


def heads() -> None:
    """Logits of a common vocabulary, in rows that begin at 16 bytes or do not, with and without a table and a cap."""
    from triton_builds import DEFAULT_DIM, VOCABULARY

    from gvendi_fast.kernels import ops
    from gvendi_fast.kernels.sketch_matrix import make_table

    labels = torch.zeros(3, dtype=torch.int64)
    kinds = [(torch.bfloat16, dim, cap) for dim in (None, 64, DEFAULT_DIM) for cap in (None, 30.0)]
    for (dtype, dim, cap), spare in itertools.product([*kinds, (torch.float32, DEFAULT_DIM, None)], (0, 7)):
        logits = torch.zeros(3, VOCABULARY + spare, dtype=dtype)[:, :VOCABULARY]
        table = dim and make_table(0, "vocabulary", VOCABULARY, dim)
        ops.softmax_fold(logits, labels, table, cap)


def scores() -> None:
    """The verbs on finished sketches."""
    from gvendi_fast.kernels import ops
    from gvendi_fast.kernels.backends import backend
    from gvendi_fast.kernels.spectrum import Quadrature

    # Results of kernels that did not run have no eigenvalues, and may be no numbers where memory is as it was found.
    torch.linalg.eigvalsh = lambda x: x.diagonal(dim1=-2, dim2=-1)
    torch.Tensor.new_empty, torch.empty = torch.Tensor.new_zeros, torch.zeros
    for dim in (256, 1024):
        ops.covariance(torch.ones(33, dim, dtype=torch.bfloat16), torch.zeros(dim, dim, dtype=torch.float64))
    counts = torch.tensor([0, 16, 32, 64, 128, 256]).cumsum(0)
    ops.entropy(torch.ones(int(counts[-1]), 1024, dtype=torch.bfloat16), counts)
    ops.assign(torch.ones(33, 1024, dtype=torch.bfloat16), torch.ones(9, 1024) / 32)
    for dtype, columns, sign in (
        (torch.float32, 32, 1),
        (torch.float32, 32, -1),
        (torch.float32, 64, 1),
        (torch.float64, 32, 1),
    ):
        nodes = torch.ones(columns - 2, dtype=torch.float64)
        at = Quadrature(sign, nodes, nodes, torch.ones(1024, columns, dtype=torch.float64))
        out = torch.empty(4, 33, dtype=torch.float64)
        backend("triton").gain(torch.ones(33, 1024, dtype=dtype), at, out)


def compare() -> Iterator[tuple[str, object]]:
    """("unlisted", launches without a build) and ("unused", names of builds without a launch)."""
    from triton_ahead import launch_of, recorded
    from triton_builds import builds

    from gvendi_fast.kernels.backends import backend, use_backend

    # CPU tensors stand for a GPU's.
    backend("triton").why_not = lambda op, *tensors: None
    with use_backend("triton"):
        launches = recorded(sketches) | recorded(heads) | recorded(scores)
    listed = {launch_of(build): name for name, build in builds().items()}
    yield "launches", len(launches)
    yield "unlisted", sorted(launches - set(listed))
    yield (
        "unused",
        [
            name
            for launch, name in listed.items()
            if launch not in launches and not launch.kernel.endswith(ELSEWHERE)
        ],
    )


def cached(folder: str) -> Iterator[tuple[str, object]]:
    """Files in Triton's cache after a build ahead, and after the launch with real tensors that it is for."""
    import triton
    from triton_ahead import compile_builds, without_gpu

    from gvendi_fast.kernels.backends import backend
    from gvendi_fast.kernels.sketch_matrix import make_table

    compile_builds(["fold_hadamard-bf16-64"], 90, 1)
    count = lambda: len(list(Path(folder).rglob("*.cubin")))  # noqa: E731
    yield "ahead", count()
    compiled = []
    # Stops the launch once it has its kernel, which needs a device from there on.
    triton.knobs.runtime.jit_post_compile_hook = lambda **_: compiled.append(1)
    table = make_table(0, "x", 50, 64)
    with without_gpu(90):
        try:
            backend("triton").fold_hadamard(rows(50, torch.bfloat16, 3), table, torch.empty(33, 64))
        except AttributeError as error:
            yield "stopped", str(error)
    yield "launched", [count(), len(compiled)]


if __name__ == "__main__":
    found = compare() if sys.argv[1] == "compare" else cached(os.environ["TRITON_CACHE_DIR"])
    print(json.dumps(dict(found)))
    sys.exit()

pytest.importorskip("triton", reason="needs Triton's launcher: pip install triton")


def child(what: str, folder: Path) -> dict[str, object]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_listed_builds_are_the_launches(tmp_path):
    found = child("compare", tmp_path)
    assert found["launches"] > 50
    assert found["unlisted"] == []
    assert found["unused"] == []


@pytest.mark.soak
def test_a_launch_finds_what_was_compiled_ahead(tmp_path):
    found = child("cached", tmp_path)
    assert found["ahead"] == 1
    # The same file, after a launch that asked for it.
    assert found["launched"] == [1, 1]
