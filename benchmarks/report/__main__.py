"""Turn benchmarks/results into the tables of docs/ and the README, into the record of faster backends, and into the
rates that `gvendi plan` computes with.

    python -m benchmarks.report [--check]

No figure is typed by hand. --check changes nothing and fails if a page of docs/, the README or
gvendi_fast/kernels/backends/measured.json or gvendi_fast/analysis/rates.json differs from the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.report.checks import before_after_sections, reading_entries, reading_table
from benchmarks.report.corpora import reading_lines, thread_lines
from benchmarks.report.coverage import coverage_sections, forecast_row
from benchmarks.report.direction import direction_line, direction_table
from benchmarks.report.engine import engine_entries, engine_rows, engine_table
from benchmarks.report.experts import expert_sections
from benchmarks.report.gpu import MISSING, dispatch_record, gpu_results, gpu_tables, readme_rows
from benchmarks.report.group_rewards import reward_sections
from benchmarks.report.machines import machine_sections
from benchmarks.report.proxies import (
    agreement_table,
    choice_line,
    dim_table,
    proxy_entries,
    proxy_line,
    readme_row,
    set_line,
    set_table,
    share_table,
    tiny_table,
)
from benchmarks.report.quantised import quantised_line, quantised_table
from benchmarks.report.rates import planning_rates
from benchmarks.report.reference import reference_values
from benchmarks.report.scale import scale_sections
from benchmarks.report.sketch_dimension import dimension_line, dimension_row, dimension_table
from benchmarks.report.stored_sketches import stored_sections
from benchmarks.report.synthesis import rate_table, study_line, study_table, synthesis_entries
from benchmarks.report.training import sampler_line, sampler_table, series_line, series_table
from benchmarks.report.training_tap import tap_sections
from benchmarks.shapes import SHAPES
from gvendi_fast.analysis.planning import RATES
from gvendi_fast.kernels.backends.measured import RECORD

# Entries of cpu.json that are of sketching.
SPEED = ("test_sketch", "test_linear_sketch", "test_compiled_sketching")
FIDELITY = (("hadamard", "this package"), ("rademacher", "dense random signs"))
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def load(path: Path) -> dict:
    """A results file; empty where it does not exist."""
    return json.loads(path.read_text()) if path.exists() else {}


def ratio(entry: dict | None, name: str, percent: bool = False) -> str:
    """A quantile triple as "p50 (p20 to p80)"."""
    if not entry or name not in entry:
        return MISSING
    p20, p50, p80 = (entry[name][q] * (100 if percent else 1) for q in ("p20", "p50", "p80"))
    return f"{p50:.1f} % ({p20:.1f} to {p80:.1f})" if percent else f"{p50:.2f} ({p20:.2f} to {p80:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed_table(cpu: dict) -> str:
    """Sketching over a training step, the bare pass and batch-1 autograd; the compiled pass over the eager one."""
    rows = []
    for key, shape in SHAPES.items():
        for dtype in ("fp32", "bf16"):
            one = cpu.get(f"test_sketching_against_training[{key}-{dtype}]")
            work = cpu.get(f"test_sketch_work_of_one_batch[{key}-{dtype}]")
            compiled = cpu.get(f"test_compiled_sketching_against_eager[{key}-{dtype}]")
            peer = cpu.get(f"test_sketching_against_batch_1_autograd_and_countsketch[{key}-{dtype}]")
            rows.append(
                [
                    f"{shape.name}, {shape.batch} x {shape.length} tokens",
                    dtype,
                    ratio(one, "ratio to training step"),
                    ratio(one, "ratio to bare forward + input gradients"),
                    ratio(work, "sketch work over bare forward + input gradients", percent=True),
                    ratio(peer, "ratio to batch-1 autograd + CountSketch"),
                    ratio(compiled, "ratio to eager sketch"),
                    f"{compiled['seconds of the compiler']:.0f} s" if compiled else MISSING,
                ]
            )
    head = [
        "model and batch",
        "weights",
        "over a training step",
        "over forward + input gradients",
        "sketch operations, share of the latter",
        "over batch-1 autograd + CountSketch",
        "compiled pass over the eager one",
        "compiling took",
    ]
    return table(head, rows)


def copy_table(cpu: dict) -> str:
    """linear_sketch over a copy of its inputs."""
    rows = []
    for rows_, width_in, width_out in ((2048, 288, 768), (2048, 896, 4864)):
        for dtype in ("fp32", "bf16"):
            entry = cpu.get(
                f"test_linear_sketch_against_a_copy_of_its_inputs[{rows_}-{width_in}-{width_out}-{dtype}]"
            )
            rows.append(
                [f"{rows_} x ({width_in}, {width_out})", dtype, ratio(entry, "ratio to copy of its inputs")]
            )
    return table(
        ["`linear_sketch`, rows x (input, output width)", "inputs", "time over a copy of its inputs"], rows
    )


def reading_sections(cpu: dict, changed: dict) -> list[str]:
    """Reading and storing, and what the last change of them cost; nothing where neither was measured."""
    entries, compared = reading_entries(cpu), before_after_sections(changed, table)
    if not entries and not compared:
        return []
    own = [machine_line(entries), reading_table(cpu, ratio, table)] if entries else []
    return ["## Reading and storing", *own, *compared]


def fidelity_table(found: dict) -> str:
    """Cosine error, Spearman and relative error of both kinds of sketch."""
    rows = []
    for kind, name in FIDELITY:
        entry = found.get(kind)
        if not entry:
            rows.append([name, MISSING, MISSING, MISSING])
            continue
        error, rank, bias = (
            entry[n] for n in ("cosine rms error", "spearman of gvendi", "relative gvendi error")
        )
        rows.append(
            [
                name,
                f"{error['mean']:.4f} +- {error['sd']:.4f}",
                f"{rank['mean']:.4f} ({rank['min']:.4f} to {rank['max']:.4f})",
                f"{100 * bias['mean']:+.2f} % ({100 * bias['min']:+.2f} to {100 * bias['max']:+.2f})",
            ]
        )
    return table(["sketch", "rms error of cosines", "Spearman of G-Vendi", "relative error of G-Vendi"], rows)


def bf16_table(found: dict) -> str:
    """What bfloat16 weights change."""
    entry = found.get("bfloat16")
    if not entry:
        return f"bfloat16 weights against float32: {MISSING}."
    rows = [[name, f"{value:.4f}"] for name, value in entry.items()]
    return table(["bfloat16 weights against float32, same seed", ""], rows)


def machine_line(entries: list[dict]) -> str:
    """One line of what the figures were measured on."""
    if not entries:
        return f"Machine: {MISSING}."

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(entry["machine"][name]) for entry in entries}))

    return (
        f"Measured on {all_of('cpu')}, threads: {all_of('threads')}, torch {all_of('torch')}, transformers "
        f"{all_of('transformers')}, commits {all_of('commit')}, {all_of('date')}."
    )


def render(results: Path = RESULTS) -> str:
    """Everything between the markers of docs/results.md, from a folder of results."""
    cpu, found, selection = (load(results / f"{name}.json") for name in ("cpu", "fidelity", "selection"))
    study, rate = load(results / "synthesis.json"), load(results / "synthesis_rate.json")
    proxies = load(results / "proxies.json")
    tiny, choice = load(results / "tiny.json"), load(results / "choose_tiny.json")
    dimension = load(results / "sketch_dimension.json")
    quantised = load(results / "quantised.json")
    direction = load(results / "common_direction.json")
    sampler, series = (load(results / f"{name}.json") for name in ("gain_sampler", "training_series"))
    speed = [entry for name, entry in cpu.items() if name.startswith(SPEED)]
    sections = [
        "## Speed on a CPU",
        "Medians of rounds in which the runs take turns, 20th to 80th percentile in brackets.",
        machine_line(speed),
        speed_table(cpu),
        copy_table(cpu),
        *expert_sections(load(results / "experts.json"), ratio, table, machine_line),
        *tap_sections(load(results / "training_tap.json"), ratio, table, machine_line),
        *reading_sections(cpu, load(results / "before_after.json")),
        *reading_lines(load(results / "reading.json"), table),
        *(reading_lines(fast, table) if (fast := load(results / "reading_fast.json")) else ()),
        *thread_lines(load(results / "threads.json"), table),
        "## Faithfulness",
        "Compared to exact gradients: 8 seeds, "
        f"{found.get('samples', MISSING)} samples of math, logic and inference text under a trained "
        f"{found.get('parameters', 0):,}-parameter Llama, {found.get('subsets', MISSING)} subsets of "
        f"{found.get('subset size', MISSING)}, K = {found.get('dim', MISSING)}."
        if found
        else f"{MISSING.capitalize()}.",
        fidelity_table(found),
        bf16_table(found),
        "## Proxies",
        proxy_line(proxies),
        machine_line(proxy_entries(proxies)),
        agreement_table(proxies, table),
        dim_table(proxies, table),
        share_table(proxies, table),
        choice_line(tiny, choice),
        machine_line(proxy_entries(tiny)),
        tiny_table(tiny, choice, table),
        set_line(tiny),
        set_table(tiny, table),
        "## Quantised proxies",
        quantised_line(quantised),
        machine_line([quantised] if quantised else []),
        quantised_table(quantised, table),
        "## The sketch dimension",
        dimension_line(dimension, MISSING),
        machine_line([dimension] if dimension else []),
        dimension_table(dimension, table),
        *stored_sections(load(results / "stored_sketches.json"), table, machine_line),
        *coverage_sections(load(results / "coverage.json"), table),
        "## Scoring and selection",
        "On finished sketches.",
        machine_line(engine_entries(cpu, selection)),
        engine_table(cpu, selection, table),
        *reward_sections(load(results / "group_rewards.json"), table, machine_line),
        *machine_sections(
            *(load(results / f"{name}.json") for name in ("engines", "index", "large_pool")),
            table,
            machine_line,
        ),
        "## One common direction",
        direction_line(direction),
        machine_line([direction] if direction else []),
        direction_table(direction, table),
        "## Growing a data set",
        study_line(study),
        machine_line(synthesis_entries(study, rate)),
        study_table(study, table),
        rate_table(rate, table),
        "## Choosing while training",
        sampler_line(sampler),
        machine_line([sampler] if sampler else []),
        sampler_table(sampler, table),
        series_line(series),
        machine_line([series] if series else []),
        series_table(series, table),
        gpu_tables(gpu_results(results), table),
    ]
    return "\n\n".join(section for section in sections if section)


def render_readme(results: Path = RESULTS) -> str:
    """The README's one table: the handful of figures that matter."""
    cpu, found, selection = (load(results / f"{name}.json") for name in ("cpu", "fidelity", "selection"))
    rows = []
    key = "qwen2-15m"
    shape = SHAPES[key]
    for dtype in ("fp32", "bf16"):
        entry = cpu.get(f"test_sketching_against_training[{key}-{dtype}]")
        rows.append(
            [
                f"{shape.name}, {dtype}, on a CPU: time of sketching over a training step",
                ratio(entry, "ratio to training step"),
            ]
        )
    for kind, name in FIDELITY:
        rank = found.get(kind, {}).get("spearman of gvendi")
        text = f"{rank['mean']:.4f} ({rank['min']:.4f} to {rank['max']:.4f})" if rank else MISSING
        rows.append([f"Spearman of G-Vendi with that of exact gradients, {name}", text])
    rows.append(readme_row(load(results / "tiny.json")))
    rows.append(dimension_row(load(results / "sketch_dimension.json"), MISSING))
    rows.append(forecast_row(load(results / "coverage.json"), MISSING))
    rows += readme_rows(gpu_results(results))
    for what, measured, beside, _ in engine_rows(cpu, selection):
        if what.startswith(("entropy after one row joins", "`relaxed`")):
            rows.append([what, f"{measured}; {beside}"])
    return table(["what", "measured"], rows)


