"""What `python -m benchmarks.gpu` measured: its summary, its tables in docs/results.md, and the record of backends.

Imports no torch, for the process that starts the GPU benchmark's sections does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.shapes import BATCHES, DENSE_SAMPLES, QWEN_05B

MISSING = "not measured"
# Why a section ended, or a figure in it, when the section's time was up: nothing was found out about the figure.
OUT_OF_TIME = "out of time"
HEAD = ["figure", "goal", "measured", "compared to"]
# As gvendi_fast.kernels.backends.ORDER has them for a GPU.
BACKENDS = ("cuda", "triton")
# Operations whose time is set by the bytes they move.
MOVING = (
    "linear_sketch",
    "expert_sketch",
    "fold_hadamard",
    "vector_sketch",
    "token_sketch",
    "softmax_fold",
)
DTYPES = ("bf16", "fp16", "fp32")
CHECKS = ("smoke", "checks", "other checks")
# Yardsticks by their names in the results; those of one size of batch alone stand last.
STEPS = {
    "training, eager": "an eager training step",
    "training, compiled": "a compiled training step",
    "training, eager, chunked loss": "an eager training step with a chunked loss",
    "training, compiled, chunked loss": "a compiled training step with a chunked loss",
    "forward + input gradients": "forward + input gradients, the model's head",
    "forward + input gradients, our head": "forward + input gradients, this package's head",
    "Kronecker projections": "a Kronecker projection of each layer",
}
SLOW = {
    "batch-1 autograd + CountSketch": "batch-1 autograd + CountSketch",
    "vmap + CountSketch": "`torch.func` per-sample gradients + CountSketch",
    "bergson": "bergson",
}
SIZES = ("64k", "16k", "8k")
GOALS = {
    "checks": "all",
    "tokens": "at least 200,000 on one H200",
    "training, eager": "at least 1.3",
    "training, compiled": "at least 1.0",
    "sketch work": "at most 15 %",
    # By operation and shape, from counted instructions and bytes.
    "share": "as counted, `benchmarks/results/instructions.md`",
    "dense": "at least 20 % (CUDA), 10 % (Triton)",
    "agreement": "at most 1e-5",
    # A share of 0.9 of its time.
    "experts": "at least 1.1",
}
NO_GOAL = "-"
VERSIONS = ("gpu", "driver", "cuda", "torch", "triton", "transformers", "commit", "date")
SUMMARY_LINES, SUMMARY_WIDTH = 30, 240
Sections = dict[str, dict]


def gpu_results(folder: Path) -> list[dict]:
    """The files of GPUs in a results folder, by name; a dry run's is none."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [content for content in found if content.get("gpu") and not content["dry run"]]


def gpu_tables(files: list[dict], table: Callable[[list[str], list[list[str]]], str]) -> str:
    """One table for each GPU; without any, one that names every figure as not measured."""
    if not files:
        return f"## On a GPU\n\n{MISSING.capitalize()}.\n\n{table(HEAD, list(rows({})))}"
    parts = [
        "## On a GPU",
        "Medians, 20th to 80th percentile in brackets; errors are the largest of the checks.",
    ]
    for content in files:
        parts += [
            machine_line(content),
            failed_line(content),
            table(HEAD, list(rows(content["sections"]))),
        ]
    return "\n\n".join(parts)


def failed_line(content: dict) -> str:
    """Which checks failed, by operation, number format and shape."""
    failed = failed_checks(content)
    return f"Checks that failed: {'; '.join(failed) if failed else 'none of those that were run'}."


def readme_rows(files: list[dict]) -> Iterator[list[str]]:
    """The README's lines of a GPU: tokens a second, and both measurements of the ratio to an eager training step."""
    for content in files:
        sections, gpu = content["sections"], content["gpu"]
        turns = end_to_end(sections, "64k", "compiled")
        yardstick = {
            "in the first seconds of a second process": figure(sections, "yardsticks", "64k training, eager")
        }
        what = f"{QWEN_05B.name} shape, bf16, compiled, on one {gpu}"
        yield [
            f"{what}: tokens sketched a second",
            "; ".join(
                cells(found, lambda f: spread(f["tokens per second"]["sketch"], "{:,.0f}"))
                for found in (turns, yardstick)
            ),
        ]
        yield [
            f"{what}: times as fast as an eager training step",
            f"{cells(turns, lambda f: spread(f['speed over training'], '{:.2f}'))}; "
            f"{cells(yardstick, lambda f: spread(f['speed over it'], '{:.2f}'))}",
        ]


