"""What benchmarks/gpu.py found: the README's table of a GPU, and the record by which backends are chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from shapes import DENSE_SAMPLES, QWEN_05B

from gvendi_fast.backends import ORDER

MISSING = "not measured"
HEAD = ["figure", "goal", "measured", "compared to"]
BACKENDS = tuple(name for name in ORDER["cuda"] if name != "reference")
# Operations whose time is set by the bytes they move.
MOVING = ("linear_sketch", "fold_hadamard", "vector_sketch", "token_sketch", "softmax_fold")
DTYPES = ("bf16", "fp16", "fp32")
GOALS = {
    "checks": "all",
    "tokens": "at least 200,000 on one H200",
    "speed over training": "at least 1.3",
    "sketch work": "at most 15 %",
    "share": "at least 60 %",
    "dense": "at least 40 %",
    "agreement": "at most 1e-5",
}
NO_GOAL = "-"
VERSIONS = ("gpu", "driver", "cuda", "torch", "triton", "transformers", "commit", "date")


def gpu_results(folder: Path) -> list[dict]:
    """The files of GPUs in a results folder, by name; a dry run's is none."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [content for content in found if content.get("gpu") and not content["dry run"]]


def gpu_tables(files: list[dict], table: Callable[[list[str], list[list[str]]], str]) -> str:
    """One table for each GPU; without any, one that names every figure as not measured."""
    if not files:
        return f"**On a GPU**: {MISSING}.\n\n{table(HEAD, list(rows({})))}"
    parts = [
        "**On a GPU.** Medians, 20th to 80th percentile in brackets; errors are the largest of the checks."
    ]
    for content in files:
        parts += [machine_line(content["sections"]), table(HEAD, list(rows(content["sections"])))]
    return "\n\n".join(parts)


def machine_line(sections: dict) -> str:
    """One line of what a GPU's figures were measured on."""
    machines = [entry["machine"] for entry in sections.values()]
    used = {name: ", ".join(sorted({str(m[name]) for m in machines if name in m})) for name in VERSIONS}
    line = (
        f"Measured on {used['gpu']}, driver {used['driver']}, CUDA {used['cuda']}, torch {used['torch']}, Triton "
        f"{used['triton']}, transformers {used['transformers']}, commits {used['commit']}, {used['date']}."
    )
    limits = next((e["found"]["limits"] for e in sections.values() if "limits" in e["found"]), None)
    if limits is None:
        return line
    copy, product = (limits[name]["p50"] for name in ("copy bytes per second", "bf16 FLOP per second"))
    return f"{line} It copies at {copy / 1e12:.2f} TB/s and multiplies bf16 matrices at {product / 1e12:.0f} TFLOP/s."


def rows(sections: dict) -> Iterator[list[str]]:
    """The lines of the table; a figure that is not there says so."""
    yield checks_row(sections)
    yield from end_to_end_rows(sections)
    yield from share_rows(sections)
    yield dense_row(sections)
    yield from spectral_rows(sections)
    yield agreement_row(sections)


def row(figure: str, measured: str | None, compared: str, goal: str = "") -> list[str]:
    return [figure, GOALS.get(goal, NO_GOAL), measured or MISSING, compared]


def checks_row(sections: dict) -> list[str]:
    parts = []
    for name in BACKENDS:
        titles = [title for title in (f"checks {name}", f"other checks {name}") if title in sections]
        if not titles:
            continue
        checked = [sections[title]["found"] for title in titles]
        counts = [
            f"{label} {total(checked, label, 'passed')} of {total(checked, label, 'cases')}"
            for label in DTYPES
        ]
        if any(total(checked, label, "cases") for label in DTYPES):
            whole = len(titles) == 2 and all(found["complete"] for found in checked)
            parts.append(f"{name} {', '.join(counts)}{'' if whole else ' (not all were run)'}")
        else:
            parts.append(f"{name} cannot run there")
    return row(
        "kernel checks passed, each run twice to the same bits",
        "; ".join(parts),
        "float64 definition; at most twice the error of float32 PyTorch",
        "checks",
    )


def total(checked: list[dict], label: str, count: str) -> int:
    """Sum of a count over all operations in one dtype."""
    return sum(
        e[count] for found in checked for op, e in found["operations"].items() if op.split()[1] == label
    )


def end_to_end_rows(sections: dict) -> Iterator[list[str]]:
    found = sections.get("end to end", {}).get("found", {})
    if reason := found.get("not measured"):
        found = {}
    tokens = found.get("tokens", QWEN_05B.batch * QWEN_05B.length)
    length, piece = found.get("length", QWEN_05B.length), found.get("samples a piece of training")
    batch = f"{QWEN_05B.name} shape with random weights, bf16, {tokens} tokens in samples of {length}"

    def cell(text: Callable[[], str]) -> str:
        return text() if found else f"{MISSING}{f': {reason}' if reason else ''}"

    pieces = f", in pieces of {piece} samples, the fastest" if piece else ""
    yield row(
        f"{batch}: tokens sketched a second",
        cell(lambda: spread(found["tokens per second"]["sketch"], "{:,.0f}")),
        cell(lambda: f"training {spread(found['tokens per second']['training'], '{:,.0f}')}")
        if found
        else NO_GOAL,
        "tokens",
    )
    yield row(
        "times as fast as training on the same batch",
        cell(lambda: spread(found["speed over training"], "{:.2f}")),
        f"the model's own forward + full backward, no optimizer step{pieces}, in turns in the same run",
        "speed over training",
    )
    yield row(
        "all sketch operations, share of forward + input gradients",
        cell(lambda: percent(found["sketch work over forward + input gradients"])),
        f"the model's own forward, loss and input gradients{pieces}, same run",
        "sketch work",
    )
    yield row(
        f"peak memory of a batch of {tokens} tokens",
        cell(lambda: f"{found['peak memory bytes'] / 2**30:.1f} GiB"),
        cell(lambda: f"its weights alone: {found['weights bytes'] / 2**30:.1f} GiB") if found else NO_GOAL,
        "memory",
    )