def planning_rates_of(results: Path = RESULTS) -> dict:
    """The content of rates.json, from a folder of results."""
    names = ("tiny", "threads", "reading", "before_after", "scale", "large_pool")
    return planning_rates(
        load(results / "cpu.json"), gpu_results(results), *(load(results / f"{name}.json") for name in names)
    )


def between_markers(path: Path, content: str) -> str:
    """A page with this in place of what stands between its markers."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{path.relative_to(ROOT)} lacks the markers {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    """Write the tables into their pages, and the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    args = parser.parse_args()
    page, readme = ROOT / "docs" / "results.md", ROOT / "README.md"
    scale, plans = ROOT / "docs" / "good-number.md", ROOT / "docs" / "scale.md"
    record = json.dumps(dispatch_record(gpu_results(RESULTS)), indent=1, sort_keys=True)
    rates = planning_rates_of(RESULTS)
    wanted = {
        page: between_markers(page, render()),
        readme: between_markers(readme, render_readme()),
        scale: between_markers(scale, reference_values(load(RESULTS / "reference_values.json"), table)),
        ROOT / RECORD.relative_to(RECORD.parents[3]): f"{record}\n",
        ROOT / RATES.relative_to(RATES.parents[2]): f"{json.dumps(rates, indent=1, sort_keys=True)}\n",
        plans: between_markers(plans, scale_sections(rates, table)),
    }
    stale = [path for path, content in wanted.items() if path.read_text() != content]
    if args.check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"{names} differs from benchmarks/results; run 'make report'")
    if not args.check:
        for path in stale:
            path.write_text(wanted[path])


if __name__ == "__main__":
    main()