def machine_line(content: dict) -> str:
    """One line of what a GPU's figures were measured on."""
    measured = {f["machine"] for s in content["sections"].values() for f in s["figures"].values()}
    machines = [machine for key, machine in content["machines"].items() if key in measured]
    used = {name: ", ".join(sorted({str(m[name]) for m in machines if name in m})) for name in VERSIONS}
    line = (
        f"Measured on {used['gpu']}, driver {used['driver']}, CUDA {used['cuda']}, torch {used['torch']}, Triton "
        f"{used['triton']}, transformers {used['transformers']}, commits {used['commit']}, {used['date']}."
    )
    limits = figure(content["sections"], "versions", "limits")
    if "limits" not in limits:
        return line
    copy, product = (
        limits["limits"][name]["p50"] for name in ("copy bytes per second", "bf16 FLOP per second")
    )
    return f"{line} It copies at {copy / 1e12:.2f} TB/s and multiplies bf16 matrices at {product / 1e12:.0f} TFLOP/s."


def figure(sections: Sections, section: str, name: str) -> dict:
    """A figure as it was found; empty where nothing was."""
    return sections.get(section, {"figures": {}})["figures"].get(name, {})


def cell(found: dict, text: Callable[[dict], str]) -> str:
    """A figure's text and the check that it failed, or why it was not measured."""
    if not found:
        return MISSING
    if "not measured" in found:
        return f"{MISSING}: {found['not measured']}"
    failed = str(found.get("check", ""))
    return text(found) + (f" (check {failed})" if failed.startswith("failed") else "")


def cells(found: dict[str, dict], text: Callable[[dict], str]) -> str:
    """Several figures by name; one word where none of them is there."""
    if not any(found.values()):
        return MISSING
    return "; ".join(f"{name} {cell(entry, text)}" for name, entry in found.items() if entry)


def rows(sections: Sections) -> Iterator[list[str]]:
    """The lines of the table; a figure that is not there says so."""
    yield checks_row(sections)
    yield from end_to_end_rows(sections)
    yield from yardstick_rows(sections)
    yield from experts_rows(sections)
    yield from profile_rows(sections)
    yield from share_rows(sections)
    yield dense_row(sections)
    yield from spectral_rows(sections)
    yield agreement_row(sections)
    yield waiting_row(sections)


def row(name: str, measured: str | None, compared: str, goal: str = "") -> list[str]:
    # A bar would end the cell.
    return [
        part.replace("|", "/") for part in (name, GOALS.get(goal, NO_GOAL), measured or MISSING, compared)
    ]


def checked(sections: Sections, backend: str) -> dict[str, list[int]]:
    """{dtype: [cases passed, cases]} of a backend, over all sections of checks."""
    found = {label: [0, 0] for label in DTYPES}
    for section in CHECKS:
        for name, entry in sections.get(section, {"figures": {}})["figures"].items():
            own, _, label = name.split() if name.count(" ") == 2 else ("", "", "")
            if own == backend and "cases" in entry:
                found[label][0] += entry["passed"]
                found[label][1] += entry["cases"]
    return found


def checks_row(sections: Sections) -> list[str]:
    parts = []
    whole = all(sections.get(name, {}).get("ended") == "complete" for name in CHECKS)
    for name in BACKENDS:
        found = checked(sections, name)
        if any(cases for _, cases in found.values()):
            counts = ", ".join(
                f"{label} {passed} of {cases}" for label, (passed, cases) in found.items() if cases
            )
            parts.append(f"{name} {counts}{'' if whole else ' (not all were run)'}")
        elif any(f.startswith(f"{name} ") for f in sections.get("checks", {"figures": {}})["figures"]):
            parts.append(f"{name} cannot run there")
    return row(
        "kernel checks passed, each run twice to the same bits",
        "; ".join(parts),
        "float64 definition; at most twice the error of float32 PyTorch",
        "checks",
    )


def end_to_end(sections: Sections, batch: str, kind: str) -> dict[str, dict]:
    """{backend: the figure of sketching a batch}."""
    return {name: figure(sections, "end to end", f"{batch} {name} {kind}") for name in BACKENDS}


