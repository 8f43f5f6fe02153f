"""The results file of one GPU, written whole after every figure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.report.gpu import check_marks

# What must be equal for figures to be of one run.
SAME = ("tree", "gpu", "driver", "cuda", "torch", "triton", "transformers", "python")


class Results:
    """The file of one GPU.

    {"gpu", "capability", "dry run", "machines": {key: machine}, "sections": {name: {"planned", "seconds", "ended",
    "figures": {figure: {"machine": key, ...}}}}}. A figure is replaced when it is measured again, not before.
    """

    def __init__(self, dry: bool) -> None:
        self.path: Path | None = None
        self.key = ""
        self.content = {"gpu": "", "capability": None, "dry run": dry, "machines": {}, "sections": {}}

    def open(self, path: Path | None, machine: dict) -> None:
        """Go on with what the file holds; `machine` is what figures from now on are measured on."""
        own = {"gpu": machine["gpu"], "capability": machine["capability"], "dry run": self.content["dry run"]}
        if path is not None and path.exists():
            known = json.loads(path.read_text())
            for name, value in own.items():
                if known.get(name) != value:
                    sys.exit(f"{path} has {name} {known.get(name)!r}, this run {value!r}; name another --out")
            self.content = known
        self.content |= own
        same = {name: machine.get(name) for name in SAME}
        known = self.content["machines"]
        key = next(
            (k for k, m in known.items() if {n: m.get(n) for n in SAME} == same), f"run {len(known) + 1}"
        )
        known.setdefault(key, machine)
        self.path, self.key = path, key

    def section(self, name: str) -> dict:
        """The entry of a section."""
        empty = {"planned": [], "seconds": 0.0, "ended": "not run", "figures": {}}
        return self.content["sections"].setdefault(name, empty)

    def figures(self, name: str) -> dict[str, dict]:
        """What is there of a section from this source, versions and GPU: measured, or marked with why not."""
        found = self.content["sections"].get(name, {"figures": {}})["figures"]
        return {figure: entry for figure, entry in found.items() if entry["machine"] == self.key}

    def take(self, name: str, answer: dict) -> None:
        """Put a section process's answer, which may be half of one, into its place."""
        entry = self.section(name)
        entry["planned"], entry["plan of"] = answer["planned"], self.key
        for figure, found in answer["figures"].items():
            entry["figures"][figure] = {**found, "machine": self.key}
        self.save()

    def save(self) -> None:
        """Write the file."""
        check_marks(self.content)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, self.content)


def write_whole(path: Path, content: dict) -> None:
    """JSON in the place of what is there, in one step: whoever reads it, or dies here, finds one of the two."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def read(path: Path) -> dict | None:
    """The content of a JSON file that is written whole or not at all; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None
