"""What machine, versions and commit a result was measured with: it travels with every number.

torch is imported by what describes it alone, so that a process which only starts others does without.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN_COMMIT = "unknown (no git history; GVENDI_COMMIT names it)"
# What decides a GPU's figures.
SOURCES = (
    "CMakeLists.txt",
    "csrc/**/*",
    "gvendi_fast/**/*.py",
    "benchmarks/gpu/*.py",
    "tests/plain.py",
    "tests/tolerance.py",
    "tests/triton_builds.py",
    "benchmarks/shapes.py",
)


def describe_machine() -> dict[str, object]:
    """CPU, GPU, cores, threads, versions, backends, commit (with "+" if files differ from it) and date."""
    import torch

    from gvendi_fast.kernels.backends import explain

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "transformers")},
        **describe_gpu(),
        # Where the tree lies says nothing of the machine.
        "backends": {name: said.replace(f"{ROOT}/", "") for name, said in explain().items()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in info.read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def describe_gpu() -> dict[str, object]:
    """The first GPU with its memory, driver, CUDA version and Triton; nothing where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    driver = "unknown (no nvidia-smi)"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = (
            subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
        )
        driver = found or "unknown (nvidia-smi does not say)"
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    return {
        "gpu": torch.cuda.get_device_name(0),
        "gpu memory bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "triton": metadata.version("triton") if "triton" in installed else "not installed",
    }


@functools.cache
def commit() -> str:
    """The commit of the working tree; GVENDI_COMMIT names it for a copy of the tree without its history."""
    if named := os.environ.get("GVENDI_COMMIT"):
        return named
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return UNKNOWN_COMMIT

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    # Results themselves do not make the code differ.
    changed = git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        ":!benchmarks/results",
        ":!README.md",
        ":!docs",
    )
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def tree_digest() -> str:
    """Digest of the sources that decide a GPU's figures: two trees with the same one measure the same thing."""
    digest = hashlib.blake2b(digest_size=6)
    found = {path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}
    for path in sorted(found):
        digest.update(f"{path.relative_to(ROOT)}\0{len(path.read_bytes())}\0".encode() + path.read_bytes())
    return digest.hexdigest()
