"""Check every kernel on a GPU against the reference, then time it, and keep what was found.

    python benchmarks/gpu.py [--sections NAME ...] [--seconds 540] [--out benchmarks/results/<gpu>.json]

An operation whose checks fail, or that does not repeat to the bit, is not timed. Shares are of this GPU's own copy
bandwidth and matrix rates, measured in the same run. Sections run in order of importance; each is written when it is
done, with its own commit, date and versions, and replaces that section alone in the file of this GPU, so a run that
ends early is continued with --sections. What a section needs (the checks of this very commit) runs before it.

`benchmarks/report.py` then writes the README's tables, and the record by which backends are chosen; for end-to-end
figures with the faster backends run "end to end" again after it. --dry-run goes through everything with tiny sizes
on whatever device there is, and writes only where --out says; the report takes no such file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import ROOT, UNKNOWN_COMMIT, describe_machine
from gpu_checks import OTHER_SIZES, SIZES, check
from gpu_kernels import time_operations
from gpu_model import devices_agree, end_to_end
from gpu_spectral import spectral
from gpu_timing import Bench
from gpu_waiting import QWEN_05B, TINY, waiting

COMPILED = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}


class Results:
    """The file of one GPU: {"gpu", "capability", "sections": {name: {"machine", "seconds", "found"}}}."""

    def __init__(self, path: Path | None, gpu: str, capability: str | None, dry: bool) -> None:
        self.path, self.machine = path, describe_machine()
        self.content = {"gpu": gpu, "capability": capability, "dry run": dry, "sections": {}}
        if path is not None and path.exists():
            known = json.loads(path.read_text())
            for key in ("gpu", "capability", "dry run"):
                if known.get(key) != self.content[key]:
                    sys.exit(
                        f"{path} has {key} {known.get(key)!r}, this run {self.content[key]!r}; name another --out"
                    )
            self.content = known

    def found(self, section: str) -> dict | None:
        """What a section found, if this commit did with these versions on such a machine, and it was not cut short."""
        entry = self.content["sections"].get(section)
        # "+" marks a tree that differs from its commit, which may be any.
        if entry is None or self.machine["commit"].endswith("+") or self.machine["commit"] == UNKNOWN_COMMIT:
            return None
        same = {**entry["machine"], "date": None} == {**self.machine, "date": None}
        return entry["found"] if same and entry["found"].get("complete", True) else None

    def keep(self, section: str, found: dict, seconds: float) -> None:
        """Write a section in the place of its predecessor, unless that is whole and this one was cut short."""
        known = self.content["sections"].get(section, {"found": {"complete": False}})
        if known["found"].get("complete", True) and not found.get("complete", True):
            print(f"{section}: out of time; what was measured before stays", flush=True)
            return
        entry = {"machine": self.machine, "seconds": round(seconds, 1), "found": found}
        self.content["sections"][section] = entry
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self.path.with_suffix(".partial")
            whole.write_text(json.dumps(self.content, indent=1) + "\n")
            whole.replace(self.path)


def sections_of(bench: Bench, checked: dict[str, dict]) -> dict[str, Callable[[], dict]]:
    """{name: what it runs}, most important first; `checked` {backend: its checks} fills up meanwhile."""
    names = COMPILED[bench.device.type]
    sizes, others = (OTHER_SIZES[1:2], OTHER_SIZES[:1]) if bench.dry else (SIZES, OTHER_SIZES)
    return {
        **{f"checks {n}": lambda n=n: check(bench.device, n, sizes, bench.late) for n in names},
        "end to end": lambda: end_to_end(bench, checked),
        **{f"times {n}": lambda n=n: time_operations(bench, n, checked[n]) for n in names},
        "cpu and gpu": lambda: devices_agree(bench),
        "spectral": lambda: spectral(bench),
        "waiting": lambda: waiting(bench.device, *((TINY, 2, 16) if bench.dry else (QWEN_05B, 32, 512))),
        **{f"other checks {n}": lambda n=n: check(bench.device, n, others, bench.late) for n in names},
    }


def needs(section: str, names: tuple[str, ...]) -> list[str]:
    """The sections that must have run before."""
    if section == "end to end":
        return [f"checks {name}" for name in names]
    return [section.replace("times", "checks")] if section.startswith("times ") else []


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", metavar="NAME", help="run these alone [default: all]")
    parser.add_argument(
        "--seconds", type=float, default=540, help="start nothing after this time [default: 540]"
    )
    parser.add_argument("--out", type=Path, help="results file [default: benchmarks/results/<gpu>.json]")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on any device")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        sys.exit("torch sees no GPU; --dry-run goes through the script without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench, checked = Bench(device, args.dry_run, args.seconds), {}
    on_gpu = device.type == "cuda"
    gpu = torch.cuda.get_device_name(0) if on_gpu else "none"
    capability = "{}.{}".format(*torch.cuda.get_device_capability(0)) if on_gpu else None
    file = f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    path = args.out or (None if args.dry_run else ROOT / "benchmarks" / "results" / file)
    results = Results(path, gpu, capability, args.dry_run)
    sections, names = sections_of(bench, checked), COMPILED[device.type]
    if unknown := set(args.sections or ()) - set(sections):
        parser.error(f"--sections must be of {', '.join(sections)}; got {', '.join(sorted(unknown))}")
    asked = set(args.sections or sections)
    for section in [s for s in sections if s in asked]:
        asked |= {need for need in needs(section, names) if results.found(need) is None}
    for name in names:
        checked[name] = results.found(f"checks {name}")
    failed = []
    for section in [s for s in sections if s in asked]:
        if bench.late():
            print(f"{section}: out of time; continue with --sections", flush=True)
            continue
        began = time.monotonic()
        found = sections[section]()
        results.keep(section, found, time.monotonic() - began)
        print(f"{section}: {json.dumps(found)[:3000]}", flush=True)
        kind, _, name = section.rpartition(" ")
        if kind == "checks":
            checked[name] = found
        if kind in ("checks", "other checks"):
            failed += [f"{op} on {name}" for op, entry in found["operations"].items() if entry["failed"]]
    print(f"checks failed: {'; '.join(failed) or 'none'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
