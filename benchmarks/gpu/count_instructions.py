"""Count the machine instructions of every Triton kernel for sm_90, without a GPU, and say what they allow.

    python -m benchmarks.gpu.count_instructions --label before|after [--only REGEX] [--copy-rate 4.0] [--clock 1.7]

Counts go into benchmarks/results/instructions.json under the label and the version of Triton that runs this, and all
that is there into the tables of instructions.md. Other Tritons count with PYTHONPATH set to where they are installed.

Method. The disassembly is cut into blocks at its jumps; loops are found as in a compiler, by dominators (sass.py). A
loop's instructions are counted once a trip, and the trips of every loop follow from the shape and the tile (works
below); one that the assembler unrolled is known by its loads. Both sides of a branch count, so a count is an upper
bound; slow paths behind calls do not count.
  loop   thread instructions of one trip of the busiest innermost loop, over the elements that the trip covers
  whole  thread instructions of a program at the shape, prologue and epilogue included, over its elements
An element is a number that the kernel reads (of a tensor; not tables), or for products what the row says.

Floors, in picoseconds an element on a whole H200: its bytes at copy bandwidth, and its instructions at one warp
instruction a cycle of each of SCHEDULERS schedulers. The larger binds; the goal is that over GOAL. Clock and copy rate
are assumptions that the page names; nothing here was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import triton

from benchmarks.environment import ROOT, commit
from benchmarks.gpu import sass
from benchmarks.report.__main__ import table
from benchmarks.shapes import TIMED_DIM, TIMED_LENGTH, TIMED_WIDTHS
from gvendi_fast.kernels.backends.triton.runtime import CHUNK_ROWS

sys.path.append(str(ROOT / "tests"))

from triton_ahead import compile_build, tool
from triton_builds import Build, builds

RESULTS = ROOT / "benchmarks" / "results"
CAPABILITY, WARP = 90, 32
# 132 multiprocessors of 4.
SCHEDULERS = 528
LABELS = ("before", "after")
# A share of what bytes and instructions allow that a kernel is asked for: launches, tails and waiting take the rest.
GOAL = 0.8
VOCABULARY = 151936
DENSE_WORD, DENSE_STEPS = 32, 8


@dataclass(frozen=True)
class Trips:
    """Trips of a loop at a shape, elements that one trip covers in a program, and the loops inside."""

    count: int
    covers: float = 0
    inner: list[Trips] = field(default_factory=list)

    def nested(self) -> tuple[int, list]:
        """In the form that `sass.executed` takes."""
        return self.count, [loop.nested() for loop in self.inner]


@dataclass(frozen=True)
class Work:
    """What a program of a build has to do at a shape."""

    shape: str
    elements: float
    loops: list[Trips]
    bytes: float = 0
    unit: str = "number"


def linear_works(build: Build) -> list[Work]:
    """A chunk of CHUNK_ROWS rows at each of the timed widths; parts have equal widths."""
    T, K = build.constants["BLOCK_T"], build.constants["K"]
    found = []
    for width_in, width_out in TIMED_WIDTHS:
        sides, elements, size = [], 0, 0
        for side, width in (("_a", width_in), *((str(part), width_out) for part in range(4))):
            pointer = build.types.get("a" if side == "_a" else f"e{side}")
            if pointer is None:
                continue
            folds = f"table{side}" in build.types
            sides += [fold(T, K, width)] if folds else []
            elements += width if folds else K
            size += (width if folds else K) * SIZES[pointer]
        loops = [Trips(CHUNK_ROWS // T, inner=sides)]
        shape = f"({width_in}, {width_out})"
        found.append(Work(shape, CHUNK_ROWS * elements, loops, size / elements))
    return found


def fold(T: int, K: int, width: int) -> Trips:
    """The loop over a row's blocks of K coordinates."""
    return Trips(math.ceil(width / K), T * K)


def fold_hadamard_works(build: Build) -> list[Work]:
    T, K = build.constants["BLOCK_T"], build.constants["K"]
    if "table" not in build.types:
        return [Work(f"{K}", T * K, [], 8)]
    width = TIMED_WIDTHS[0][1]
    size = SIZES[build.types["x"]]
    return [Work(f"{width}", T * width, [fold(T, K, width)], (width * size + 4 * K) / width)]


