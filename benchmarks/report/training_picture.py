"""The picture of a training run's series by source, from benchmarks/results/training_series.json.

python -m benchmarks.report.training_picture [--results FILE.json] [--out docs/pictures/training_series.svg]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "training_series.json"
OUT = ROOT / "docs" / "pictures" / "training_series.svg"
FIGURES = {"gvendi": "G-Vendi of the source in the window", "similarity": "mean squared cosine in the source"}
# Told apart without colour as well.
LINES = ("-", "--", "-.", ":", "-")
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#8c6bb1", "#d55e00")


def title(name: str, found: dict[str, Any]) -> str:
    """What a row of the picture is of."""
    model = found["settings"]["model"]
    return f"its own gradients, tapped ({model})" if name == "tap" else f"a frozen proxy ({name})"


def draw(found: dict[str, Any], out: Path) -> None:
    """Draw it; the same numbers give the same file under one version of matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "training series", "svg.fonttype": "none", "font.size": 10}):
        rows = list(found["watched"])
        figure = Figure(figsize=(9, 3 * len(rows) + 0.6), layout="constrained")
        axes = figure.subplots(len(rows), len(FIGURES), squeeze=False, sharex=True)
        for line, name in zip(axes, rows, strict=True):
            watched = found["watched"][name]
            for ax, (figures, label) in zip(line, FIGURES.items(), strict=True):
                for k, source in enumerate(found["rows"]):
                    values = watched["series"].get(
                        f"{figures}/source/{source}", [None] * len(watched["steps"])
                    )
                    points = [(s, v) for s, v in zip(watched["steps"], values, strict=True) if v is not None]
                    thick = 2.6 if source == "repeated" else 1.4
                    ax.plot(
                        *zip(*points, strict=True), LINES[k], color=COLOURS[k], linewidth=thick, label=source
                    )
                ax.set_title(f"{label}\n{title(name, found)}", fontsize=9.5)
                ax.set_ylim(bottom=0)
                ax.spines[["top", "right"]].set_visible(False)
        for ax in axes[-1]:
            ax.set_xlabel("training step")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="svg", facecolor="white", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.training_picture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    draw(json.loads(args.results.read_text()), args.out)


if __name__ == "__main__":
    main()