def end_to_end_rows(sections: Sections) -> Iterator[list[str]]:
    model = f"{QWEN_05B.name} shape with random weights, bf16"
    for batch in ("64k", "10k"):
        samples, length = BATCHES[batch]
        for kind in ("compiled", "eager"):
            found = end_to_end(sections, batch, kind)
            training = next((f["tokens per second"]["training"] for f in found.values() if is_there(f)), None)
            yield row(
                f"{model}, {samples * length} tokens in samples of {length}, {kind}: tokens sketched a second",
                cells(
                    found,
                    lambda f, whole=samples * length: (
                        spread(f["tokens per second"]["sketch"], "{:,.0f}") + fewer(f, whole)
                    ),
                ),
                f"an eager training step: {spread(training, '{:,.0f}')}" if training else NO_GOAL,
                "tokens" if (batch, kind) == ("64k", "compiled") else "",
            )
    corpus = figure(sections, "yardsticks", "real corpus")
    yield row(
        "real text in the batches of `gvendi sketch`: tokens a second, padding not counted",
        cell(
            corpus,
            lambda f: (
                f"{f['sketch']} {spread(f['tokens per second']['sketch'], '{:,.0f}')}, "
                f"{f['rows']} rows in {f['batches']} batches"
            ),
        ),
        f"an eager training step on the same batches: {spread(corpus['tokens per second']['training'], '{:,.0f}')}"
        if is_there(corpus)
        else NO_GOAL,
    )
    yield row(
        "all sketch operations, share of forward + input gradients, 64k eager",
        cells(
            {n: f for n, f in end_to_end(sections, "64k", "eager").items()},
            lambda f: (
                percent(f["sketch work over forward + input gradients"])
                if "sketch work over forward + input gradients" in f
                else f["sketch work"]
            ),
        ),
        "the model's own forward, loss and input gradients, same run",
        "sketch work",
    )
    peaks = {
        f"{name} {kind}": found
        for kind in ("compiled", "eager")
        for name, found in end_to_end(sections, "64k", kind).items()
    }
    weights = next((f["weights bytes"] for f in peaks.values() if is_there(f)), None)
    yield row(
        "peak memory of a batch of 65536 tokens",
        cells(
            peaks,
            lambda f: (
                f"{f['peak memory bytes'] / 2**30:.1f} GiB"
                + (f" at {f['tokens']} tokens" if f["tokens"] != 65536 else "")
            ),
        ),
        f"its weights alone: {weights / 2**30:.1f} GiB" if weights else NO_GOAL,
    )


def fewer(found: dict, whole: int) -> str:
    """A remark where the device's memory took a part of the batch alone."""
    return "" if found["tokens"] == whole else f" at {found['tokens']} tokens, what fits"


def is_there(found: dict) -> bool:
    """Whether a figure was measured."""
    return bool(found) and "not measured" not in found


def yardstick_rows(sections: Sections) -> Iterator[list[str]]:
    for name, title in (STEPS | SLOW).items():
        found = {size: figure(sections, "yardsticks", f"{size} {name}") for size in SIZES}
        notes = dict.fromkeys(f["note"] for f in found.values() if "note" in f)
        kinds = dict.fromkeys(f"{f['sketch']} sketch" for f in found.values() if "sketch" in f)
        yield row(
            f"times as fast as {title}",
            cells(found, lambda f: spread(f["speed over it"], "{:.2f}")),
            "; ".join([*notes, *kinds, "in turns in the same run"]),
            name,
        )


def profile_rows(sections: Sections) -> Iterator[list[str]]:
    for kind in ("compiled", "eager"):
        found = {n: figure(sections, "end to end", f"64k {n} {kind} profile") for n in BACKENDS}
        yield row(
            f"kernels that take most of the device's time, 64k {kind}",
            cells(
                found,
                lambda f: ", ".join(
                    f"`{kernel[:40]}` {100 * share:.0f} %" for kernel, _, _, share in f["profile"][:3]
                ),
            ),
            "; ".join(
                f"{n}: {f['device milliseconds']:.0f} ms in {f['launches']} launches"
                for n, f in found.items()
                if is_there(f)
            )
            or NO_GOAL,
        )