def expert_works(build: Build) -> list[Work]:
    """A full chunk of one sample and one expert."""
    T, K = build.constants["BLOCK_T"], build.constants["K"]
    found = []
    for widths in TIMED_WIDTHS:
        sides = [w for side, w in zip(("a", "e"), widths, strict=True) if side in build.types]
        loops = [Trips(CHUNK_ROWS // T, inner=[fold(T, K, width) for width in reversed(sides)])]
        shape = f"({', '.join(map(str, sides))})"
        found.append(Work(shape, CHUNK_ROWS * sum(sides), loops, SIZES[build.types["e"]]))
    return found


def token_works(build: Build) -> list[Work]:
    T, K, width = 1, build.constants["K"], TIMED_WIDTHS[0][0]
    loops = [Trips(CHUNK_ROWS // T, inner=[fold(T, K, width)])]
    return [Work(f"{width}", CHUNK_ROWS * width, loops, SIZES[build.types["e"]])]


def vector_works(build: Build) -> list[Work]:
    """x and e are each read from memory once; later passes find them in the cache."""
    width, block, norm = TIMED_WIDTHS[0][0], build.constants["BLOCK_D"], build.constants["NORM"]
    trips, rows = math.ceil(width / block), build.constants["ROWS"]
    tensors = 1 if norm is None else 2
    passes = {None: 1, "rms": 2, "layer": 3}[norm]
    loops = [Trips(trips, rows * block) for _ in range(passes - 1)]
    loops.append(Trips(trips, tensors * rows * block))
    return [Work(f"{width}", tensors * rows * width, loops, SIZES[build.types["e"]])]


def reduce_works(build: Build) -> list[Work]:
    chunks, columns, group = TIMED_LENGTH // CHUNK_ROWS, build.constants["BLOCK_W"], build.constants["GROUP"]
    loops = [Trips(chunks // group, group * columns)]
    return [Work(f"{chunks} chunks", chunks * columns, loops, 4)]


def softmax_sum_works(build: Build) -> list[Work]:
    part = build.constants["PART_V"]
    # Two loads a thread and trip.
    block = 2 * build.constants["THREADS"] * build.constants["VECTOR"]
    return [Work(f"{part} logits", part, [Trips(part // block, block)], SIZES[build.types["x"]])]


def softmax_fold_works(build: Build) -> list[Work]:
    tile = build.constants["TILE"]
    # The last tile, which is masked, is behind the loop.
    loops = [Trips(VOCABULARY // tile, tile)]
    # Read and written.
    return [Work(f"{VOCABULARY} logits", VOCABULARY, loops, 2 * SIZES[build.types["x"]])]


def unit_rows_works(build: Build) -> list[Work]:
    rows, columns = build.constants["BLOCK_N"], build.constants["BLOCK_K"]
    loops = [Trips(TIMED_DIM // columns, rows * columns)] * 2
    return [Work(f"{TIMED_DIM}", rows * TIMED_DIM, loops, SIZES[build.types["x"]] + 4)]


def covariance_works(build: Build) -> list[Work]:
    strip, rows, step, columns = (
        16384,
        *(build.constants[name] for name in ("SUM_ROWS", "BLOCK_N", "BLOCK_K")),
    )
    covers = step * columns**2
    loops = [Trips(strip // rows, inner=[Trips(rows // step, covers)])]
    return [Work(f"{strip} rows", strip * columns**2, loops, unit="multiply-add")]


def assign_works(build: Build) -> list[Work]:
    n, c, k, chain = (build.constants[name] for name in ("BLOCK_N", "BLOCK_C", "BLOCK_K", "CHAIN_K"))
    chains = Trips(TIMED_DIM // chain, inner=[Trips(chain // k, n * c * k)])
    loops = [Trips(1024 // c, inner=[chains])]
    return [Work(f"1024 x {TIMED_DIM}", n * 1024 * TIMED_DIM, loops, unit="multiply-add")]


def gram_works(build: Build) -> list[Work]:
    m, k = build.constants["BLOCK_M"], build.constants["BLOCK_K"]
    loops = [Trips(TIMED_DIM // k, m * m * k)]
    return [Work(f"{TIMED_DIM}", m * m * TIMED_DIM, loops, unit="multiply-add")]


def gain_works(build: Build) -> list[Work]:
    n, columns, step = (build.constants[name] for name in ("BLOCK_N", "BLOCK_C", "UNROLL"))
    loops = [Trips(TIMED_DIM // step, n * columns * step)]
    return [Work(f"{TIMED_DIM}", n * columns * TIMED_DIM, loops, unit="multiply-add")]


def dense_linear_works(build: Build) -> list[Work]:
    """A tile of coordinates by BLOCK_K columns for samples of the timed length; its trips over steps of the tile."""
    o, k, t = (build.constants[name] for name in ("BLOCK_O", "BLOCK_K", "BLOCK_T"))
    tiles, signs = 1000, o * DENSE_WORD * k
    inner = [Trips(TIMED_LENGTH // t), Trips(DENSE_STEPS, signs / DENSE_STEPS)]
    return [Work(f"{TIMED_LENGTH} tokens", tiles * signs, [Trips(tiles, inner=inner)], unit="sign")]


def dense_token_works(build: Build) -> list[Work]:
    t, k = build.constants["BLOCK_T"], build.constants["BLOCK_K"]
    strips, signs = TIMED_WIDTHS[0][0] // DENSE_WORD, t * DENSE_WORD * k
    loops = [Trips(strips, inner=[Trips(DENSE_STEPS, signs / DENSE_STEPS)])]
    return [Work(f"{TIMED_WIDTHS[0][0]}", strips * signs, loops, unit="sign")]


SIZES = {"*fp32": 4, "*bf16": 2, "*fp16": 2, "*fp64": 8}
WORKS: dict[str, Callable[[Build], list[Work]]] = {
    "linear_sketch": linear_works,
    "fold_hadamard": fold_hadamard_works,
    "expert_sketch": expert_works,
    "token_sketch": token_works,
    "vector_sketch": vector_works,
    "reduce_chunks": reduce_works,
    "softmax_sum": softmax_sum_works,
    "softmax_fold": softmax_fold_works,
    "unit_rows": unit_rows_works,
    "covariance": covariance_works,
    "assign": assign_works,
    "gram": gram_works,
    "gain": gain_works,
    "dense_linear": dense_linear_works,
    "dense_token": dense_token_works,
    # Their trips depend on the data; registers and stack alone.
    "jacobi": lambda build: [],
    "route_pairs": lambda build: [],
    "route_begins": lambda build: [],
    "route_spans": lambda build: [],
}


def count(build: Build) -> dict[str, object]:
    """What is counted of a build: one entry for each shape beside what the compiler allotted."""
    kernel = compile_build(build, CAPABILITY)
    code = sass.code(tool("cuobjdump"), kernel.asm["cubin"])
    found: dict[str, object] = {"warps": build.warps, "instructions": code.size()}
    found |= sass.usage(tool("cuobjdump"), kernel.asm["cubin"])
    found |= {"shared": kernel.metadata.shared, "shapes": (shapes := {})}
    threads = build.warps * WARP
    for work in WORKS[build.name.split("-")[0]](build):
        trips = [loop.nested() for loop in work.loops]
        try:
            executed = sass.executed(code, trips)
        except ValueError as error:
            raise SystemExit(
                f"{build.name} at {work.shape}: {error}; mend its works in {__file__}"
            ) from error
        entry: dict[str, object] = {"unit": work.unit, "bytes": work.bytes}
        if loops := innermost(code.loops, work.loops):
            busiest = max(loops, key=lambda loop: loop[0] * loop[1].count)
            entry["loop"] = busiest[0] * threads / busiest[1].covers
        entry["whole"] = executed * threads / work.elements
        shapes[work.shape] = entry
    return found


def innermost(loops: list[sass.Loop], trips: list[Trips]) -> list[tuple[float, Trips]]:
    """(instructions of a trip, trips) of the loops without inner ones that cover elements."""
    found = []
    for (loop, _, times), trip in zip(sass.paired(loops, len(trips)), trips, strict=True):
        if loop.inner:
            found += innermost(loop.inner, trip.inner)
        elif trip.covers:
            found.append((loop.own / times, trip))
    return found


def floors(entry: dict, copy_rate: float, clock: float) -> tuple[float, float]:
    """Picoseconds of one element on the whole GPU that its bytes take at copy bandwidth, and its instructions."""
    return entry["bytes"] / copy_rate, entry["whole"] / WARP / (SCHEDULERS * clock) * 1e3


def number(value: float | None) -> str:
    """A number for a table; "-" where there is none."""
    return "-" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def change(values: list[object]) -> str:
    """Before and after in one cell, once where they are the same."""
    return " -> ".join(dict.fromkeys(str(value) for value in values))


def version_table(counts: dict[str, dict], copy_rate: float, clock: float) -> str:
    """One row for each build and shape of a Triton version; counts: {label: {name: what `count` gave}}."""
    head = ["kernel", "shape", "unit", "loop", "whole", "issue, ps", "bytes, ps", "goal, ps", "of copy"]
    head += ["registers", "stack", "shared"]
    rows = []
    for name in dict.fromkeys(name for label in reversed(counts) for name in counts[label]):
        found = [builds.get(name) for builds in counts.values()]
        usage = [
            change([entry[key] if entry else "-" for entry in found])
            for key in ("registers", "stack", "shared")
        ]
        shapes = dict.fromkeys(shape for entry in found if entry for shape in entry["shapes"])
        if not shapes:
            rows.append([name, *["-"] * 8, *usage])
        for shape in shapes:
            entries = [entry["shapes"].get(shape) if entry else None for entry in found]
            latest = [entry for entry in entries if entry][-1]
            loop, whole = (
                change([number(entry.get(key)) if entry else "-" for entry in entries])
                for key in ("loop", "whole")
            )
            rates = [
                floors(entry, copy_rate, clock) if entry and entry["bytes"] else None for entry in entries
            ]
            limits = [change([number(rate and rate[1]) for rate in rates]), "-", "-", "-"]
            if latest["bytes"]:
                moved, issued = floors(latest, copy_rate, clock)
                goal = max(moved, issued) / GOAL
                limits[1:] = [number(moved), number(goal), f"{100 * moved / goal:.0f} %"]
            rows.append([name, shape, latest["unit"], loop, whole, *limits, *usage])
    return table(head, rows)


def render(record: dict, copy_rate: float, clock: float) -> str:
    """The Markdown page."""
    versions = sorted({version for label in LABELS for version in record.get(label, {})})
    parts = [
        "# Instructions of the Triton kernels",
        "Generated by `benchmarks/gpu/count_instructions.py`, whose head says how. "
        f"Compiled for sm_{CAPABILITY}, counted, not run: no figure here was measured on a GPU. A cell with an arrow "
        "is before -> after; a build that one of the two lacks has a dash there. *loop* and *whole* are thread "
        "instructions a unit. *issue* and *bytes* are "
        f"floors, *goal* is the larger of the latest over {GOAL:g}, and *of copy* its share of copy bandwidth. "
        f"Assumed: {copy_rate:g} TB/s of copy bandwidth, {SCHEDULERS} schedulers at {clock:g} GHz.",
    ]
    for version in versions:
        counts = {label: record[label][version] for label in LABELS if version in record.get(label, {})}
        commits = ", ".join(f"{label} {found['commit']}" for label, found in counts.items())
        tables = {label: found["builds"] for label, found in counts.items()}
        parts += [f"## Triton {version}", f"Commits: {commits}.", version_table(tables, copy_rate, clock)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Count, keep, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--label", choices=LABELS, help="what to count as; without it the tables are written again"
    )
    parser.add_argument(
        "--only", metavar="REGEX", default="", help="builds whose name matches; others stay, and the commit"
    )
    parser.add_argument("--copy-rate", type=float, default=4.0, help="copy bandwidth, TB/s")
    parser.add_argument("--clock", type=float, default=1.7, help="GHz")
    parser.add_argument("--out", type=Path, default=RESULTS / "instructions.json")
    args = parser.parse_args()
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.label:
        held = record.setdefault(args.label, {}).setdefault(triton.__version__, {"builds": {}})
        if not args.only or "commit" not in held:
            held["commit"] = commit()
        wanted = {name: build for name, build in builds().items() if re.search(args.only, name)}
        if not args.only:
            held["builds"] = {}
        held["builds"] |= {name: count(build) for name, build in wanted.items()}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(render(record, args.copy_rate, args.clock))


if __name__ == "__main__":
    main()
