"""A check of the package as it is installed, for a wheel in an environment of its own:

    python tests/installed.py

Which instruction sets its kernels have, that they agree with their definitions, and the score of a small corpus under
each, which must be the same number. The last line is JSON: {"file", "isas", "score", "runtimes", "compilers"}. It needs
nothing but the package: no pytest, no other file of tests/.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++")
ROWS = 40
# The sums of PyTorch differ in their last bits from one number of threads to another.
SCORE = ("--proxy", "tiny", "--threads", "1", "--json")


def corpus(path: Path) -> None:
    """Writes `ROWS` rows of several lengths."""
    rows = [
        {
            "prompt": f"What is {i} times {i % 7}?" + " Please." * (i % 5),
            "completion": f"It is {i * (i % 7)}.",
        }
        for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def gvendi(*words: str, **environment: str) -> str:
    """What the command says; its error goes through where it fails."""
    command = [sys.executable, "-m", "gvendi_fast.cli", *words]
    return subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def runtimes() -> list[str]:
    """Files of OpenMP's that this process has opened; empty where the system does not say."""
    maps = Path("/proc/self/maps")
    with contextlib.suppress(FileNotFoundError):
        return sorted(
            {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line.split("/")[-1]}
        )
    return []


def main() -> None:
    import gvendi_fast
    from gvendi_fast.kernels.backends import cpu

    isas = cpu.available_isas()
    assert isas, cpu.status()
    assert "built without" not in cpu.status() or sys.platform == "darwin", cpu.status()
    found = {
        "file": gvendi_fast.__file__,
        "isas": isas,
        "runtimes": runtimes(),
        "compilers": [name for name in COMPILERS if shutil.which(name)],
    }
    print(gvendi("info"))
    print(gvendi("inspect", "--model", "tiny"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        corpus(path)
        scores = {
            isa: json.loads(gvendi("score", str(path), *SCORE, GVENDI_ISA=isa))["gvendi"] for isa in isas
        }
    assert len(set(scores.values())) == 1, scores
    print(json.dumps({**found, "score": scores[isas[0]]}))


if __name__ == "__main__":
    main()