def share_rows(sections: Sections) -> Iterator[list[str]]:
    for op in MOVING:
        timed = list(entries(sections, op, "bf16"))
        for shape in dict.fromkeys(entry.get("shape", "") for entry in timed) or [""]:
            found = [(entry["backend"], entry) for entry in timed if entry.get("shape", "") == shape]
            yield row(
                f"`{op}`, bf16" + (f", {shape}" if shape else ""),
                "; ".join(f"{n} {cell(e, lambda e: share(sections, e))}" for n, e in found),
                "measured copy bandwidth; bytes of inputs and outputs, cold cache",
                "share",
            )


def dense_row(sections: Sections) -> list[str]:
    found = [
        f"{e['backend']} {e.get('shape', '')}: {cell(e, lambda e: share(sections, e))}"
        for e in entries(sections, "dense_sketch", "bf16")
    ]
    return row(
        f"`dense_sketch`, bf16, {DENSE_SAMPLES} samples a batch",
        "; ".join(found),
        "measured bf16 matrix rate; operations of the gradients and of the projection",
        "dense",
    )


def entries(sections: Sections, op: str, dtype: str) -> Iterator[dict]:
    """The figures of an operation by each backend that has it: timed, or with the error that kept it from that."""
    for name, entry in sections.get("kernel times", {"figures": {}})["figures"].items():
        backend, own, label = [*name.split(), "", ""][:3]
        if (own, label) == (op, dtype) and not entry.get("absent"):
            yield {"backend": backend, "op": own, "dtype": label, **entry}


def share(sections: Sections, entry: dict) -> str:
    """The share of a limit that a kernel reaches, and its error in the checks."""
    title = next(name for name in entry if name.startswith("share of "))
    errors = [
        f["largest error"]
        for section in CHECKS
        if "largest error"
        in (f := figure(sections, section, f"{entry['backend']} {entry['op']} {entry['dtype']}"))
    ]
    return percent(entry[title]) + (f", error {max(errors):.1e}" if errors else ", not checked")


def spectral_rows(sections: Sections) -> Iterator[list[str]]:
    def timed(found: dict) -> str:
        return f"{spread(found['milliseconds'], '{:.1f}')} ms, error {found['error']:.1e}"

    on_cpu = figure(sections, "spectral", "matrix on the CPU")
    yield row(
        "entropy of a 1024 x 1024 matrix",
        cell(figure(sections, "spectral", "matrix"), timed),
        f"the CPU beside it: {spread(on_cpu['milliseconds'], '{:.1f}')} ms" if is_there(on_cpu) else NO_GOAL,
    )
    alone = figure(sections, "spectral", "groups by torch.linalg.eigvalsh")
    yield row(
        "entropies of 10,000 groups of 64 rows, K = 1024",
        cell(figure(sections, "spectral", "groups"), timed),
        f"`torch.bmm` and `torch.linalg.eigvalsh` in float64: {alone['milliseconds, one run']:,.0f} ms, one run"
        if is_there(alone)
        else NO_GOAL,
    )


def agreement_row(sections: Sections) -> list[str]:
    found = own_figures(sections, "cpu and gpu")
    backends = ", ".join(sorted({f["CPU backend"] for f in found.values() if is_there(f)}))
    return row(
        "1 - cosine between a sample's sketches on CPU and GPU, largest, fp32 weights",
        cells(found, lambda f: f"{f['largest 1 - cosine']:.1e} ({f['samples']} samples)"),
        f"the same model and samples on the CPU{f', backend {backends}' if backends else ''}",
        "agreement",
    )


def experts_rows(sections: Sections) -> Iterator[list[str]]:
    """Sketching a mixture of experts as a share of a training step's time; its goal is a share of 0.9."""
    for name, found in own_figures(sections, "experts").items():
        yield row(
            f"speed of sketching over training, {name}",
            cell(found, lambda f: f"{spread(f['speed over training'], '{:.2f}')}, {f['tokens']} tokens"),
            "forward and full backward of the same mixture of experts, eager",
            "experts",
        )


def waiting_row(sections: Sections) -> list[str]:
    found = own_figures(sections, "waiting")
    return row(
        "times that a batch makes the CPU wait for the GPU: in this package, in others",
        cells(found, lambda f: f"{f.get('own waits', 0)}, {f.get('waits elsewhere', 0)}"),
        "PyTorch's sync debug mode",
    )


def own_figures(sections: Sections, section: str) -> dict[str, dict]:
    """The figures of a section, without what a rehearsal planted."""
    found = sections.get(section, {"figures": {}})["figures"]
    return {name: entry for name, entry in found.items() if name != "planted"}


