"""Run the speed benchmarks and keep what they measured, with the machine, versions and commit.

    python -m benchmarks.speed [--only EXPRESSION] [--out benchmarks/results/cpu.json]

Nothing else should run on the machine meanwhile. Figures are ratios of runs that take turns in one process; an
entry that was measured before and is not selected now stays, with the machine and commit it was measured with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import ROOT, describe_machine

FILES = (
    "bench_sketching.py",
    "bench_experts.py",
    "bench_vendi.py",
    "bench_attention.py",
    "bench_reading.py",
)


def main() -> None:
    """Run pytest-benchmark and merge its figures into the results file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="EXPRESSION", help="pytest -k expression")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        files = [str(ROOT / "benchmarks" / "speed" / name) for name in FILES]
        select = ["-k", args.only] if args.only else []
        command = [
            sys.executable,
            "-m",
            "pytest",
            *files,
            *select,
            f"--benchmark-json={raw}",
            "--timeout=0",
            "-q",
        ]
        subprocess.run(command, cwd=ROOT, check=True)
        measured = json.loads(raw.read_text())["benchmarks"]
    machine = describe_machine()
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    for entry in measured:
        seconds = {key: entry["stats"][key] for key in ("min", "median", "max")}
        known[entry["name"]] = {"machine": machine, "seconds": seconds, **entry["extra_info"]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"{len(measured)} entries written to {args.out}; 'make report' puts them into docs/results.md")


if __name__ == "__main__":
    main()