def share_rows(sections: dict) -> Iterator[list[str]]:
    for op in MOVING:
        timed = list(entries(sections, op, "bf16"))
        for shape in dict.fromkeys(entry["shape"] for _, entry in timed) or [None]:
            cells = [
                f"{name} {outcome(entry, 'share of copy bandwidth')}"
                for name, entry in timed
                if entry["shape"] == shape
            ]
            title = f"`{op}`, bf16" + (f", {shape}" if shape else "")
            yield row(
                title,
                "; ".join(cells),
                "measured copy bandwidth; bytes of inputs and outputs, cold cache",
                "share",
            )


def dense_row(sections: dict) -> list[str]:
    cells = [
        f"{name} {entry['shape']}: {outcome(entry, 'share of bf16 FLOP per second')}"
        for name, entry in entries(sections, "dense_sketch", "bf16")
    ]
    return row(
        f"`dense_sketch`, bf16, {DENSE_SAMPLES} samples a batch",
        "; ".join(cells),
        "measured bf16 matrix rate; operations of the gradients and of the projection",
        "dense",
    )


def entries(sections: dict, op: str, dtype: str) -> Iterator[tuple[str, dict]]:
    """(backend, entry) of an operation that a backend has: timed, or not timed for a reason that is not its absence."""
    for name in BACKENDS:
        for entry in sections.get(f"times {name}", {}).get("found", {}).get("operations", ()):
            reason = entry.get("not timed", "")
            own = not reason or reason == "out of time" or reason.startswith("check failed")
            if own and (entry["op"], entry["dtype"]) == (op, dtype):
                yield name, entry


def outcome(entry: dict, share: str) -> str:
    """The share and the error of a timed operation, or why it was not timed."""
    if "not timed" in entry:
        return f"not timed ({entry['not timed']})"
    return f"{percent(entry[share])}, error {entry['largest error in checks']:.1e}"


def spectral_rows(sections: dict) -> Iterator[list[str]]:
    found = sections.get("spectral", {}).get("found", {})
    one, many = found.get("matrix", {}), found.get("groups", {})
    on_cpu = one.get("milliseconds on the CPU")
    yield row(
        "entropy of a 1024 x 1024 matrix",
        timed(one),
        f"the CPU beside it: {spread(on_cpu, '{:.1f}')} ms" if on_cpu else NO_GOAL,
        "matrix",
    )
    alone = many.get("milliseconds of torch.linalg.eigvalsh, one run")
    yield row(
        "entropies of 10,000 groups of 64 rows, K = 1024",
        timed(many),
        f"`torch.bmm` and `torch.linalg.eigvalsh` in float64: {alone:,.0f} ms, one run" if alone else NO_GOAL,
        "groups",
    )


def timed(found: dict) -> str | None:
    """Milliseconds and error of an entropy."""
    if "milliseconds" not in found:
        return f"not timed ({found['not timed']})" if "not timed" in found else None
    return f"{spread(found['milliseconds'], '{:.1f}')} ms, error {found['error']:.1e}"


def agreement_row(sections: dict) -> list[str]:
    found = sections.get("cpu and gpu", {}).get("found", {})
    cells = [f"{name}, {e['samples']} samples: {e['largest 1 - cosine']:.1e}" for name, e in found.items()]
    backends = ", ".join(sorted({e["CPU backend"] for e in found.values()}))
    return row(
        "1 - cosine between a sample's sketches on CPU and GPU, largest, fp32 weights",
        "; ".join(cells),
        f"the same model and samples on the CPU{f', backend {backends}' if found else ''}",
        "agreement",
    )


def spread(found: dict[str, float], form: str) -> str:
    """Quantiles as "p50 (p20 to p80)"."""
    p20, p50, p80 = (form.format(found[q]) for q in ("p20", "p50", "p80"))
    return f"{p50} ({p20} to {p80})"


def percent(found: dict[str, float]) -> str:
    """Quantiles of a share."""
    p20, p50, p80 = (f"{100 * found[q]:.1f}" for q in ("p20", "p50", "p80"))
    return f"{p50} % ({p20} to {p80})"


def dispatch_record(files: Iterable[dict]) -> dict:
    """What `gvendi_fast/backends/measured.py` reads: median milliseconds by capability, GPU, operation and backend."""
    record: dict = {}
    for content in files:
        for name in BACKENDS:
            section = content["sections"].get(f"times {name}", {"found": {"operations": ()}})
            for entry in section["found"]["operations"]:
                if "milliseconds" not in entry:
                    continue
                operations = record.setdefault(content["capability"], {}).setdefault(content["gpu"], {})
                known = operations.setdefault(entry["op"], {"milliseconds": {}, "measured": {}})
                case = f"{entry['dtype']} {entry['shape']}"
                median = float(f"{entry['milliseconds']['p50']:.4g}")
                known["milliseconds"].setdefault(name, {})[case] = median
                known["measured"][name] = {v: section["machine"].get(v) for v in VERSIONS if v != "gpu"}
    return record