def spread(found: dict[str, float], form: str) -> str:
    """Quantiles as "p50 (p20 to p80)"."""
    p20, p50, p80 = (form.format(found[q]) for q in ("p20", "p50", "p80"))
    return f"{p50} ({p20} to {p80})"


def percent(found: dict[str, float]) -> str:
    """Quantiles of a share."""
    p20, p50, p80 = (f"{100 * found[q]:.1f}" for q in ("p20", "p50", "p80"))
    return f"{p50} % ({p20} to {p80})"


def check_marks(content: dict) -> None:
    """Mark the figures that rest on kernels with what their checks say: "passed", "failed: ..." or "not checked"."""
    sections = content["sections"]
    for section, entry in sections.items():
        for found in entry["figures"].values():
            if section in CHECKS or "kernels" not in found:
                continue
            verdicts = [
                checks_of(sections, name, op, found["dtype"], found["machine"])
                for op, name in found["kernels"].items()
                # The definition itself has nothing to be checked with.
                if name != "reference"
            ]
            failed = [verdict for verdict in verdicts if verdict.startswith("failed")]
            found["check"] = (failed or [v for v in verdicts if v != "passed"] or ["passed"])[0]


def checks_of(sections: Sections, backend: str, op: str, dtype: str, machine: str) -> str:
    """What the checks of one kernel on one machine say."""
    found = [figure(sections, section, f"{backend} {op} {dtype}") for section in CHECKS]
    found = [f for f in found if f.get("machine") == machine and not f.get("absent")]
    for entry in found:
        if entry.get("not measured") == OUT_OF_TIME:
            continue
        if "not measured" in entry:
            return f"failed: {op} on {backend}: {entry['not measured']}"
        if entry["check"] != "passed":
            return f"failed: {op} on {backend}: {entry['check'].removeprefix('failed: ')}"
    return "passed" if found else "not checked"


def failed_checks(content: dict) -> list[str]:
    """Every check that failed, without the figures that rest on it."""
    return [
        f"{section}, {name}: {found['check'].removeprefix('failed: ')}"
        for section, entry in content["sections"].items()
        for name, found in entry["figures"].items()
        if "kernels" not in found and str(found.get("check", "")).startswith("failed")
    ]


def summary(content: dict, order: list[str], key: str, path: str, resume: str) -> list[str]:
    """At most 30 lines: every headline figure of this source, what is missing and how to go on."""
    sections = {
        name: {**entry, "figures": {f: e for f, e in entry["figures"].items() if e["machine"] == key}}
        for name, entry in content["sections"].items()
    }
    machine = content["machines"].get(key, {})
    lines = [
        f"== {machine.get('gpu', 'no machine')}, commit {machine.get('commit')}, torch {machine.get('torch')}, "
        f"Triton {machine.get('triton')}, transformers {machine.get('transformers')}",
        *headlines(sections),
    ]
    failed = failed_checks({"sections": sections})
    lines.append(f"checks failed: {len(failed)}{''.join(f'; {f}' for f in failed)}")
    errors = [
        f"{section}, {name}: {found['not measured']}"
        for section in order
        for name, found in sections.get(section, {"figures": {}})["figures"].items()
        if "not measured" in found and not found.get("absent")
    ]
    lines.append(f"figures that failed: {len(errors)}{''.join(f'; {e}' for e in errors)}")
    unfinished = [
        f"{s} ({sections.get(s, {}).get('ended', 'not run')})"
        for s in order
        if sections.get(s, {}).get("ended") != "complete"
    ]
    lines.append(f"sections not complete: {', '.join(unfinished) or 'none'}")
    lines.append(f"written to {path}" if path else "written nowhere: --out names a file")
    lines.append(
        f"to go on: {resume}" if unfinished or errors else "nothing is left to measure; next: make report"
    )
    return [line[:SUMMARY_WIDTH] for line in lines[-SUMMARY_LINES:]]


def headlines(sections: Sections) -> Iterator[str]:
    """One line a figure of the table, in the words of a terminal."""
    names = [*BACKENDS, "cpu"]
    counts = {n: [sum(c) for c in zip(*checked(sections, n).values(), strict=True)] for n in names}
    yield "checks passed: " + ", ".join(f"{n} {p} of {c}" for n, (p, c) in counts.items() if c)
    for batch in ("64k", "10k"):
        for kind in ("compiled", "eager"):
            found = {n: figure(sections, "end to end", f"{batch} {n} {kind}") for n in names}
            said = cells(
                found,
                lambda f: (
                    f"{f['tokens per second']['sketch']['p50']:,.0f} tokens/s, "
                    f"{f['speed over training']['p50']:.2f} x eager training, "
                    f"{(f['peak memory bytes'] or 0) / 2**30:.0f} GiB"
                ),
            )
            yield f"{batch} {kind}: {said}"
    for name, title in STEPS.items():
        found = {size: figure(sections, "yardsticks", f"{size} {name}") for size in SIZES}
        yield f"x {title}: {cells(found, lambda f: '{:.2f}'.format(f['speed over it']['p50']))}"
    slow = {title: figure(sections, "yardsticks", f"64k {name}") for name, title in SLOW.items()}
    yield f"x what is slow: {cells(slow, lambda f: '{:.1f}'.format(f['speed over it']['p50']))}"
    corpus = figure(sections, "yardsticks", "real corpus")
    yield "real corpus: " + cell(
        corpus,
        lambda f: (
            f"{f['tokens per second']['sketch']['p50']:,.0f} tokens/s in {f['batches']} batches, "
            f"{f['speed over training']['p50']:.2f} x training"
        ),
    )
    for backend in names:
        timed = {
            f"{op} {entry.get('shape', '')}": entry
            for op in (*MOVING, "dense_sketch")
            for entry in entries(sections, op, "bf16")
            if entry["backend"] == backend and is_there(entry)
        }
        if timed:
            shares = {
                n: next(v["p50"] for k, v in e.items() if k.startswith("share of ")) for n, e in timed.items()
            }
            yield f"{backend} shares: " + ", ".join(f"{n} {100 * s:.0f} %" for n, s in shares.items())
    for kind in ("compiled", "eager"):
        found = {n: figure(sections, "end to end", f"64k {n} {kind} profile") for n in names}
        first = next((f for f in found.values() if is_there(f)), {})
        yield f"64k {kind} profile: " + cell(
            first,
            lambda f: (
                f"{f['device milliseconds']:.0f} ms, host {f['host milliseconds, profiler on']:.0f} ms, "
                f"{f['launches']} launches, sketch {100 * (f['sketch kernels, share of device time'] or 0):.0f} %; "
                + ", ".join(f"{kernel[:28]} {100 * s:.0f} %" for kernel, _, _, s in f["profile"][:4])
            ),
        )
    agreed = cells(own_figures(sections, "cpu and gpu"), lambda f: f"{f['largest 1 - cosine']:.1e}")
    yield f"1 - cosine, CPU and GPU: {agreed}"
    timed = {n: figure(sections, "spectral", n) for n in ("matrix", "groups")}
    yield f"entropy: {cells(timed, lambda f: '{:.1f} ms'.format(f['milliseconds']['p50']))}"
    spent = cells(
        own_figures(sections, "experts"), lambda f: f"{f['speed over training']['p50']:.2f} x training"
    )
    yield f"experts: {spent}"
    waits = cells(
        own_figures(sections, "waiting"),
        lambda f: f"{f.get('own waits', 0)} own, {f.get('waits elsewhere', 0)} elsewhere",
    )
    yield f"waits: {waits}"


def dispatch_record(files: Iterable[dict]) -> dict:
    """What kernels/backends/measured.py reads: median milliseconds by capability, GPU, operation and backend.

    A kernel that failed a check is left out: being fast is no reason to choose it.
    """
    record: dict = {}
    for content in files:
        for entry in content["sections"].get("kernel times", {"figures": {}})["figures"].values():
            if "milliseconds" not in entry or str(entry.get("check", "")).startswith("failed"):
                continue
            operations = record.setdefault(content["capability"], {}).setdefault(content["gpu"], {})
            known = operations.setdefault(entry["op"], {"milliseconds": {}, "measured": {}})
            case = f"{entry['dtype']} {entry['shape']}"
            median = float(f"{entry['milliseconds']['p50']:.4g}")
            known["milliseconds"].setdefault(entry["backend"], {})[case] = median
            machine = content["machines"][entry["machine"]]
            known["measured"][entry["backend"]] = {v: machine.get(v) for v in VERSIONS if v != "gpu"}
    return record
